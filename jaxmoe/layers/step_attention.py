"""Core attention of one step: new tokens over cached rows and over each other.

The step never writes the cache: one softmax covers the cached rows and the step's own rows, which stay two
operands (architecture, idea 2).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.layers.indexer import IndexInputs
from pallas_kernels import native, paged
from pallas_kernels.index_topk import index_topk_step, select_mask, step_scores
from pallas_kernels.sparse_mla import sparse_mla_step
from pallas_kernels.sparse_mla.reference import Part, attend

# While the cache holds at most this many times topk rows, masking all of them is faster than gathering topk of them
# (measured on CPU). Several queries share a masked matmul, but each gathers rows of its own.
GATHER_FACTOR_DECODE = 2
GATHER_FACTOR_CHUNK = 4


class Sight(NamedTuple):
    """What the queries of a step may see (``pallas_kernels.paged``).

    Attributes:
      lengths: [B] int32, valid cached rows of each sequence.
      pages: [B, W] int32, the sequences' pages; None: page b for sequence b.
      spans: [B, T, 2] int32, first and end of the own rows that each query sees, where the own rows of all queries lie
        behind each other; None: query t sees 0..t of its sequence.
    """

    lengths: jax.Array
    pages: jax.Array | None = None
    spans: jax.Array | None = None

    def own(self, rows: jax.Array) -> jax.Array:
        """The step's rows [B, T, size] as the kernels take them: [1, B * T, size] with spans."""
        return rows if self.spans is None else rows.reshape(1, -1, rows.shape[-1])

    def own_rows(self, batch: int, tokens: int) -> int:
        """How many own rows there are for a query to see."""
        return tokens if self.spans is None else batch * tokens

    def positions(self, batch: int, tokens: int) -> jax.Array:
        """[B, T] int32: positions of the step's tokens in their sequences."""
        spans = paged.spans_of(self.spans, batch, tokens)
        return self.lengths[:, None] + spans[..., 1] - spans[..., 0] - 1


class Selection(NamedTuple):
    """Which keys each query of a step attends to: by row, or by mask.

    Attributes:
      rows: [B, T, K] int32: cached rows below the capacity, from there on the step's own; -1 for none.
      cached: [B, T, capacity] bool.
      own: [B, T, O] bool.
    """

    rows: jax.Array | None
    cached: jax.Array | None = None
    own: jax.Array | None = None


def selects_rows(topk: int | None, capacity: int, own: int, dtype: Any = jnp.float32) -> bool:
    """Whether a step over a cache of ``capacity`` rows and ``own`` rows of its own selects by row rather than by mask.

    The C++ kernels read chosen rows where they lie, which is never more work than masking all; and a row list of the
    same rows gives the same bits, whatever the capacity.
    """
    if dtype == jnp.float32 and native.available():
        return True
    if topk is None or capacity + own <= topk:
        return False
    factor = GATHER_FACTOR_DECODE if own == 1 else GATHER_FACTOR_CHUNK
    return capacity + own > factor * topk


def everything(sight: Sight, capacity: int, tokens: int, *, by_row: bool) -> Selection:
    """Every key that causality allows: cached rows below each sequence's length, own tokens up to the query."""
    batch = sight.lengths.shape[0]
    row = jnp.arange(capacity, dtype=jnp.int32)
    cached = jnp.broadcast_to(
        (row[None] < sight.lengths[:, None])[:, None], (batch, tokens, capacity)
    )
    number = sight.own_rows(batch, tokens)
    own = paged.own_mask(sight.spans, batch, tokens, number)
    if not by_row:
        return Selection(None, cached, own)
    seen = jnp.concatenate([cached, own], axis=-1)
    every = jnp.arange(capacity + number, dtype=jnp.int32)
    return Selection(jnp.where(seen, every[None, None], -1))


def nothing(
    sight: Sight, topk: int | None, capacity: int, tokens: int, *, by_row: bool
) -> Selection:
    """What a layer's selection is before any layer has selected: everything, unless each will select."""
    batch = sight.lengths.shape[0]
    number = sight.own_rows(batch, tokens)
    if topk is None or capacity + number <= topk or not by_row:
        return everything(sight, capacity, tokens, by_row=by_row)
    return Selection(jnp.full((batch, tokens, topk), -1, jnp.int32))


