"""Writes goldens/: one tiny checkpoint of each model type with transformers' logits and greedy tokens.

Needs torch and transformers; what it writes is checked everywhere by test_goldens.py. From the repository's root:

    PYTHONPATH=.:tests python tests/parity/make_goldens.py
"""

import json
import pathlib
import shutil

import numpy as np
import torch
import transformers
from parity import oracle
from parity.cases import GLM, LLAMA, LLAMA3_ROPE, RELEASED_YARN, V3, V32, Fields

DIRECTORY = pathlib.Path(__file__).parent / "goldens"
BATCH, PROMPT, NEW = 2, 24, 64
# Every discrete choice must be decided by this much, so that no machine's rounding turns it over.
MARGIN = 2e-5

_SMALL: Fields = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
}
_SMALL_MLA: Fields = _SMALL | {
    "q_lora_rank": 20, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "moe_intermediate_size": 12, "n_routed_experts": 8,
}  # fmt: skip
_SMALL_INDEX: Fields = {"index_n_heads": 16, "index_head_dim": 12, "index_topk": 8}
GOLDENS: dict[str, tuple[str, Fields]] = {
    "deepseek_v3": ("DeepseekV3", V3 | _SMALL_MLA | RELEASED_YARN | {"first_k_dense_replace": 1}),
    "deepseek_v32": (
        "DeepseekV32",
        V32 | _SMALL_MLA | _SMALL_INDEX | RELEASED_YARN | {"first_k_dense_replace": 1},
    ),
    "glm_moe_dsa": (
        "GlmMoeDsa",
        GLM | _SMALL_MLA | _SMALL_INDEX | {"indexer_types": ["full", "shared", "full"]},
    ),
    "llama": (
        "Llama",
        LLAMA | _SMALL | LLAMA3_ROPE | {"head_dim": 10, "tie_word_embeddings": True},
    ),
}


def _in_released_spelling(path: pathlib.Path) -> None:
    """``rope_theta`` and ``rope_scaling`` with "type", as config.json files have them on the hub."""
    fields = json.loads(path.read_text())
    scaling = fields.pop("rope_parameters")
    fields["rope_theta"] = scaling.pop("rope_theta")
    kind = scaling.pop("rope_type")
    fields["rope_scaling"] = {"type": kind} | scaling if kind != "default" else None
    path.write_text(json.dumps(fields, indent=2) + "\n")


def _decided(family: str, fields: Fields) -> tuple[torch.nn.Module, oracle.Answer]:
    """The first seed's model whose choices are all clear."""
    for seed in range(1000):
        model = oracle.build(family, fields, seed)
        with torch.no_grad():
            for value in model.state_dict().values():
                value.copy_(
                    value.bfloat16().float()
                )  # so that files of half the size hold them exactly
        rng = np.random.default_rng(seed)
        prompt = rng.integers(0, fields["vocab_size"], (BATCH, PROMPT), dtype=np.int32)
        answer = oracle.ask(model, prompt, NEW)
        if answer.margin >= MARGIN:
            return model, answer
    raise RuntimeError(f"no seed below 1000 has a margin of {MARGIN} for {family}; lower MARGIN")


def main() -> None:
    for name, (family, fields) in GOLDENS.items():
        directory = DIRECTORY / name
        shutil.rmtree(directory, ignore_errors=True)
        model, answer = _decided(family, fields)
        model.bfloat16().save_pretrained(directory)
        (directory / "generation_config.json").unlink(missing_ok=True)
        _in_released_spelling(directory / "config.json")
        np.savez_compressed(
            directory / "expected.npz",
            tokens=answer.tokens,
            prompt_length=PROMPT,
            logits=answer.logits,
            margin=answer.margin,
            made_by=f"transformers {transformers.__version__}, torch {torch.__version__}",
        )
        print(f"{name}: margin {answer.margin:.1e}, logit std {answer.logits.std():.2f}")


if __name__ == "__main__":
    main()
