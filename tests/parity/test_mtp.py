"""Multi-token prediction against transformers' own, which exists for DeepSeek-V3 only; names as in the releases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.cases import RELEASED_YARN, V3

import jaxmoe
from jaxmoe.checkpoint import load_hf, save_hf
from jaxmoe.model import mtp_hidden, run, unembed

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from parity import oracle  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers.modeling_layers import MtpModel  # noqa: E402

pytestmark = pytest.mark.parity

TOLERANCE = 5e-5
LENGTH = 40


def _as_released(mtp, main_layers: int) -> dict:
    """transformers' MTP tensors under the names and in the shapes of the released files, experts one by one."""
    tensors = {}
    for name, value in mtp.state_dict().items():
        if not name.startswith("layers."):
            continue  # embedding and head, the main model's own
        _, index, rest = name.split(".", 2)
        prefix = f"model.layers.{main_layers + int(index)}."
        rest = rest.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
        if rest == "mlp.experts.gate_up_proj":
            for e, both in enumerate(value):
                gate, up = both.chunk(2)
                tensors[f"{prefix}mlp.experts.{e}.gate_proj.weight"] = gate
                tensors[f"{prefix}mlp.experts.{e}.up_proj.weight"] = up
        elif rest == "mlp.experts.down_proj":
            for e, down in enumerate(value):
                tensors[f"{prefix}mlp.experts.{e}.down_proj.weight"] = down
        else:
            tensors[prefix + rest] = value
    return {name: value.clone().contiguous() for name, value in tensors.items()}


def _expected(main, mtp, tokens: np.ndarray) -> list[np.ndarray]:
    """Logits of the main model, then of every MTP depth over the positions that have a token so far ahead."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        hidden = main.model(ids).last_hidden_state
        logits = [main.lm_head(hidden).numpy()]
        for depth in range(len(mtp.layers)):
            ahead = ids[:, depth + 1 :]
            positions = torch.arange(depth + 1, ids.shape[1])[None]
            hidden = mtp.forward_layer(depth, hidden[:, :-1], positions, None, input_ids=ahead)
            logits.append(mtp.shared_head(hidden).numpy())
    return logits


def _ours(params, config, tokens: np.ndarray) -> list[np.ndarray]:
    @jax.jit
    def all_logits(params, tokens):
        hidden = run(params, config, tokens).hidden
        logits = [unembed(params, hidden)]
        for depth, module in enumerate(params["mtp"]):
            hidden = hidden[:, :-1]
            hidden, _ = mtp_hidden(module, params, config, hidden, tokens[:, depth + 1 :])
            logits.append(unembed(params, hidden))
        return logits

    return [np.asarray(x) for x in all_logits(params, jnp.asarray(tokens))]


def _assert_close(actual: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(actual) == len(expected)
    for depth, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert b.std() > 0.1, f"depth {depth}: the logits are too flat to compare"
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE, err_msg=f"depth {depth}")


def test_two_depths_of_released_layout_predict_as_transformers_does(tmp_path):
    fields = V3 | RELEASED_YARN | {"num_mtp_layers": 2, "first_k_dense_replace": 1}
    main = oracle.build("DeepseekV3", fields, seed=0)
    mtp = MtpModel(main, 2).eval()
    oracle.randomise(mtp, seed=1)  # embedding and head with it, which are shared
    main.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | _as_released(mtp, main_layers=3), file)
    params, config = load_hf(tmp_path)
    assert config.num_nextn_predict_layers == 2
    tokens = np.random.default_rng(0).integers(0, 97, (2, LENGTH), dtype=np.int32)
    _assert_close(_ours(params, config, tokens), _expected(main, mtp, tokens))


def test_layer_61_that_we_save_is_read_by_transformers(tmp_path):
    config = jaxmoe.presets["deepseek_v3"].replace(
        vocab_size=50, hidden_size=32, intermediate_size=40, moe_intermediate_size=12,
        num_attention_heads=2, q_lora_rank=12, kv_lora_rank=12, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=8, num_experts_per_tok=2, n_group=2,
        topk_group=1, initializer_range=0.1,
    )  # fmt: skip
    params = jaxmoe.init_params(config, jax.random.key(0))
    save_hf(tmp_path, params, config)
    main = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    mtp = MtpModel.from_pretrained(main)
    assert len(mtp.layers) == 1
    tokens = np.random.default_rng(0).integers(0, 50, (1, LENGTH), dtype=np.int32)
    _assert_close(_ours(params, config, tokens), _expected(main.eval(), mtp.eval(), tokens))
