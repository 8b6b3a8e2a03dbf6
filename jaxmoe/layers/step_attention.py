"""Core attention of one step: new tokens over cached rows and over each other.

The step never writes the cache: one softmax covers the cached rows and the step's own rows, which stay two
operands (architecture, idea 2).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.layers.indexer import IndexInputs
from pallas_kernels import cache_rows, native, paged
from pallas_kernels._implementation import on_accelerator
from pallas_kernels.index_topk import index_topk_step, select_mask, step_scores
from pallas_kernels.sparse_mla import sparse_mla_step
from pallas_kernels.sparse_mla.reference import Part, Softmax, accumulate, finish

# While the cache holds at most this many times topk rows, masking all of them is faster than gathering topk of them
# (measured on CPU). Several queries share a masked matmul, but each gathers rows of its own: where copies are what
# counts, on accelerators, as many times more rows pay as there are queries.
GATHER_FACTOR_DECODE = 2
GATHER_FACTOR_CHUNK = 4


class Sight(NamedTuple):
    """What the queries of a step may see (``pallas_kernels.paged``).

    Attributes:
      lengths: [B] int32, valid cached rows of each sequence.
      pages: [B, W] int32, the sequences' pages; None: page b for sequence b.
      spans: [B, T, 2] int32, first and end of the own rows that each query sees, where the own rows of all queries lie
        behind each other; None: query t sees 0..t of its sequence.
      tiles: [M, Q] int32, -1 for none. Then queries are taken from the step's N tokens Q of one sequence at a time, which
        share its rows, and B and T above are M and Q.
      places: [N] int32, the tokens' places among the M * Q queries.
    """

    lengths: jax.Array
    pages: jax.Array | None = None
    spans: jax.Array | None = None
    tiles: jax.Array | None = None
    places: jax.Array | None = None

    def tiled(self, tiles: jax.Array) -> "Sight":
        """The same for queries in tiles."""
        token, places = jnp.maximum(tiles, 0), jnp.zeros(self.lengths.shape[0], jnp.int32)
        order = jnp.arange(tiles.size, dtype=jnp.int32)
        target = jnp.where(tiles >= 0, tiles, places.shape[0]).reshape(-1)
        used = tiles >= 0
        return Sight(
            jnp.where(used[:, 0], self.lengths[token[:, 0]], 0),
            self.pages[token[:, 0]],
            jnp.where(used[..., None], self.spans[token, 0], 0),
            tiles,
            places.at[target].set(order, mode="drop"),
        )

    def queries(self, x: jax.Array) -> jax.Array:
        """What belongs to the step's tokens [B, T, ...], in tiles if there are any."""
        return x if self.tiles is None else x[:, 0].at[self.tiles].get(mode="clip")

    def tokens(self, x: jax.Array) -> jax.Array:
        """The inverse of ``queries``; what padding gets is arbitrary."""
        if self.tiles is None:
            return x
        return x.reshape(-1, *x.shape[2:]).at[self.places].get(mode="clip")[:, None]

    def own(self, rows: jax.Array) -> jax.Array:
        """The step's rows [B, T, size] as the kernels take them: [1, B * T, size] with spans."""
        return rows if self.spans is None else rows.reshape(1, -1, rows.shape[-1])

    def own_rows(self, batch: int, tokens: int) -> int:
        """How many own rows there are for a query to see."""
        if self.places is not None:
            return self.places.shape[0]
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


def in_place(dtype: Any) -> bool:
    """Whether the C++ kernels read cached rows where they lie, for queries of this type."""
    return dtype == jnp.float32 and native.available()


