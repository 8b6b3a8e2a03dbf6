"""Against transformers: what it saves is read; what is written it loads, with equal logits."""

import functools
import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint.support import expected_params, layer_of

from jaxmoe.checkpoint import load_hf, save_hf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

_SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
_DEEPSEEK = _SIZES | {
    "moe_intermediate_size": 12, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "n_shared_experts": 2, "q_lora_rank": 20,
    "kv_lora_rank": 24, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14,
}  # fmt: skip
_INDEX = {"index_n_heads": 4, "index_head_dim": 12, "index_topk": 8}
_YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
CASES = {
    "deepseek_v3": ("DeepseekV3", _DEEPSEEK | {"rope_parameters": _YARN}),
    "deepseek_v3 without query latent, biases, no mtp": (
        "DeepseekV3",
        _DEEPSEEK | {"q_lora_rank": None, "attention_bias": True, "num_nextn_predict_layers": 0},
    ),
    "deepseek_v3 without shared experts, tied": (
        "DeepseekV3",
        _DEEPSEEK | {"n_shared_experts": 0, "tie_word_embeddings": True, "rope_interleave": False},
    ),
    "deepseek_v32": ("DeepseekV32", _DEEPSEEK | _INDEX | {"attention_bias": True}),
    "glm_moe_dsa": (
        "GlmMoeDsa",
        _DEEPSEEK | _INDEX | {"indexer_types": ["full", "shared", "shared"], "first_k_dense_replace": 2},
    ),
    "llama": (
        "Llama",
        _SIZES | {"num_key_value_heads": 2, "head_dim": 10, "attention_bias": True, "mlp_bias": True},
    ),
    "llama tied": ("Llama", _SIZES | {"num_key_value_heads": 1, "tie_word_embeddings": True}),
}  # fmt: skip


def _model(case):
    """A random model in which nothing is zero or one, so that every tensor is told apart."""
    kind, fields = CASES[case]
    config = getattr(transformers, f"{kind}Config")(**fields)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and "inv_freq" not in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return model


def _numpy(state):
    return {name: tensor.float().numpy() for name, tensor in state.items()}


@pytest.fixture(scope="module", params=CASES)
def saved(request, tmp_path_factory):
    """(model, directory that transformers saved it to)."""
    model = _model(request.param)
    directory = tmp_path_factory.mktemp("hf")
    model.save_pretrained(directory, max_shard_size="40KB")
    return model, directory


def _load_with_transformers(directory):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        return transformers.AutoModelForCausalLM.from_pretrained(
            directory, output_loading_info=True
        )


def test_what_transformers_saves_is_read(saved):
    model, directory = saved
    params, config = load_hf(directory)
    state = _numpy(model.state_dict())  # experts are fused here, separate in the files
    assert config.num_nextn_predict_layers == 0
    expected_params(state, config, functools.partial(layer_of, params, config))
    np.testing.assert_array_equal(params["embed"]["weight"], state["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["norm"]["weight"], state["model.norm.weight"])
    if not config.tie_word_embeddings:
        np.testing.assert_array_equal(params["lm_head"]["weight"], state["lm_head.weight"].T)


def test_what_is_saved_transformers_loads_with_equal_logits(saved, tmp_path):
    model, directory = saved
    params, config = load_hf(directory)
    save_hf(tmp_path, params, config, max_shard_bytes=30_000)
    loaded, info = _load_with_transformers(tmp_path)
    assert not any(info.values()), info
    assert type(loaded) is type(model) and loaded.dtype == torch.float32
    expected, actual = _numpy(model.state_dict()), _numpy(loaded.state_dict())
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)
    tokens = torch.arange(24).reshape(2, 12) % 50
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=0)


def test_mtp_layers_do_not_disturb_transformers(tmp_path):
    from checkpoint.support import SMALLEST, assert_trees_equal, numbered_params

    params = numbered_params(SMALLEST)
    save_hf(tmp_path, params, SMALLEST)
    _, info = _load_with_transformers(tmp_path)
    assert not any(info.values()), info
    assert_trees_equal(load_hf(tmp_path)[0], params)


def test_bfloat16_models_are_exchanged_without_rounding(tmp_path):
    model = _model("deepseek_v32").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    params, config = load_hf(tmp_path / "theirs", jnp.bfloat16)
    save_hf(tmp_path / "ours", params, config)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    loaded, info = _load_with_transformers(tmp_path / "ours")
    assert not any(info.values()), info
    expected, actual = _numpy(model.state_dict()), _numpy(loaded.state_dict())
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)
