"""Attention layers: multi-head latent attention and grouped-query attention (spec 2, 3).

Each comes as two forms of the same function: ``*_sequence`` over a whole sequence (MLA's expanded form, or the absorbed one
where each query reads few rows) and ``*_step`` over a cache (MLA's absorbed form). Both also return the rows to cache.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from jaxmoe.config import ModelConfig
from jaxmoe.layers import core_attention, sparse_attention, step_attention
from jaxmoe.layers.indexer import IndexInputs, index_inputs, spread
from jaxmoe.layers.linear import dense, linear, per_head
from jaxmoe.layers.norm import rms_norm
from jaxmoe.layers.rope import Rotation, rotate
from pallas_kernels import cache_rows

# Both low-rank norms use this constant in every released model; rms_norm_eps does not apply (spec 2.1).
LATENT_NORM_EPS = 1e-6

Entries = dict[str, jax.Array]


class _Projected(NamedTuple):
    """q_nope [B, T, H, N], q_rope [B, T, H, R], latent [B, T, C] normalised, k_rope [B, T, R] rotated."""

    q_nope: jax.Array
    q_rope: jax.Array
    latent: jax.Array
    k_rope: jax.Array
    q_latent: jax.Array


def _mla_project(p: dict, config: ModelConfig, x: jax.Array, r: Rotation) -> _Projected:
    q_latent = x
    if config.q_lora_rank is not None:
        q_latent = rms_norm(linear(x, p["q_a"]), p["q_a_norm"], LATENT_NORM_EPS)
    q_nope, q_rope = jnp.split(linear(q_latent, p["q_b"]), [config.qk_nope_head_dim], axis=-1)
    latent, k_rope = jnp.split(linear(x, p["kv_a"]), [config.kv_lora_rank], axis=-1)
    return _Projected(
        q_nope,
        rotate(q_rope, r, interleave=config.rope_interleave),
        rms_norm(latent, p["kv_a_norm"], LATENT_NORM_EPS),
        rotate(k_rope, r, interleave=config.rope_interleave),
        q_latent,
    )


def _index(
    p: dict, config: ModelConfig, x: jax.Array, q_latent: jax.Array, r: Rotation
) -> IndexInputs | None:
    if "indexer" not in p:
        return None
    # Detached inputs: the indexer's loss must not reach the model, nor the model's loss the indexer (spec 4.1).
    x, q_latent = lax.stop_gradient((x, q_latent))
    with jax.named_scope("indexer"):
        return index_inputs(p["indexer"], config, x, q_latent, r)


def _entries(projected: _Projected, index: IndexInputs | None) -> Entries:
    entries = {"latent": jnp.concatenate([projected.latent, projected.k_rope], axis=-1)}
    return entries if index is None else entries | {"index_k": index.k}


def _stored(config: ModelConfig, entries: Entries, cached: Entries) -> Entries:
    """Entries as the cache stores them: a step sees its own rows as later steps will."""
    values = {"latent": config.kv_lora_rank}
    return {
        name: cache_rows.encode(rows, values.get(name, rows.shape[-1]), cached[name].dtype)
        for name, rows in entries.items()
    }


class Whole(NamedTuple):
    """What the queries of whole sequences may see, and how attention is computed.

    Attributes:
      selection: an earlier layer's selection, for a layer that shares it.
      starts: [B, T] int32, first row of each query's document; None: one document.
      valid: [B] bool, sequences that count in the index loss and recall; default all.
      gathered: attend by row (``sparse_attention``) rather than masked.
      mesh: the devices, for ``sparse_attention``.
    """

    selection: jax.Array | None = None
    starts: jax.Array | None = None
    valid: jax.Array | None = None
    gathered: bool = False
    mesh: Mesh | None = None


def _expanded(a: dict, projected: _Projected) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values of every head (spec 2.1)."""
    # In SEFP the groups of k_b lie along what the absorbed form contracts, so that here it is decoded.
    k_nope = linear(projected.latent, {"weight": dense(a["k_b"]["weight"]).transpose(2, 0, 1)})
    v = linear(projected.latent, {"weight": dense(a["v_b"]["weight"]).swapaxes(0, 1)})
    size = projected.k_rope.shape[-1]
    k_rope = jnp.broadcast_to(projected.k_rope[:, :, None], (*k_nope.shape[:3], size))
    q = jnp.concatenate([projected.q_nope, projected.q_rope], axis=-1)
    return q, jnp.concatenate([k_nope, k_rope], axis=-1), v


def _absorbed(a: dict, projected: _Projected) -> jax.Array:
    """Queries of every head in the space of the cached rows (spec 2.2)."""
    q_latent = per_head(projected.q_nope, a["k_b"]["weight"])
    return jnp.concatenate([q_latent, projected.q_rope], axis=-1)


