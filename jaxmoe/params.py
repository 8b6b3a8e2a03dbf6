"""The spec tree: one tree of ``Spec`` leaves from which everything about parameters is derived.

Initialisation, shardings, checkpoint targets, byte counts and Hugging Face names are functions of
``spec(config)`` (architecture, idea 1). Parameters themselves are a plain nested dict of arrays with
the same structure. Layers of one segment are stacked along a leading "layers" axis so that the model
scans over them.

Weights are stored [in, out], except where the absorbed attention form dictates otherwise:
``k_b`` is [heads, nope, latent] and ``v_b`` [heads, latent, value], the layouts in which both the
absorbed and the expanded form are transpose-free matmuls.
"""

import dataclasses
import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.config import LayerKind, ModelConfig
from quant.tensor import is_sefp

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Spec:
    """Declaration of one parameter.

    Attributes:
      shape: array shape.
      axes: one logical axis name (or None) per dimension; ``sharding.Rules`` maps them to mesh axes.
      init: "normal", "ones" or "zeros".
      dtype: fixed dtype, or None for the model's dtype. Router bias and the indexer's head weights are
        float32 whatever the model's dtype (spec 11, traps 8 and 20).
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"
    dtype: Any = None

    def stacked(self, count: int) -> "Spec":
        """This parameter for ``count`` layers, stacked on a new leading axis."""
        return dataclasses.replace(self, shape=(count, *self.shape), axes=("layers", *self.axes))


def _norm(size: int) -> dict[str, Spec]:
    return {"weight": Spec((size,), (None,), "ones")}


def _mla_spec(c: ModelConfig) -> dict[str, Any]:
    d, h, latent = c.hidden_size, c.num_attention_heads, c.kv_lora_rank
    q_in = d if c.q_lora_rank is None else c.q_lora_rank
    q_in_axis = "embed" if c.q_lora_rank is None else None
    tree: dict[str, Any] = {
        "q_b": {"weight": Spec((q_in, h, c.qk_head_dim), (q_in_axis, "heads", None))},
        "kv_a": {"weight": Spec((d, latent + c.qk_rope_head_dim), ("embed", None))},
        "kv_a_norm": _norm(latent),
        "k_b": {"weight": Spec((h, c.qk_nope_head_dim, latent), ("heads", None, None))},
        "v_b": {"weight": Spec((h, latent, c.v_head_dim), ("heads", None, None))},
        "o": {"weight": Spec((h, c.v_head_dim, d), ("heads", None, "embed"))},
    }
    if c.q_lora_rank is not None:
        tree["q_a"] = {"weight": Spec((d, c.q_lora_rank), ("embed", None))}
        tree["q_a_norm"] = _norm(c.q_lora_rank)
    if c.attention_bias:
        tree["kv_a"]["bias"] = Spec((latent + c.qk_rope_head_dim,), (None,), "zeros")
        tree["o"]["bias"] = Spec((d,), ("embed",), "zeros")
        if c.q_lora_rank is not None:
            tree["q_a"]["bias"] = Spec((c.q_lora_rank,), (None,), "zeros")
    return tree


def _gqa_spec(c: ModelConfig) -> dict[str, Any]:
    d, dim = c.hidden_size, c.head_dim
    heads = {"q": c.num_attention_heads, "k": c.num_key_value_heads, "v": c.num_key_value_heads}
    tree: dict[str, Any] = {
        name: {"weight": Spec((d, n, dim), ("embed", "heads" if name == "q" else "kv_heads", None))}
        for name, n in heads.items()
    }
    tree["o"] = {"weight": Spec((c.num_attention_heads, dim, d), ("heads", None, "embed"))}
    if c.attention_bias:
        for name, n in heads.items():
            tree[name]["bias"] = Spec(
                (n, dim), ("heads" if name == "q" else "kv_heads", None), "zeros"
            )
        tree["o"]["bias"] = Spec((d,), ("embed",), "zeros")
    return tree


def _indexer_spec(c: ModelConfig) -> dict[str, Any]:
    heads, dim = c.index_n_heads, c.index_head_dim
    return {
        "q_b": {"weight": Spec((c.q_lora_rank, heads, dim), (None, None, None))},
        "k": {"weight": Spec((c.hidden_size, dim), ("embed", None))},
        "k_norm": {**_norm(dim), "bias": Spec((dim,), (None,), "zeros")},
        "head_weights": {
            "weight": Spec((c.hidden_size, heads), ("embed", None), dtype=jnp.float32)
        },
    }


def _mlp_spec(c: ModelConfig, size: int, bias: bool = False) -> dict[str, Any]:
    # gate and up are one matmul; the axis of size 2 keeps tensor parallelism from splitting gate from up.
    tree = {
        "gate_up": {"weight": Spec((c.hidden_size, 2, size), ("embed", None, "mlp"))},
        "down": {"weight": Spec((size, c.hidden_size), ("mlp", "embed"))},
    }
    if bias:
        tree["gate_up"]["bias"] = Spec((2, size), (None, "mlp"), "zeros")
        tree["down"]["bias"] = Spec((c.hidden_size,), ("embed",), "zeros")
    return tree


def _moe_spec(c: ModelConfig) -> dict[str, Any]:
    e, d, f = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
    tree: dict[str, Any] = {
        "router": {
            "weight": Spec((d, e), ("embed", None)),
            "bias": Spec((e,), (None,), "zeros", dtype=jnp.float32),
        },
        "experts": {
            "gate_up": Spec((e, d, 2, f), ("expert", "embed", None, "expert_mlp")),
            "down": Spec((e, f, d), ("expert", "expert_mlp", "embed")),
        },
    }
    if c.n_shared_experts:
        tree["shared"] = _mlp_spec(c, f * c.n_shared_experts)
    return tree


def layer_spec(config: ModelConfig, kind: LayerKind) -> dict[str, Any]:
    """Spec tree of one decoder layer of the given kind (not stacked)."""
    tree = {
        "attention_norm": _norm(config.hidden_size),
        "attention": _mla_spec(config) if config.is_mla else _gqa_spec(config),
        "mlp_norm": _norm(config.hidden_size),
    }
    if kind.indexer == "full":
        tree["indexer"] = _indexer_spec(config)
    if kind.mlp == "moe":
        tree["moe"] = _moe_spec(config)
    else:
        tree["mlp"] = _mlp_spec(config, config.intermediate_size, config.mlp_bias)
    return tree


def spec(config: ModelConfig) -> Params:
    """The spec tree of a model.

    Returns:
      ``{"embed", "segments", "norm", ["lm_head"], ["mtp"]}``. ``segments[i][j]`` is the j-th layer kind of
      the i-th segment with all its repeats stacked; ``mtp`` is a list of multi-token-prediction modules.
    """
    d, v = config.hidden_size, config.vocab_size
    tree: Params = {
        "embed": {"weight": Spec((v, d), ("vocab", "embed"))},
        "segments": [
            [
                jax.tree.map(lambda s, n=segment.repeats: s.stacked(n), layer_spec(config, kind))
                for kind in segment.kinds
            ]
            for segment in config.segments
        ],
        "norm": _norm(d),
    }
    if not config.tie_word_embeddings:
        tree["lm_head"] = {"weight": Spec((d, v), ("embed", "vocab"))}
    if config.num_nextn_predict_layers:
        tree["mtp"] = [
            {
                "embed_norm": _norm(d),
                "hidden_norm": _norm(d),
                "proj": {"weight": Spec((2 * d, d), (None, "embed"))},
                "layer": layer_spec(config, config.mtp_kind),
                "norm": _norm(d),
            }
            for _ in range(config.num_nextn_predict_layers)
        ]
    return tree


# -- functions of the tree -------------------------------------------------------------------------


def path_name(path: tuple[Any, ...]) -> str:
    """A parameter's path as text, e.g. ``segments/1/0/moe/experts/down``."""
    return "/".join(str(getattr(p, "key", getattr(p, "idx", p))) for p in path)


