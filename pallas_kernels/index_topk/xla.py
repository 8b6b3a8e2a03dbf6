"""XLA backend: scores of a tile of queries at a time, and the selection from them.

Peak memory is O(T k) for the result and a tile's scores: a longer context makes tiles smaller, down to one query.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import cache_rows, paged
from pallas_kernels._implementation import on_accelerator
from pallas_kernels.index_topk.selection import select_indices, select_positions
from pallas_kernels.numerics import precision_of

# float32 products of queries and keys that exist at once on accelerators (docs/log.md, First GPU run)
PRODUCTS = 2**26


def scores_at_once() -> int:
    """How many scores a tile may have: on CPU what a second-level cache holds a few times over, else 64 MiB."""
    return 2**24 if on_accelerator() else 2**22


def index_scores(q: jax.Array, k: jax.Array, weights: jax.Array) -> jax.Array:
    """I[b, t, s] = sum_i weights[b, t, i] * relu(q[b, t, i] . k[b, s]), in float32 (spec 3.1).

    Args:
      q: [B, T, I, K].
      k: [B, S, K], one key shared by all index heads.
      weights: [B, T, I], signed, any scales already multiplied in.

    Returns:
      [B, T, S] float32.
    """
    batch, tokens, heads, _ = q.shape
    together = heads if tokens == 1 else _heads_together(batch * tokens * k.shape[1], heads)

    def split(x: jax.Array) -> jax.Array:
        groups = (batch, tokens, heads // together, together)
        return jnp.moveaxis(x.reshape(*groups, *x.shape[3:]), 2, 0)

    def some(
        total: jax.Array, q_and_weights: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        q_heads, weight = q_and_weights
        dots = jnp.einsum(
            "btik,bsk->btis",
            q_heads,
            k,
            precision=precision_of(q.dtype),
            preferred_element_type=jnp.float32,
        )
        return total + (jax.nn.relu(dots) * weight[..., None]).sum(2), None

    zeros = jnp.zeros((batch, tokens, k.shape[1]), jnp.float32)
    return lax.scan(some, zeros, (split(q), split(weights.astype(jnp.float32))))[0]


def _heads_together(scores: int, heads: int) -> int:
    """How many heads' products exist at once: [B, T, I, S] would be many times larger than the result."""
    if not on_accelerator():
        return 1  # more leave the cache
    return math.gcd(heads, 1 << max(0, (PRODUCTS // max(scores, 1)).bit_length() - 1))


def over_tiles(
    select: Callable[..., jax.Array],
    keys: int,
    budget: int,
    *per_token: jax.Array,
    multiple: int = 1,
) -> jax.Array:
    """``select`` of [B, T, ...] arrays, a tile of tokens after the other, so that a tile has at most ``budget`` scores.

    Args:
      select: arrays [B, tile, ...] -> [B, tile, k].
      keys: how many each token scores.
      budget: scores of a tile, or those of one token of each sequence if these are more.
      *per_token: split along T, in tiles of the same size; zeros fill the last one.
      multiple: what a tile's size is a multiple of.
    """
    batch, tokens = per_token[0].shape[:2]
    tile = max(1, budget // max(1, batch * keys) // multiple) * multiple
    if tile >= tokens:
        return select(*per_token)
    return _in_parts(select, 1, tile, *per_token)


def over_sequences(
    select: Callable[..., jax.Array],
    keys: int,
    budget: int,
    *per_sequence: jax.Array,
    multiple: int = 1,
) -> jax.Array:
    """``select`` of some sequences after the others, if the smallest tile of all of them has more than ``budget`` scores.

    Args:
      select: arrays [b, ...] -> [b, T, k], by ``over_tiles``.
      keys: how many each token scores.
      budget: scores of as many whole sequences as are taken at once, if more than one.
      *per_sequence: the first is [B, T, ...], the others [B, ...]; zeros fill the last part.
      multiple: as for ``over_tiles``.
    """
    batch, tokens = per_sequence[0].shape[:2]
    if batch * keys * min(tokens, multiple) <= budget:
        return select(*per_sequence)
    parts = -(-batch // max(1, budget // (keys * tokens)))
    return _in_parts(select, 0, -(-batch // parts), *per_sequence)


def _in_parts(
    select: Callable[..., jax.Array], axis: int, size: int, *arrays: jax.Array
) -> jax.Array:
    """``select`` of ``size`` of an axis at a time; zeros fill the last part."""
    length = arrays[0].shape[axis]
    parts = -(-length // size)
    if parts == 1:
        return select(*arrays)

    def split(x: jax.Array) -> jax.Array:
        more = [(0, parts * size - length if i == axis else 0) for i in range(x.ndim)]
        shape = (*x.shape[:axis], parts, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(jnp.pad(x, more).reshape(shape), axis, 0)

    chosen = lax.map(lambda some: select(*some), tuple(split(x) for x in arrays))
    chosen = lax.collapse(jnp.moveaxis(chosen, 0, axis), axis, axis + 2)
    return lax.slice_in_dim(chosen, 0, length, axis=axis)


def index_topk(
    q: jax.Array, k: jax.Array, weights: jax.Array, topk: int, visible: jax.Array
) -> jax.Array:
    """See ``api.index_topk``."""
    batch, keys = k.shape[:2]
    if not (visible.size and keys):
        return jnp.full((*visible.shape, min(topk, keys)), -1, jnp.int32)
    position = jnp.arange(keys, dtype=jnp.int32)[None, None]

    def some(
        q: jax.Array, weights: jax.Array, visible: jax.Array, sequence: jax.Array
    ) -> jax.Array:
        # By number: split like the others, all keys would be copied if zeros had to fill the last part.
        mine = k if q.shape[0] == batch else k[sequence]

        def select(q: jax.Array, weights: jax.Array, visible: jax.Array) -> jax.Array:
            scores = index_scores(q, mine, weights)
            return select_indices(jnp.where(position < visible[..., None], scores, -jnp.inf), topk)

        return over_tiles(select, keys, scores_at_once(), q, weights, visible)

    numbers = jnp.arange(batch, dtype=jnp.int32)
    return over_sequences(some, keys, scores_at_once(), q, weights, visible, numbers)


def step_scores(
    q: jax.Array,
    cached: jax.Array,
    layer: jax.Array | int,
    own: jax.Array,
    weights: jax.Array,
    lengths: jax.Array,
    pages: jax.Array | None = None,
    spans: jax.Array | None = None,
) -> jax.Array:
    """Scores [B, T, capacity + O] of a step's cached and own keys, -inf where not visible; see ``api.index_topk_step``."""
    batch, tokens, _, dim = q.shape
    if not paged.capacity_of(cached, pages):
        return own_scores(q, own, weights, spans)
    size, blocks = paged.blocks_of(cached, pages)

    def score(scores: jax.Array, first: jax.Array | int, rows: list[jax.Array]) -> jax.Array:
        seen = first + jnp.arange(size, dtype=jnp.int32)[None] < lengths[:, None]
        keys = cache_rows.decode(rows[0], dim, q.dtype)
        block = jnp.where(seen[:, None], index_scores(q, keys, weights), -jnp.inf)
        return lax.dynamic_update_slice_in_dim(scores, block, first, 2)

    unseen = jnp.full((batch, tokens, blocks * size), -jnp.inf, jnp.float32)
    past = paged.fold_rows(score, unseen, (cached,), layer, lengths, pages)
    # Cached rows precede the step's own, so that the tie rule is the one over a whole sequence.
    return jnp.concatenate(
        [past[..., : paged.capacity_of(cached, pages)], own_scores(q, own, weights, spans)],
        axis=-1,
    )


def own_scores(
    q: jax.Array, own: jax.Array, weights: jax.Array, spans: jax.Array | None
) -> jax.Array:
    """Scores [B, T, O] of a step's own keys, -inf where not visible."""
    batch, tokens, heads, dim = q.shape
    own = cache_rows.decode(own, dim, q.dtype)
    if own.shape[0] == batch:
        scores = index_scores(q, own, weights)
    else:  # all queries score all own keys, as one sequence
        flat = (1, batch * tokens, heads)
        scores = index_scores(q.reshape(*flat, -1), own, weights.reshape(flat))
        scores = scores.reshape(batch, tokens, -1)
    return jnp.where(paged.own_mask(spans, batch, tokens, own.shape[1]), scores, -jnp.inf)


def index_topk_step(
    q: jax.Array,
    cached: jax.Array,
    layer: jax.Array | int,
    own: jax.Array,
    weights: jax.Array,
    lengths: jax.Array,
    topk: int,
    pages: jax.Array | None,
    spans: jax.Array | None,
) -> jax.Array:
    """See ``api.index_topk_step``."""
    batch, tokens = q.shape[:2]
    if not batch * tokens:
        return jnp.full((batch, tokens, topk), -1, jnp.int32)
    keys = paged.capacity_of(cached, pages) + own.shape[1]

    def some(
        q: jax.Array, weights: jax.Array, spans: jax.Array, lengths: jax.Array, *mine: jax.Array
    ) -> jax.Array:
        table = mine[0] if q.shape[0] < batch else pages
        rows = own if own.shape[0] == 1 else mine[1]

        def select(q: jax.Array, weights: jax.Array, spans: jax.Array) -> jax.Array:
            scores = step_scores(q, cached, layer, rows, weights, lengths, table, spans)
            return select_positions(scores, topk)

        return over_tiles(select, keys, scores_at_once(), q, weights, spans)

    table, spans = paged.table_of(pages, batch), paged.spans_of(spans, batch, tokens)
    mine = (table,) if own.shape[0] == 1 else (table, own)
    return over_sequences(some, keys, scores_at_once(), q, weights, spans, lengths, *mine)