def mla_sequence(
    p: dict,
    config: ModelConfig,
    x: jax.Array,
    r: Rotation,
    options: core_attention.Options,
    whole: Whole,
) -> tuple[jax.Array, Entries, core_attention.Result]:
    """MLA over a whole sequence.

    Args:
      p: layer parameters, with "attention" and, for a layer with an indexer, "indexer".
      config: the model.
      x: [B, T, D], normalised.
      r: rotation at the tokens' positions.
      options: static choices of the core.
      whole: what queries see; decides between the expanded (MHA) and the absorbed form.

    Returns:
      (output [B, T, D], rows to cache, core result).
    """
    a = p["attention"]
    projected = _mla_project(a, config, x, r)
    index = _index(p, config, x, projected.q_latent, r)
    entries = _entries(projected, index)
    seen = {
        "index": index,
        "selection": whole.selection,
        "starts": whole.starts,
        "valid": whole.valid,
    }
    if whole.gathered:
        core = sparse_attention.sparse_attention(
            _absorbed(a, projected),
            entries["latent"],
            options,
            value_dim=config.kv_lora_rank,
            mesh=whole.mesh,
            **seen,
        )
        core = core._replace(out=per_head(core.out, a["v_b"]["weight"]))
    else:
        core = core_attention.causal_attention(*_expanded(a, projected), options, **seen)
    return linear(core.out, a["o"], contract=2), entries, core


def mla_step(
    p: dict,
    config: ModelConfig,
    x: jax.Array,
    r: Rotation,
    cached: Entries,
    sight: step_attention.Sight,
    layer: jax.Array | int,
    index_layer: jax.Array | int,
    selection: step_attention.Selection,
) -> tuple[jax.Array, Entries, step_attention.Selection]:
    """MLA in absorbed (MQA) form: T new tokens over the cache and each other.

    Args:
      p: layer parameters.
      config: the model.
      x: [B, T, D], normalised.
      r: rotation at the new tokens' positions.
      cached: "latent" [L, P, S, C] and, with an indexer, "index_k" [L', P, S, K], of all layers, in a format of
        ``pallas_kernels.cache_rows``.
      sight: what the tokens may see.
      layer: this layer's row in "latent".
      index_layer: this layer's row in "index_k", if it has an indexer.
      selection: what the previous layer attended to, used if this layer shares it.

    Returns:
      (output [B, T, D], rows to cache in its format, selection).
    """
    a = p["attention"]
    projected = _mla_project(a, config, x, r)
    index = _index(p, config, x, projected.q_latent, r)
    if index is not None and cached["index_k"].dtype == jnp.uint8:
        index = spread(index)
    entries = _stored(config, _entries(projected, index), cached)
    if index is not None:
        keys = (cached["index_k"], index_layer, entries["index_k"])
        selection = step_attention.select(index, *keys, sight, selection, config.index_topk)
    out = step_attention.latent_attention(
        _absorbed(a, projected),
        cached["latent"],
        layer,
        entries["latent"],
        sight,
        selection,
        scale=config.softmax_scale,
        value_dim=config.kv_lora_rank,
    )
    heads = per_head(out, a["v_b"]["weight"])
    return linear(heads, a["o"], contract=2), entries, selection


def _gqa_project(p: dict, config: ModelConfig, x: jax.Array, r: Rotation) -> tuple[jax.Array, ...]:
    rotated = (rotate(linear(x, p[n]), r, interleave=config.rope_interleave) for n in ("q", "k"))
    return (*rotated, linear(x, p["v"]))


def _gqa_entries(k: jax.Array, v: jax.Array) -> Entries:
    return {"k": k.reshape(*k.shape[:2], -1), "v": v.reshape(*v.shape[:2], -1)}


def gqa_sequence(
    p: dict,
    config: ModelConfig,
    x: jax.Array,
    r: Rotation,
    options: core_attention.Options,
    whole: Whole,
) -> tuple[jax.Array, Entries, core_attention.Result]:
    """Grouped-query attention over a whole sequence; see ``mla_sequence``."""
    q, k, v = _gqa_project(p["attention"], config, x, r)
    core = core_attention.causal_attention(q, k, v, options, starts=whole.starts)
    return linear(core.out, p["attention"]["o"], contract=2), _gqa_entries(k, v), core


def gqa_step(
    p: dict,
    config: ModelConfig,
    x: jax.Array,
    r: Rotation,
    cached: Entries,
    sight: step_attention.Sight,
    layer: jax.Array | int,
    visible: step_attention.Selection,
) -> tuple[jax.Array, Entries]:
    """Grouped-query attention of T new tokens over the cache and each other; see ``mla_step``."""
    q, k, v = _gqa_project(p["attention"], config, x, r)
    entries = _stored(config, _gqa_entries(k, v), cached)
    out = step_attention.grouped_query_attention(
        q,
        (cached["k"], cached["v"]),
        layer,
        (entries["k"], entries["v"]),
        sight,
        visible,
        scale=config.softmax_scale,
    )
    return linear(out, p["attention"]["o"], contract=2), entries


def entry_sizes(config: ModelConfig, dtype: Any = jnp.float32) -> dict[str, int]:
    """Elements of a cache of ``dtype`` per token and layer, by entry name."""
    if not config.is_mla:
        size: Any = config.num_key_value_heads * config.head_dim
        return {"k": size, "v": size}
    latent, key = config.kv_lora_rank, config.index_head_dim
    sizes = {"latent": cache_rows.stored_size(latent + config.qk_rope_head_dim, latent, dtype)}
    if config.index_topk is None:
        return sizes
    return sizes | {"index_k": cache_rows.stored_size(key, key, dtype)}
