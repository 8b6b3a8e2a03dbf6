"""The oracle: the whole score matrix and a stable sort of every row. For tests and reading, at any size that fits.

Forward only (a selection has no gradient).
"""

import jax
import jax.numpy as jnp

from pallas_kernels import cache_rows, paged


def _scores(q: jax.Array, k: jax.Array, weights: jax.Array) -> jax.Array:
    """[B, T, S]: sum_i weights[b, t, i] * relu(q[b, t, i] . k[b, s]) in float32."""
    q, k, weights = (x.astype(jnp.float32) for x in (q, k, weights))
    dots = jnp.einsum("btik,bsk->btis", q, k, precision="highest")
    return jnp.einsum("btis,bti->bts", jax.nn.relu(dots), weights, precision="highest")


def _best(scores: jax.Array, seen: jax.Array, topk: int) -> jax.Array:
    """[B, T, topk], best first; NaN and -inf count as not seen."""
    scores = jnp.where(seen & (scores > -jnp.inf), scores, -jnp.inf)
    scores = jnp.where(scores == 0, jnp.float32(0), scores)  # a sort puts -0 before +0
    order = jnp.argsort(-scores, axis=-1, stable=True)[..., :topk].astype(jnp.int32)
    return jnp.where(jnp.take_along_axis(scores, order, -1) > -jnp.inf, order, -1)


def index_topk(
    q: jax.Array, k: jax.Array, weights: jax.Array, topk: int, visible: jax.Array
) -> jax.Array:
    """See ``api.index_topk``."""
    seen = jnp.arange(k.shape[1], dtype=jnp.int32)[None, None] < visible[..., None]
    return _best(_scores(q, k, weights), seen, topk)


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
    batch, tokens, _, dim = q.shape
    past = cache_rows.decode(paged.layer_rows(cached, layer, pages), dim, jnp.float32)
    own = jnp.broadcast_to(own, (batch, *own.shape[1:]))
    keys = jnp.concatenate([past, cache_rows.decode(own, dim, jnp.float32)], 1)
    row = jnp.arange(past.shape[1], dtype=jnp.int32)[None, None]
    seen = jnp.broadcast_to(row < lengths[:, None, None], (batch, tokens, past.shape[1]))
    seen = jnp.concatenate([seen, paged.own_mask(spans, batch, tokens, own.shape[1])], -1)
    chosen = _best(_scores(q, keys, weights), seen, topk)
    ascending = jnp.sort(jnp.where(chosen < 0, keys.shape[1], chosen), -1)
    return jnp.where(ascending == keys.shape[1], -1, ascending)
