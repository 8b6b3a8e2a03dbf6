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

PRODUCTS = (
    2**26
)  # float32 products of queries and keys that exist at once on accelerators (docs/log.md, First GPU run)


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
        return jnp.moveaxis(x.reshape(batch, tokens, -1, together, *x.shape[3:]), 2, 0)

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
    tiles = -(-tokens // tile)

    def split(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, tiles * tile - tokens)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, tiles, tile, *x.shape[2:]), 1, 0)

    chosen = lax.map(lambda some: select(*some), tuple(split(x) for x in per_token))
    return jnp.moveaxis(chosen, 0, 1).reshape(batch, tiles * tile, -1)[:, :tokens]


def index_topk(
    q: jax.Array, k: jax.Array, weights: jax.Array, topk: int, visible: jax.Array
) -> jax.Array:
    """See ``api.index_topk``."""
    keys = k.shape[1]
    if q.shape[0] > 1 and q.shape[0] * keys > scores_at_once():
        return lax.map(
            lambda one: index_topk(*(x[None] for x in one[:3]), topk, one[3][None])[0],
            (q, k, weights, visible),
        )
    position = jnp.arange(keys, dtype=jnp.int32)[None, None]

    def select(q: jax.Array, weights: jax.Array, visible: jax.Array) -> jax.Array:
        scores = index_scores(q, k, weights)
        return select_indices(jnp.where(position < visible[..., None], scores, -jnp.inf), topk)

    return over_tiles(select, keys, scores_at_once(), q, weights, visible)


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
    keys = paged.capacity_of(cached, pages) + own.shape[1]
    spans = paged.spans_of(spans, *q.shape[:2])
    if q.shape[0] > 1 and q.shape[0] * keys > scores_at_once():
        table = paged.table_of(pages, q.shape[0])
        shared = own.shape[0] == 1

        def one(each: tuple[jax.Array, ...]) -> jax.Array:
            q, weights, lengths, table, spans, *mine = (x[None] for x in each)
            rows = own if shared else mine[0]
            return index_topk_step(q, cached, layer, rows, weights, lengths, topk, table, spans)[0]

        return lax.map(one, (q, weights, lengths, table, spans, *(() if shared else (own,))))

    def select(q: jax.Array, weights: jax.Array, spans: jax.Array) -> jax.Array:
        scores = step_scores(q, cached, layer, own, weights, lengths, pages, spans)
        return select_positions(scores, topk)

    return over_tiles(select, keys, scores_at_once(), q, weights, spans)