def selects_rows(
    topk: int | None, capacity: int, own: int, dtype: Any = jnp.float32, queries: int = 1
) -> bool:
    """Whether a step over a cache of ``capacity`` rows and ``own`` rows of its own selects by row rather than by mask.

    Each sequence, or tile of one, has ``queries`` queries.

    The C++ kernels read chosen rows where they lie, which is never more work than masking all; and a row list of the
    same rows gives the same bits, whatever the capacity.
    """
    if in_place(dtype):
        return True
    if topk is None or capacity + own <= topk:
        return False
    factor = GATHER_FACTOR_DECODE if own == 1 else GATHER_FACTOR_CHUNK
    if on_accelerator():
        factor = max(GATHER_FACTOR_DECODE, queries)
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
    new: jax.Array,
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
      new: [B, T, K] the step's own keys, as the cache stores them.
      sight: what causality allows.
      before: from ``nothing``, or another layer's.
      topk: how many.
    """
    own = sight.own(new)
    capacity = paged.capacity_of(cached, sight.pages)
    if capacity + own.shape[1] <= topk:
        return before
    q, weights = sight.queries(index.q), sight.queries(index.weights)
    operands = (q, cached, layer, own, weights, sight.lengths)
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


def _attend_masked(
    q: jax.Array,
    caches: tuple[jax.Array, ...],
    layer: jax.Array | int,
    own: Part,
    sight: Sight,
    visible: jax.Array,
    part_of: Callable[[list[jax.Array], jax.Array], Part],
    scale: float,
) -> jax.Array:
    """Attention over the cached rows that are ``visible`` [B, T, capacity] and over own ones, in one softmax.

    ``part_of`` makes a part of some rows of each cache and of which of them are visible.
    """
    size, blocks = paged.blocks_of(caches[0], sight.pages)
    short = blocks * size - visible.shape[-1]
    visible = jnp.pad(visible, ((0, 0), (0, 0), (0, short)))

    def body(softmax: Softmax, first: jax.Array | int, rows: list[jax.Array]) -> Softmax:
        seen = jax.lax.dynamic_slice_in_dim(visible, first, size, axis=2)
        part = part_of([_silence(x, seen) for x in rows], seen)
        return accumulate(softmax, q, part, scale)

    start = accumulate(None, q, own, scale)
    softmax = paged.fold_rows(body, start, caches, layer, sight.lengths, sight.pages)
    return finish(softmax, q.dtype)[0]


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
      new: [B, T, C] the step's own latent rows, as the cache stores them.
      sight: where they lie.
      selection: keys to attend to.
      scale: softmax scale.
      value_dim: V, the latent part of a row.

    Returns:
      [B, T, H, V].
    """
    own, q = sight.own(new), sight.queries(q)
    if selection.rows is not None:
        operands = (q, cached, layer, own, selection.rows)
        out, _ = sparse_mla_step(*operands, scale=scale, value_dim=value_dim, pages=sight.pages)
        return sight.tokens(out)

    def part_of(rows: list[jax.Array], seen: jax.Array) -> Part:
        kv = cache_rows.decode(rows[0], value_dim, q.dtype)
        kv = jnp.broadcast_to(kv, (q.shape[0], *kv.shape[1:]))
        return Part(kv, kv, seen)

    part = part_of([own], selection.own)
    out = _attend_masked(q, (cached,), layer, part, sight, selection.cached, part_of, scale)
    return sight.tokens(out[..., :value_dim])


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
      new: the step's own keys and values, each [B, T, G * K], as the cache stores them.
      sight: where they lie.
      visible: masks from ``everything``.
      scale: softmax scale.

    Returns:
      [B, T, H, K].
    """
    q = sight.queries(q)
    batch, tokens, heads, dim = q.shape
    groups = new[0].shape[2] // dim
    q = q.reshape(batch, tokens, groups, heads // groups, dim).transpose(0, 2, 1, 3, 4)

    def by_group(x: jax.Array) -> jax.Array:
        x = jnp.broadcast_to(x.astype(q.dtype), (batch, *x.shape[1:]))
        return x.reshape(batch, -1, groups, dim).swapaxes(1, 2)

    def part_of(rows: list[jax.Array], seen: jax.Array) -> Part:
        return Part(by_group(rows[0]), by_group(rows[1]), seen[:, None])

    own = part_of([sight.own(new[0]), sight.own(new[1])], visible.own)
    out = _attend_masked(q, cached, layer, own, sight, visible.cached, part_of, scale)
    out = out.transpose(0, 2, 1, 3, 4).reshape(batch, tokens, heads, dim)
    return sight.tokens(out)
