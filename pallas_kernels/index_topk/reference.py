"""XLA backend: index scores, and exact top-k as a mask or as indices.

Both selections break ties towards the lower position, and never select a score of -inf. Scores tie often:
ReLU makes the score exactly 0 for every key that all heads reject (spec 3.5).
"""

import jax
import jax.numpy as jnp
from jax import lax


def index_scores(q: jax.Array, k: jax.Array, weights: jax.Array) -> jax.Array:
    """I[b, t, s] = sum_i weights[b, t, i] * relu(q[b, t, i] . k[b, s]), in float32 (spec 3.1).

    Args:
      q: [B, T, I, K].
      k: [B, S, K], one key shared by all index heads.
      weights: [B, T, I], signed, any scales already multiplied in.

    Returns:
      [B, T, S] float32.
    """
    batch, tokens, heads, dim = q.shape
    # One batched matmul with (t, i) as rows, rather than an einsum that might transpose the keys.
    dots = lax.dot_general(
        q.reshape(batch, tokens * heads, dim),
        k,
        (((2,), (2,)), ((0,), (0,))),
        precision=lax.Precision.HIGHEST if q.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    ).reshape(batch, tokens, heads, k.shape[1])
    return (jax.nn.relu(dots) * weights[..., None].astype(jnp.float32)).sum(2)


def _ordered_bits(scores: jax.Array) -> jax.Array:
    """float32 -> uint32 whose unsigned order is the floats' order (+0 and -0 equal)."""
    bits = lax.bitcast_convert_type(scores + jnp.float32(0.0), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(0x80000000))


def _kth_largest(bits: jax.Array, k: int) -> jax.Array:
    """The k-th largest value of each row, [..., 1], found four bits at a time from the top.

    A radix search needs eight passes of compare-and-count over the row, which vectorise; a sort does not.
    """
    threshold = jnp.zeros((*bits.shape[:-1], 1), jnp.uint32)
    digits = jnp.arange(1, 16, dtype=jnp.uint32)
    for shift in range(28, -1, -4):
        candidates = threshold | (digits << shift)
        enough = (bits[..., None, :] >= candidates[..., None]).sum(-1, dtype=jnp.int32) >= k
        threshold = threshold | (enough.sum(-1, keepdims=True, dtype=jnp.uint32) << shift)
    return threshold


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
    values, index = lax.top_k(scores + jnp.float32(0.0), min(k, scores.shape[-1]))
    return jnp.where(values > -jnp.inf, index.astype(jnp.int32), -1)


def index_topk(
    q: jax.Array, k: jax.Array, weights: jax.Array, topk: int, visible: jax.Array
) -> jax.Array:
    """See ``api.index_topk``."""
    scores = index_scores(q, k, weights)
    seen = jnp.arange(k.shape[1], dtype=jnp.int32) < visible[..., None]
    return select_indices(jnp.where(seen, scores, -jnp.inf), topk)