def select(
    index: IndexInputs,
    cached: jax.Array,
    layer: jax.Array | int,
    sight: Sight,
    before: Selection,
    topk: int,
) -> Selection:
    """The topk best-scored keys among cached and own ones.

    Cached rows precede own ones, so the order of rows is the order of positions and the tie rule (lowest position
    first) is the same as over a whole sequence.

    Args:
      index: the step's indexer inputs.
      cached: [L, P, S, K] keys of all layers.
      layer: which of them; may be traced.
      sight: what causality allows.
      before: from ``nothing``, or another layer's.
      topk: how many.
    """
    own = sight.own(index.k)
    capacity = paged.capacity_of(cached, sight.pages)
    if capacity + own.shape[1] <= topk:
        return before
    operands = (index.q, cached, layer, own, index.weights, sight.lengths)
    if before.rows is not None:
        rows = index_topk_step(*operands, topk, pages=sight.pages, spans=sight.spans)
        return Selection(rows)
    mask = select_mask(step_scores(*operands, sight.pages, sight.spans), topk)
    return Selection(None, mask[..., :capacity], mask[..., capacity:])


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
    sight: Sight,
    selection: Selection,
    *,
    scale: float,
    value_dim: int,
) -> jax.Array:
    """Absorbed MLA attention of a step (spec 2.2).

    Args:
      q: [B, T, H, C] absorbed queries.
      cached: [L, P, S, C] latent rows of all layers.
      layer: which layer; may be traced.
      new: [B, T, C] the step's own latent rows.
      sight: where they lie.
      selection: keys to attend to.
      scale: softmax scale.
      value_dim: V, the latent part of a row.

    Returns:
      [B, T, H, V].
    """
    own = sight.own(new)
    if selection.rows is not None:
        operands = (q, cached, layer, own, selection.rows)
        return sparse_mla_step(*operands, scale=scale, value_dim=value_dim, pages=sight.pages)[0]
    rows = _silence(paged.layer_rows(cached, layer, sight.pages), selection.cached)
    own = jnp.broadcast_to(own, (q.shape[0], *own.shape[1:]))
    parts = [Part(rows, rows, selection.cached), Part(own, own, selection.own)]
    return attend(q, parts, scale)[0][..., :value_dim]


def grouped_query_attention(
    q: jax.Array,
    cached: tuple[jax.Array, jax.Array],
    layer: jax.Array | int,
    new: tuple[jax.Array, jax.Array],
    sight: Sight,
    visible: Selection,
    *,
    scale: float,
) -> jax.Array:
    """Grouped-query attention of a step.

    Args:
      q: [B, T, H, K].
      cached: keys and values of all layers, each [L, P, S, G * K].
      layer: which layer; may be traced.
      new: the step's own keys and values, each [B, T, G * K].
      sight: where they lie.
      visible: masks from ``everything``.
      scale: softmax scale.

    Returns:
      [B, T, H, K].
    """
    batch, tokens, heads, dim = q.shape
    groups = new[0].shape[2] // dim
    q = q.reshape(batch, tokens, groups, heads // groups, dim).transpose(0, 2, 1, 3, 4)

    def by_group(x: jax.Array) -> jax.Array:
        x = jnp.broadcast_to(x, (batch, *x.shape[1:]))
        return x.reshape(batch, -1, groups, dim).swapaxes(1, 2)

    def past(x: jax.Array) -> jax.Array:
        return by_group(_silence(paged.layer_rows(x, layer, sight.pages), visible.cached))

    parts = [
        Part(past(cached[0]), past(cached[1]), visible.cached[:, None]),
        Part(by_group(sight.own(new[0])), by_group(sight.own(new[1])), visible.own[:, None]),
    ]
    out, _ = attend(q, parts, scale)
    return out.transpose(0, 2, 1, 3, 4).reshape(batch, tokens, heads, dim)
