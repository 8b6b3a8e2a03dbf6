"""Configurations to compare: named ones for each feature, and random draws over all of them.

A case is plain data in transformers' own field names; nothing here needs torch.
"""

import dataclasses
from typing import Any

import numpy as np

Fields = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
      family: prefix of transformers' classes.
      fields: of the configuration class.
      omit: fields taken out of the written config.json, so that another spelling of them has to be read.
      batch, prompt, new: sizes of the comparison.
      decode: also compare greedy tokens, which takes two more executables.
      optimised: compile as users do. The others skip LLVM's optimisations, which take most of the test's time.
    """

    family: str
    fields: Fields
    omit: tuple[str, ...] = ()
    batch: int = 2
    prompt: int = 24
    new: int = 128
    decode: bool = True
    optimised: bool = False


_SIZES: Fields = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 4096,
}  # fmt: skip
_MLA: Fields = {
    "q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 16, "v_head_dim": 24,
}  # fmt: skip
_MOE: Fields = {
    "moe_intermediate_size": 24, "first_k_dense_replace": 0, "n_routed_experts": 16, "num_experts_per_tok": 4,
    "n_group": 4, "topk_group": 2, "n_shared_experts": 1, "routed_scaling_factor": 2.5,
}  # fmt: skip
V3 = _SIZES | _MLA | _MOE
# Sixteen heads or more: with fewer, whole rows of scores are exactly zero and torch breaks ties at random.
V32 = V3 | {"index_n_heads": 16, "index_head_dim": 32, "index_topk": 8}
GLM = V32 | {"n_group": 1, "topk_group": 1, "num_hidden_layers": 4, "rms_norm_eps": 1e-5}
LLAMA = _SIZES | {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}

# Sizes that are multiples of nothing.
_ODD: Fields = {
    "vocab_size": 101, "hidden_size": 72, "intermediate_size": 37, "num_attention_heads": 3,
    "num_key_value_heads": 3,
}  # fmt: skip
_ODD_DEEPSEEK = _ODD | {
    "q_lora_rank": 17, "kv_lora_rank": 13, "qk_nope_head_dim": 7, "qk_rope_head_dim": 6, "v_head_dim": 11,
    "n_routed_experts": 5, "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1, "n_shared_experts": 2,
    "moe_intermediate_size": 9,
}  # fmt: skip


def rope(kind: str, theta: float = 10000.0, **fields: Any) -> Fields:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **fields}}


RELEASED_YARN = rope(
    "yarn", factor=40.0, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1,
    mscale=1.0, mscale_all_dim=1.0,
)  # fmt: skip
# Short original contexts put the comparison's positions beyond them and all three bands into use.
_SHORT_YARN = {"factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3_ROPE = rope(
    "llama3", 500000.0, factor=8.0, original_max_position_embeddings=32, low_freq_factor=1.0,
    high_freq_factor=4.0,
)  # fmt: skip

CASES: dict[str, Case] = {
    # DeepSeek-V3: dense MLA attention.
    "v3 as released": Case("DeepseekV3", V3 | RELEASED_YARN | {"first_k_dense_replace": 1}),
    "v3 no query latent, biases, no groups, tied": Case(
        "DeepseekV3",
        V3
        | {"q_lora_rank": None, "attention_bias": True, "n_group": 1, "topk_group": 1}
        | {"tie_word_embeddings": True},
    ),
    "v3 half-split rotation, unequal mscales, weights not normalised": Case(
        "DeepseekV3",
        V3
        | rope("yarn", **_SHORT_YARN, mscale=0.7, mscale_all_dim=1.3)
        | {"rope_interleave": False, "norm_topk_prob": False, "attention_bias": True},
    ),
    "v3 yarn without mscales, gelu, all groups allowed, no shared expert": Case(
        "DeepseekV3",
        V3
        | rope("yarn", **_SHORT_YARN, truncate=False, beta_fast=4, beta_slow=2)
        | {"hidden_act": "gelu", "topk_group": 4, "n_shared_experts": 0},
    ),
    "v3 odd sizes, linear rope": Case(
        "DeepseekV3", V3 | _ODD_DEEPSEEK | rope("linear", factor=3.0)
    ),
    "v3 yarn with an attention factor, no sparse layers": Case(
        "DeepseekV3",
        V3
        | rope("yarn", 500.0, **_SHORT_YARN, attention_factor=0.8, mscale_all_dim=0.5)
        | {"first_k_dense_replace": 3},
    ),
    # DeepSeek-V3.2: the comparison's 152 tokens below, at, and above index_topk.
    "v32 as released, context 19 x topk": Case(
        "DeepseekV32", V32 | RELEASED_YARN | {"first_k_dense_replace": 1}, optimised=True
    ),
    "v32 context below topk": Case("DeepseekV32", V32 | RELEASED_YARN | {"index_topk": 400}),
    "v32 context at topk, dense and sparse layers mixed": Case(
        "DeepseekV32",
        V32
        | {"index_topk": 152, "num_hidden_layers": 4}
        | {"mlp_layer_types": ["sparse", "dense", "sparse", "dense"]},
    ),
    "v32 context 5 x topk, no groups": Case(
        "DeepseekV32", V32 | {"index_topk": 30, "n_group": 1, "topk_group": 1}
    ),
    "v32 odd sizes, topk 3, biases": Case(
        "DeepseekV32",
        V32
        | _ODD_DEEPSEEK
        | {"index_n_heads": 19, "index_head_dim": 21, "index_topk": 3, "attention_bias": True},
    ),
    "v32 prompt of several query blocks": Case(
        "DeepseekV32", V32 | rope("yarn", **_SHORT_YARN, mscale_all_dim=1.0), batch=1, prompt=300
    ),
    # GLM-5: selections shared between layers.
    "glm one indexer for several layers": Case(
        "GlmMoeDsa",
        GLM | {"indexer_types": ["full", "shared", "shared", "full"], "first_k_dense_replace": 1},
    ),
    "glm every layer its own": Case("GlmMoeDsa", GLM | rope("default", 1e6)),
    "glm frequency and offset": Case(
        "GlmMoeDsa",
        GLM | {"index_topk_freq": 2, "index_skip_topk_offset": 1},
        omit=("indexer_types",),
    ),
    "glm pattern, groups, context below topk": Case(
        "GlmMoeDsa",
        GLM | {"index_topk_pattern": "FSFS", "n_group": 2, "topk_group": 1, "index_topk": 400},
        omit=("indexer_types",),
    ),
    # Llama.
    "llama grouped queries, llama3 rope, own head size": Case(
        "Llama", LLAMA | LLAMA3_ROPE | {"head_dim": 22}, optimised=True
    ),
    "llama one key head, linear rope, biases": Case(
        "Llama",
        LLAMA
        | rope("linear", factor=4.0)
        | {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    ),
    "llama yarn, tied": Case(
        "Llama", LLAMA | rope("yarn", **_SHORT_YARN) | {"tie_word_embeddings": True}
    ),
    "llama odd sizes, gelu": Case(
        "Llama",
        LLAMA
        | _ODD
        | {"num_key_value_heads": 3, "head_dim": 10, "hidden_act": "gelu_pytorch_tanh"},
    ),
}


# -- random draws ------------------------------------------------------------------------------------


class _Dice:
    """Named choices from one generator."""

    def __init__(self, seed: int):
        self._rng = np.random.default_rng(seed)

    def among(self, *options: Any) -> Any:
        return options[self._rng.integers(len(options))]

    def between(self, low: int, high: int) -> int:
        return int(self._rng.integers(low, high + 1))

    def flag(self, probability: float = 0.5) -> bool:
        return bool(self._rng.random() < probability)


def _random_rope(dice: _Dice, llama: bool) -> Fields:
    theta = dice.among(1000.0, 10000.0, 1e6)
    kind = dice.among("default", "linear", "yarn", "yarn", *(("llama3",) if llama else ()))
    if kind == "default":
        return rope(kind, theta)
    if kind == "linear":
        return rope(kind, theta, factor=dice.among(2.0, 3.5))
    original = {"original_max_position_embeddings": dice.among(16, 64, 1024)}
    factor = dice.among(2.0, 16.0, 40.0)
    if kind == "llama3":
        return rope(
            kind, theta, factor=factor, **original, low_freq_factor=1.0, high_freq_factor=4.0
        )
    fields = original | {"factor": factor}
    if not llama and dice.flag(0.7):
        fields |= {"mscale": dice.among(0.707, 1.0), "mscale_all_dim": dice.among(0.707, 1.0)}
    if dice.flag(0.3):
        fields |= {"beta_fast": dice.among(8, 32), "beta_slow": dice.among(1, 2)}
    return rope(kind, theta, **fields)


def _random_llama(dice: _Dice) -> Fields:
    key_heads = dice.among(1, 2, 3)
    heads = key_heads * dice.among(1, 2, 4)
    fields = {"num_attention_heads": heads, "num_key_value_heads": key_heads}
    # transformers insists on a multiple of heads, and below about 30 rounding is amplified.
    fewest = -(-16 // heads)
    fields["hidden_size"] = 2 * heads * dice.between(fewest, max(fewest, 45 // heads))
    if dice.flag():
        fields["head_dim"] = 2 * dice.between(3, 12)
    return fields | {"attention_bias": dice.flag(0.3), "mlp_bias": dice.flag(0.3)}


def _random_deepseek(dice: _Dice, family: str, layers: int) -> Fields:
    heads, groups = dice.between(1, 6), dice.among(1, 1, 2, 4)
    experts = groups * dice.between(2, 6)
    kept = dice.between(1, groups)
    fields = {
        "hidden_size": dice.between(30, 90),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": dice.between(10, 60),
        "kv_lora_rank": dice.between(10, 60),
        "qk_nope_head_dim": dice.between(4, 30),
        "qk_rope_head_dim": 2 * dice.between(1, 10),
        "v_head_dim": dice.between(4, 30),
        "n_routed_experts": experts,
        "n_group": groups,
        "topk_group": kept,
        "num_experts_per_tok": dice.between(1, min(6, experts // groups * kept)),
        "moe_intermediate_size": dice.between(5, 40),
        "n_shared_experts": dice.between(0, 2),
        "first_k_dense_replace": dice.among(0, 0, 1, layers),
        "norm_topk_prob": dice.flag(0.7),
        "routed_scaling_factor": dice.among(1.0, 2.5),
        "attention_bias": dice.flag(0.2),
    }
    if family == "DeepseekV3":
        if dice.flag(0.3):
            fields["q_lora_rank"] = None
        return fields | {"rope_interleave": dice.flag(0.7)}
    fields |= {
        "index_n_heads": dice.between(16, 32),
        "index_head_dim": fields["qk_rope_head_dim"] + dice.between(8, 20),
        "index_topk": dice.among(1, 4, 16, 30, 100, 1000),
    }
    if dice.flag(0.3):
        fields["mlp_layer_types"] = [dice.among("dense", "sparse") for _ in range(layers)]
    if family == "GlmMoeDsa":
        kinds = [dice.among("full", "shared") for _ in range(layers - 1)]
        fields["indexer_types"] = ["full", *kinds]
    return fields


def random_case(seed: int) -> Case:
    """A case drawn from the whole space that ``from_hf`` accepts."""
    dice = _Dice(seed)
    family = dice.among(
        "DeepseekV3", "DeepseekV32", "DeepseekV32", "GlmMoeDsa", "GlmMoeDsa", "Llama"
    )
    layers = dice.between(1, 4)
    fields = {
        "vocab_size": dice.between(50, 130),
        "intermediate_size": dice.between(20, 90),
        "num_hidden_layers": layers,
        "max_position_embeddings": 4096,
        "hidden_act": dice.among("silu", "silu", "silu", "gelu", "gelu_pytorch_tanh", "relu"),
        "tie_word_embeddings": dice.flag(0.2),
        "rms_norm_eps": dice.among(1e-6, 1e-5),
    }
    if family == "Llama":
        fields |= _random_llama(dice)
    else:
        fields |= _random_deepseek(dice, family, layers)
    fields |= _random_rope(dice, family == "Llama")
    return Case(family, fields, prompt=dice.between(2, 40), decode=seed % 2 == 0)
