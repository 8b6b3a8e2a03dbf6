"""XLA backend: index scores, and exact top-k as a mask or as indices.

Both selections break ties towards the lower position, and never select a score of -inf. Scores tie often:
ReLU makes the score exactly 0 for every key that all heads reject (spec 3.5).
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import cache_rows, paged
from pallas_kernels._implementation import on_accelerator
from pallas_kernels.numerics import precision_of

# On accelerators (docs/log.md, First GPU run):
PRODUCTS = 2**26  # float32 products of queries and keys that exist at once
SORTED = 2**19  # up to so many scores a sort selects faster than passes over them


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


def _positive_zero(scores: jax.Array) -> jax.Array:
    # Not ``scores + 0.0``: XLA drops that addition, and sorts -0.0 below 0.0.
    return jnp.where(scores == 0, jnp.zeros((), scores.dtype), scores)


def _ordered_bits(scores: jax.Array) -> jax.Array:
    """float32 -> uint32 whose unsigned order is the floats' order (+0 and -0 equal)."""
    bits = lax.bitcast_convert_type(_positive_zero(scores), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(0x80000000))


def _kth_largest(bits: jax.Array, k: int) -> jax.Array:
    """The k-th largest value of each row, [..., 1], found digit by digit from the top.

    Passes of compare-and-count over the row, which vectorise and stay in cache: several times faster on CPU than a sort or
    ``lax.top_k`` (docs/log.md, 2026-11-23), and the same for any k. On accelerators 16 passes of two bits each, unrolled: a
    loop's iterations cost more than its work there (docs/log.md, First GPU run).
    """
    width = 2 if on_accelerator() else 1

    def digit(i: jax.Array | int, threshold: jax.Array) -> jax.Array:
        shift = jnp.asarray(32 - width - width * i, jnp.uint32)
        best = jnp.zeros_like(threshold)
        for value in range(1, 1 << width):
            candidate = threshold | (jnp.uint32(value) << shift)
            count = (bits >= candidate).sum(-1, keepdims=True, dtype=jnp.int32)
            best = best + (count >= k).astype(jnp.uint32)
        return threshold | (best << shift)

    start = jnp.zeros((*bits.shape[:-1], 1), jnp.uint32)
    return lax.fori_loop(0, 32 // width, digit, start, unroll=on_accelerator())


def select_mask(scores: jax.Array, k: int) -> jax.Array:
    """True at the k largest finite scores of each row (all of them, if fewer), lowest position first on ties.

    Args:
      scores: [..., S] float32; -inf where the key is not visible. NaN is not allowed.
      k: how many to select.

    Returns:
      [..., S] bool.
    """
    visible = scores > -jnp.inf
    if k >= scores.shape[-1]:
        return visible
    bits = _ordered_bits(scores)
    kth = _kth_largest(bits, k)
    above, equal = bits > kth, bits == kth
    room = k - above.sum(-1, keepdims=True, dtype=jnp.int32)
    return (above | (equal & (jnp.cumsum(equal, -1, dtype=jnp.int32) <= room))) & visible


def select_indices(scores: jax.Array, k: int) -> jax.Array:
    """Positions of the k largest finite scores, best first, lowest position first on ties; -1 where there are fewer.

    Args:
      scores: [..., S] float32; -inf where the key is not visible.
      k: how many; the result has min(k, S) columns.

    Returns:
      [..., min(k, S)] int32.
    """
    values, index = lax.top_k(_positive_zero(scores), min(k, scores.shape[-1]))
    return jnp.where(values > -jnp.inf, index.astype(jnp.int32), -1)


def select_positions(scores: jax.Array, k: int) -> jax.Array:
    """``select_indices`` in ascending order of position: the mask, compacted.

    On CPU four times faster than ``lax.top_k``, whose order a softmax does not need (docs/log.md, 2026-11-23); on
    accelerators so for many scores only.

    Args:
      scores: [..., S] float32; -inf where the key is not visible.
      k: how many; the result has min(k, S) columns.

    Returns:
      [..., min(k, S)] int32, ascending, -1 after the last.
    """
    size = scores.shape[-1]
    k = min(k, size)
    if on_accelerator() and scores.size <= SORTED:
        index = select_indices(scores, k)
        ascending = jnp.sort(jnp.where(index < 0, size, index), axis=-1)
        return jnp.where(ascending == size, -1, ascending)
    mask = select_mask(scores, k).reshape(-1, size)
    # Every position writes: the chosen ones to their rank, the others to a spare column.
    target = jnp.where(mask, jnp.cumsum(mask, -1, dtype=jnp.int32) - 1, k)
    position = jnp.arange(size, dtype=jnp.int32)

    def compact(row: jax.Array) -> jax.Array:
        return jnp.full(k + 1, -1, jnp.int32).at[row].set(position, mode="promise_in_bounds")[:k]

    return jax.vmap(compact)(target).reshape(*scores.shape[:-1], k)


def index_topk(
    q: jax.Array, k: jax.Array, weights: jax.Array, topk: int, visible: jax.Array
) -> jax.Array:
    """See ``api.index_topk``."""
    scores = index_scores(q, k, weights)
    seen = jnp.arange(k.shape[1], dtype=jnp.int32)[None, None] < visible[..., None]
    return select_indices(jnp.where(seen, scores, -jnp.inf), topk)


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
    batch, tokens, heads, dim = q.shape
    size, blocks = paged.blocks_of(cached, pages)

    def score(scores: jax.Array, first: jax.Array | int, rows: list[jax.Array]) -> jax.Array:
        seen = first + jnp.arange(size, dtype=jnp.int32)[None] < lengths[:, None]
        keys = cache_rows.decode(rows[0], dim, q.dtype)
        block = jnp.where(seen[:, None], index_scores(q, keys, weights), -jnp.inf)
        return lax.dynamic_update_slice_in_dim(scores, block, first, 2)

    unseen = jnp.full((batch, tokens, blocks * size), -jnp.inf, jnp.float32)
    past = paged.fold_rows(score, unseen, (cached,), layer, lengths, pages)
    own = cache_rows.decode(own, dim, q.dtype)
    if own.shape[0] == batch:
        own_scores = index_scores(q, own, weights)
    else:  # all queries score all own keys, as one sequence
        flat = (1, batch * tokens, heads)
        own_scores = index_scores(q.reshape(*flat, -1), own, weights.reshape(flat))
        own_scores = own_scores.reshape(batch, tokens, -1)
    own_seen = paged.own_mask(spans, batch, tokens, own.shape[1])
    # Cached rows precede the step's own, so that the tie rule is the one over a whole sequence.
    return jnp.concatenate(
        [
            past[..., : paged.capacity_of(cached, pages)],
            jnp.where(own_seen, own_scores, -jnp.inf),
        ],
        axis=-1,
    )


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
    scores = step_scores(q, cached, layer, own, weights, lengths, pages, spans)
    return select_positions(scores, topk)
