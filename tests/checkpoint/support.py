"""Small models, and files written and read without the code under test."""

import json
import math
import pathlib
import struct
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxmoe.config import ModelConfig
from jaxmoe.params import Spec, spec

# Where processes of their own are started: the packages and ``tests`` lie below it.
REPOSITORY = pathlib.Path(__file__).parents[2]
# V3.2 in miniature: every kind of leaf, few of each.
SMALLEST = ModelConfig(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=24,
    moe_intermediate_size=8,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    index_n_heads=2,
    index_head_dim=8,
    index_topk=4,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    num_nextn_predict_layers=1,
)


def numbered_params(config: ModelConfig, offset: float = 0.0, shardings: Any = None) -> Any:
    """Float32 parameters that hold different numbers everywhere, so that any mix-up shows."""
    rng = np.random.default_rng(7)

    def leaf(s: Spec) -> np.ndarray:
        return rng.standard_normal(s.shape).astype(np.float32) + np.float32(offset)

    # From the host straight to each device: array to array would compile a slice per shard.
    return jax.device_put(jax.tree.map(leaf, spec(config)), shardings)


def assert_trees_equal(actual: Any, expected: Any) -> None:
    """Same structure, dtypes and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)


_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I32": np.dtype(np.int32),
}


def write_safetensors(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file, from the format's description."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {}
    at = 0
    for name, array in tensors.items():
        stop = at + array.nbytes
        header[name] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, stop],
        }
        at = stop
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            file.write(array.tobytes())


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    out = {}
    for name, entry in header.items():
        start, stop = (8 + length + n for n in entry["data_offsets"])
        out[name] = np.frombuffer(data[start:stop], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return out


def read_model(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of all safetensors files of a directory."""
    out: dict[str, np.ndarray] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors = read_safetensors(path)
        assert not out.keys() & tensors.keys()
        out |= tensors
    return out


