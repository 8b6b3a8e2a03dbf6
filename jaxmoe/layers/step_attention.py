"""Core attention of one step: new tokens over cached rows and over each other.

The step never writes the cache: one softmax covers the cached rows and the step's own rows, which stay two
operands (architecture, idea 2).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.layers.indexer import IndexInputs
from pallas_kernels import native
from pallas_kernels.index_topk import index_topk_step, select_mask, step_scores
from pallas_kernels.sparse_mla import sparse_mla_step
from pallas_kernels.sparse_mla.reference import Part, attend

# While the cache holds at most this many times topk rows, masking all of them is faster than gathering topk of them
# (measured on CPU). Several queries share a masked matmul, but each gathers rows of its own.
GATHER_FACTOR_DECODE = 2
GATHER_FACTOR_CHUNK = 4


class Selection(NamedTuple):
    """Which keys each query of a step attends to.

    Attributes:
      cached: [B, T, S] bool; or, where ``gathers``, [B, T, K] int32 rows: cache rows below S, then the step's own
        from S on; -1 for none.
      new: [B, T, T] bool over the step's own tokens; not read where ``gathers``.
    """

    cached: jax.Array
    new: jax.Array


def gathers(topk: int | None, capacity: int, tokens: int, dtype: Any = jnp.float32) -> bool:
    """Whether a step of ``tokens`` over a cache of ``capacity`` rows selects by index rather than by mask."""
    if topk is None or capacity + tokens <= topk:
        return False
    if dtype == jnp.float32 and native.available():
        return True  # it reads chosen rows where they lie: never more work than masking all
    factor = GATHER_FACTOR_DECODE if tokens == 1 else GATHER_FACTOR_CHUNK
    return capacity + tokens > factor * topk


def visible_mask(lengths: jax.Array, capacity: int, tokens: int) -> Selection:
    """Everything causality allows: cached rows below each sequence's length, own tokens up to the query."""
    cached = jnp.arange(capacity, dtype=jnp.int32)[None] < lengths[:, None]
    own = jnp.tril(jnp.ones((tokens, tokens), bool))
    batch = lengths.shape[0]
    return Selection(
        jnp.broadcast_to(cached[:, None], (batch, tokens, capacity)),
        jnp.broadcast_to(own[None], (batch, tokens, tokens)),
    )


def select(
    index: IndexInputs,
    cached: jax.Array,
    layer: jax.Array | int,
    lengths: jax.Array,
    visible: Selection,
    topk: int,
) -> Selection:
    """The topk best-scored keys among cached and new ones.

    Cached rows precede new ones, so the concatenated order is the order of positions and the tie rule
    (lowest position first) is the same as over a whole sequence.

    Args:
      index: the step's indexer inputs, T tokens.
      cached: [L, B, S, K] keys of all layers.
      layer: which of them; may be traced.
      lengths: [B] int32, valid cached rows.
      visible: from ``visible_mask``.
      topk: how many.
    """
    capacity, tokens = cached.shape[2], index.k.shape[1]
    if capacity + tokens <= topk:
        return visible
    operands = (index.q, cached, layer, index.k, index.weights, lengths)
    if gathers(topk, capacity, tokens, cached.dtype):
        return visible._replace(cached=index_topk_step(*operands, topk))
    mask = select_mask(step_scores(*operands), topk)
    return Selection(mask[..., :capacity], mask[..., capacity:])


def _silence(rows: jax.Array, valid: jax.Array) -> jax.Array:
    """Rows that no query may see, as zeros: what lies there may be NaN, which a weight of 0 would not silence.

    Fused into the copy that slicing a layer out of the cache makes anyway.
    """
    return jnp.where(valid.any(-2)[..., None], rows, jnp.zeros((), rows.dtype))


def latent_attention(
    q: jax.Array,
    cached: jax.Array,
    layer: jax.Array | int,
    new: jax.Array,
    selection: Selection,
    *,
    scale: float,
    value_dim: int,
) -> jax.Array:
    """Absorbed MLA attention of a step (spec 2.2).

    Args:
      q: [B, T, H, C] absorbed queries.
      cached: [L, B, S, C] latent rows of all layers.
      layer: which layer; may be traced.
      new: [B, T, C] the step's own latent rows.
      selection: keys to attend to.
      scale: softmax scale.
      value_dim: V, the latent part of a row.

    Returns:
      [B, T, H, V].
    """
    if selection.cached.dtype != jnp.bool_:
        rows = selection.cached
        return sparse_mla_step(q, cached, layer, new, rows, scale=scale, value_dim=value_dim)[0]
    rows = jax.lax.dynamic_index_in_dim(cached, layer, 0, keepdims=False)
    rows = _silence(rows, selection.cached)
    parts = [Part(rows, rows, selection.cached), Part(new, new, selection.new)]
    return attend(q, parts, scale)[0][..., :value_dim]


def grouped_query_attention(
    q: jax.Array,
    cached: tuple[jax.Array, jax.Array],
    layer: jax.Array | int,
    new: tuple[jax.Array, jax.Array],
    visible: Selection,
    *,
    scale: float,
) -> jax.Array:
    """Grouped-query attention of a step.

    Args:
      q: [B, T, H, K].
      cached: keys and values of all layers, each [L, B, S, G * K].
      layer: which layer; may be traced.
      new: the step's own keys and values, each [B, T, G, K].
      visible: from ``visible_mask``.
      scale: softmax scale.

    Returns:
      [B, T, H, K].
    """
    batch, tokens, heads, dim = q.shape
    groups = new[0].shape[2]
    q = q.reshape(batch, tokens, groups, heads // groups, dim).transpose(0, 2, 1, 3, 4)

    def rows(x: jax.Array) -> jax.Array:
        x = jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)
        x = _silence(x, visible.cached)
        return x.reshape(batch, -1, groups, dim).swapaxes(1, 2)

    past = Part(rows(cached[0]), rows(cached[1]), visible.cached[:, None])
    own = Part(new[0].swapaxes(1, 2), new[1].swapaxes(1, 2), visible.new[:, None])
    out, _ = attend(q, [past, own], scale)
    return out.transpose(0, 2, 1, 3, 4).reshape(batch, tokens, heads, dim)