def flatten(tree: Any) -> dict[str, Any]:
    """``{path name: leaf}`` in tree order; a parameter in SEFP is one leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_sefp)
    return {path_name(path): leaf for path, leaf in leaves}


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32, shardings: Any = None) -> Params:
    """The parameters as ``jax.ShapeDtypeStruct``s: restore targets, without allocating."""
    tree = spec(config)
    shardings = jax.tree.map(lambda _: None, tree) if shardings is None else shardings
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype or dtype, sharding=sharding),
        tree,
        shardings,
        is_leaf=lambda x: isinstance(x, Spec),
    )


# Normal leaves of at most this many elements are drawn together, in blocks: the random generator takes XLA a
# second per shape to compile. Larger ones are drawn in their own shape, which the compiler can shard.
_DRAWN_TOGETHER = 1 << 24
_BLOCK = 1024


def _tag(name: str) -> int:
    # crc32 is stable across processes and Python versions, unlike hash(); so a parameter's values depend
    # on the seed, its own name and shape alone.
    return zlib.crc32(name.encode())


def _draw_together(key: jax.Array, sizes: dict[str, int]) -> dict[str, jax.Array]:
    """``sizes[name]`` standard normal float32 numbers for each name, from one compiled generator."""
    blocks = [-(-size // _BLOCK) for size in sizes.values()]
    tags = np.repeat(np.asarray([_tag(name) for name in sizes], np.uint32), blocks)
    starts = np.cumsum([0, *blocks])[:-1]
    indices = np.arange(len(tags)) - np.repeat(starts, blocks)

    def draw(tag: jax.Array, index: jax.Array) -> jax.Array:
        block_key = jax.random.fold_in(jax.random.fold_in(key, tag), index)
        return jax.random.normal(block_key, (_BLOCK,), jnp.float32)

    values = jax.vmap(draw)(jnp.asarray(tags), jnp.asarray(indices, jnp.uint32)).reshape(-1)
    # Without the barrier the generator could be fused into, and compiled for, each of its uses.
    values = jax.lax.optimization_barrier(values)
    return {
        name: jax.lax.slice(values, (start * _BLOCK,), (start * _BLOCK + size,))
        for (name, size), start in zip(sizes.items(), starts.tolist(), strict=True)
    }


def _initial_values(config: ModelConfig, key: jax.Array, dtype: Any) -> Params:
    """Every leaf of ``spec(config)`` initialised; see ``init_params``."""
    tree = spec(config)
    leaves = flatten(tree)
    sizes = {name: math.prod(s.shape) for name, s in leaves.items() if s.init == "normal"}
    drawn = _draw_together(key, {name: n for name, n in sizes.items() if n <= _DRAWN_TOGETHER})

    def init(name: str, s: Spec) -> jax.Array:
        if s.init == "ones":
            return jnp.ones(s.shape, s.dtype or dtype)
        if s.init == "zeros":
            return jnp.zeros(s.shape, s.dtype or dtype)
        if name in drawn:
            values = drawn[name].reshape(s.shape)
        else:
            values = jax.random.normal(jax.random.fold_in(key, _tag(name)), s.shape, jnp.float32)
        return (values * config.initializer_range).astype(s.dtype or dtype)

    return jax.tree.unflatten(
        jax.tree.structure(tree), [init(name, s) for name, s in leaves.items()]
    )


def init_params(
    config: ModelConfig, key: jax.Array, *, dtype: Any = jnp.float32, shardings: Any = None
) -> Params:
    """Random parameters: normal with std ``config.initializer_range``, norms one, biases zero (V3 report 4.2).

    Args:
      config: the architecture.
      key: PRNG key, e.g. ``jax.random.key(0)``.
      dtype: dtype of all parameters whose spec fixes none.
      shardings: optional tree of shardings (``sharding.shardings``); arrays are created in place on the mesh.

    Example:
      >>> import jax, jaxmoe
      >>> params = jaxmoe.init_params(jaxmoe.presets["tiny"], jax.random.key(0))
      >>> params["embed"]["weight"].shape
      (320, 128)
    """
    if isinstance(key, int) or not hasattr(key, "dtype"):
        raise TypeError(f"key must be a JAX PRNG key; got {key!r}. Use jax.random.key({key!r}).")
    if shardings is None:
        return _builder(config, jnp.dtype(dtype))(key)
    build = functools.partial(_initial_values, config, dtype=dtype)
    return jax.jit(build, out_shardings=shardings)(key)


@functools.lru_cache(maxsize=8)
def _builder(config: ModelConfig, dtype: Any) -> Any:
    """Compiled once: a rank that reads a model again, because weights were lost, must not compile."""
    return jax.jit(functools.partial(_initial_values, config, dtype=dtype))


def cast(params: Params, config: ModelConfig, dtype: Any) -> Params:
    """``params`` with the leaves whose spec fixes no dtype in ``dtype``."""
    return jax.tree.map(lambda s, x: x.astype(s.dtype or dtype), spec(config), params)


def param_count(config: ModelConfig, *, include_mtp: bool = False) -> int:
    """Number of parameters of the main model; optionally with the multi-token-prediction modules' own weights.

    The router's correction bias counts: the released 671,877,944,064 for V3.2 includes it.
    """
    tree = spec(config)
    if not include_mtp:
        tree.pop("mtp", None)
    return sum(math.prod(s.shape) for s in jax.tree.leaves(tree))


def active_param_count(config: ModelConfig) -> int:
    """Parameters of the main model that one token's forward pass uses (embedding and head included)."""
    tree = spec(config)
    tree.pop("mtp", None)
    total = 0
    for name, s in flatten(tree).items():
        size = math.prod(s.shape)
        if "/experts/" in name:
            size = size * config.num_experts_per_tok // config.n_routed_experts
        total += size
    return total


def nbytes(config: ModelConfig, dtype: Any = jnp.bfloat16, *, include_mtp: bool = False) -> int:
    """Bytes of the parameters at ``dtype`` (leaves with a fixed dtype keep it)."""
    tree = spec(config)
    if not include_mtp:
        tree.pop("mtp", None)
    return sum(
        math.prod(s.shape) * np.dtype(s.dtype or dtype).itemsize for s in jax.tree.leaves(tree)
    )