def hf_tensors(config: ModelConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random float32 tensors of an MLA checkpoint: names and shapes written out from spec 1.3."""
    c = config
    d, heads = c.hidden_size, c.num_attention_heads
    out: dict[str, np.ndarray] = {}

    def put(name: str, *shape: int) -> None:
        out[name] = rng.standard_normal(shape).astype(np.float32)

    def layer(i: int, sparse: bool, indexer: bool) -> None:
        p = f"model.layers.{i}."
        put(p + "input_layernorm.weight", d)
        put(p + "post_attention_layernorm.weight", d)
        a = p + "self_attn."
        put(a + "q_a_proj.weight", c.q_lora_rank, d)
        put(a + "q_a_layernorm.weight", c.q_lora_rank)
        put(a + "q_b_proj.weight", heads * (c.qk_nope_head_dim + c.qk_rope_head_dim), c.q_lora_rank)
        put(a + "kv_a_proj_with_mqa.weight", c.kv_lora_rank + c.qk_rope_head_dim, d)
        put(a + "kv_a_layernorm.weight", c.kv_lora_rank)
        put(a + "kv_b_proj.weight", heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
        put(a + "o_proj.weight", d, heads * c.v_head_dim)
        if indexer:
            put(a + "indexer.wq_b.weight", c.index_n_heads * c.index_head_dim, c.q_lora_rank)
            put(a + "indexer.wk.weight", c.index_head_dim, d)
            put(a + "indexer.k_norm.weight", c.index_head_dim)
            put(a + "indexer.k_norm.bias", c.index_head_dim)
            put(a + "indexer.weights_proj.weight", c.index_n_heads, d)
        m = p + "mlp."

        def mlp(prefix: str, size: int) -> None:
            put(prefix + "gate_proj.weight", size, d)
            put(prefix + "up_proj.weight", size, d)
            put(prefix + "down_proj.weight", d, size)

        if not sparse:
            return mlp(m, c.intermediate_size)
        put(m + "gate.weight", c.n_routed_experts, d)
        put(m + "gate.e_score_correction_bias", c.n_routed_experts)
        for e in range(c.n_routed_experts):
            mlp(f"{m}experts.{e}.", c.moe_intermediate_size)
        return mlp(m + "shared_experts.", c.moe_intermediate_size * c.n_shared_experts)

    put("model.embed_tokens.weight", c.vocab_size, d)
    for i in range(c.num_hidden_layers):
        layer(i, sparse=i >= c.first_k_dense_replace, indexer=c.index_topk is not None)
    put("model.norm.weight", d)
    put("lm_head.weight", c.vocab_size, d)
    for i in range(c.num_hidden_layers, c.num_hidden_layers + c.num_nextn_predict_layers):
        p = f"model.layers.{i}."
        put(p + "enorm.weight", d)
        put(p + "hnorm.weight", d)
        put(p + "eh_proj.weight", d, 2 * d)
        put(p + "shared_head.norm.weight", d)
        put(p + "embed_tokens.weight", c.vocab_size, d)
        put(p + "shared_head.head.weight", c.vocab_size, d)
        layer(i, sparse=True, indexer=c.index_topk is not None)
    return out


def write_hf(
    directory: pathlib.Path,
    config: ModelConfig,
    tensors: dict[str, np.ndarray],
    *,
    files: int = 1,
    **json_fields: Any,
) -> pathlib.Path:
    """A checkpoint directory: config.json and one file, or several with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config.to_hf() | json_fields))
    if files == 1:
        write_safetensors(directory / "model.safetensors", tensors)
        return directory
    names = list(tensors)
    per_file = math.ceil(len(names) / files)
    weight_map = {}
    for i in range(files):
        part = names[i * per_file : (i + 1) * per_file]
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        write_safetensors(directory / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def expected_params(tensors: dict[str, np.ndarray], config: ModelConfig, layer_of: Any) -> None:
    """Compares ``layer_of(i)`` (layer i's subtree, unstacked) with the file's tensors, by einsum
    and slicing.

    Written out by hand, independently of the table in ``jaxmoe.checkpoint._hf_names``.
    """
    c, t = config, tensors
    for i in range(c.num_hidden_layers + c.num_nextn_predict_layers):
        p, ours = f"model.layers.{i}.", layer_of(i)
        _check(ours["attention_norm"]["weight"], t[p + "input_layernorm.weight"])
        _check(ours["mlp_norm"]["weight"], t[p + "post_attention_layernorm.weight"])
        (_check_mla if c.is_mla else _check_gqa)(ours["attention"], t, p + "self_attn.", c)
        if "indexer" in ours:
            _check_indexer(ours["indexer"], t, p + "self_attn.indexer.", c)
        else:
            assert not any(name.startswith(p + "self_attn.indexer") for name in t)
        if "mlp" in ours:
            _check_mlp(ours["mlp"], t, p + "mlp.")
        else:
            _check_moe(ours["moe"], t, p + "mlp.", c)


def _check(ours: Any, theirs: np.ndarray) -> None:
    np.testing.assert_array_equal(np.asarray(ours), theirs)


def _check_mla(ours: Any, t: dict[str, np.ndarray], p: str, c: ModelConfig) -> None:
    heads, nope, rope = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim
    if c.q_lora_rank is None:
        q = t[p + "q_proj.weight"]
    else:
        q = t[p + "q_b_proj.weight"]
        _check(ours["q_a"]["weight"], t[p + "q_a_proj.weight"].T)
        _check(ours["q_a_norm"]["weight"], t[p + "q_a_layernorm.weight"])
    for h in range(heads):
        rows = q[h * (nope + rope) : (h + 1) * (nope + rope)]
        _check(ours["q_b"]["weight"][:, h], rows.T)
    _check(ours["kv_a"]["weight"], t[p + "kv_a_proj_with_mqa.weight"].T)
    _check(ours["kv_a_norm"]["weight"], t[p + "kv_a_layernorm.weight"])
    per_head = nope + c.v_head_dim
    for h in range(heads):
        rows = t[p + "kv_b_proj.weight"][h * per_head : (h + 1) * per_head]
        _check(ours["k_b"]["weight"][h], rows[:nope])
        _check(ours["v_b"]["weight"][h], rows[nope:].T)
        columns = t[p + "o_proj.weight"][:, h * c.v_head_dim : (h + 1) * c.v_head_dim]
        _check(ours["o"]["weight"][h], columns.T)
    if c.attention_bias:
        _check(ours["kv_a"]["bias"], t[p + "kv_a_proj_with_mqa.bias"])
        _check(ours["o"]["bias"], t[p + "o_proj.bias"])
        if c.q_lora_rank is not None:
            _check(ours["q_a"]["bias"], t[p + "q_a_proj.bias"])


def _check_gqa(ours: Any, t: dict[str, np.ndarray], p: str, c: ModelConfig) -> None:
    for name, heads in (
        ("q", c.num_attention_heads),
        ("k", c.num_key_value_heads),
        ("v", c.num_key_value_heads),
    ):
        for h in range(heads):
            rows = slice(h * c.head_dim, (h + 1) * c.head_dim)
            _check(ours[name]["weight"][:, h], t[f"{p}{name}_proj.weight"][rows].T)
            if c.attention_bias:
                _check(ours[name]["bias"][h], t[f"{p}{name}_proj.bias"][rows])
    for h in range(c.num_attention_heads):
        columns = t[p + "o_proj.weight"][:, h * c.head_dim : (h + 1) * c.head_dim]
        _check(ours["o"]["weight"][h], columns.T)
    if c.attention_bias:
        _check(ours["o"]["bias"], t[p + "o_proj.bias"])


def _check_indexer(ours: Any, t: dict[str, np.ndarray], p: str, c: ModelConfig) -> None:
    for h in range(c.index_n_heads):
        rows = t[p + "wq_b.weight"][h * c.index_head_dim : (h + 1) * c.index_head_dim]
        _check(ours["q_b"]["weight"][:, h], rows.T)
    _check(ours["k"]["weight"], t[p + "wk.weight"].T)
    _check(ours["k_norm"]["weight"], t[p + "k_norm.weight"])
    _check(ours["k_norm"]["bias"], t[p + "k_norm.bias"])
    _check(ours["head_weights"]["weight"], t[p + "weights_proj.weight"].T)


def _check_mlp(ours: Any, t: dict[str, np.ndarray], p: str) -> None:
    _check(ours["gate_up"]["weight"][:, 0], t[p + "gate_proj.weight"].T)
    _check(ours["gate_up"]["weight"][:, 1], t[p + "up_proj.weight"].T)
    _check(ours["down"]["weight"], t[p + "down_proj.weight"].T)
    if "bias" in ours["down"]:
        _check(ours["gate_up"]["bias"][0], t[p + "gate_proj.bias"])
        _check(ours["gate_up"]["bias"][1], t[p + "up_proj.bias"])
        _check(ours["down"]["bias"], t[p + "down_proj.bias"])


def _check_moe(ours: Any, t: dict[str, np.ndarray], p: str, c: ModelConfig) -> None:
    _check(ours["router"]["weight"], t[p + "gate.weight"].T)
    _check(ours["router"]["bias"], t[p + "gate.e_score_correction_bias"])
    for e in range(c.n_routed_experts):
        if p + "experts.gate_up_proj" in t:  # transformers' form in memory
            gate_up, down = t[p + "experts.gate_up_proj"][e], t[p + "experts.down_proj"][e]
            gate, up = np.split(gate_up, 2)
        else:
            gate, up, down = (
                t[f"{p}experts.{e}.{name}_proj.weight"] for name in ("gate", "up", "down")
            )
        _check(ours["experts"]["gate_up"][e, :, 0], gate.T)
        _check(ours["experts"]["gate_up"][e, :, 1], up.T)
        _check(ours["experts"]["down"][e], down.T)
    assert ("shared" in ours) == bool(c.n_shared_experts)
    if c.n_shared_experts:
        _check_mlp(ours["shared"], t, p + "shared_experts.")


def layer_of(params: Any, config: ModelConfig, i: int) -> Any:
    """Layer ``i``'s subtree on the host: main layers unstacked, then MTP layers."""
    if i >= config.num_hidden_layers:
        return jax.tree.map(np.asarray, params["mtp"][i - config.num_hidden_layers]["layer"])
    for segment, kinds in zip(config.segments, params["segments"], strict=True):
        size = segment.repeats * len(segment.kinds)
        if i < size:
            repeat, kind = divmod(i, len(segment.kinds))
            return jax.tree.map(lambda x, r=repeat: np.asarray(x)[r], kinds[kind])
        i -= size
    raise IndexError(i)
