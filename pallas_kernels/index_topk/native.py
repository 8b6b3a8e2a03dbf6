"""C++ backend for CPU: one query at a time, so that scores never exist as [queries, keys]."""

import jax
import jax.numpy as jnp

from pallas_kernels import native, paged


def _call(q, cached, layer, own, weights, visible, spans, pages, topk, *, best_first):
    native.require(q, stored=(cached, own))
    weights = weights.astype(jnp.float32)
    result = jax.ShapeDtypeStruct((*q.shape[:2], topk), jnp.int32)
    layer = jnp.asarray(layer, jnp.int32)
    return native.call(
        "jaxmoe_index_topk",
        result,
        *(q, cached, layer, own, weights, visible, spans, paged.table_of(pages, q.shape[0])),
        best_first=best_first,
    )


def index_topk(
    q: jax.Array, k: jax.Array, weights: jax.Array, topk: int, visible: jax.Array
) -> jax.Array:
    """See ``api.index_topk``."""
    topk = min(topk, k.shape[1])
    none = jnp.zeros((k.shape[0], 0, k.shape[2]), k.dtype)
    spans = jnp.zeros((*q.shape[:2], 2), jnp.int32)
    visible = visible.astype(jnp.int32)
    return _call(q, k[None], 0, none, weights, visible, spans, None, topk, best_first=True)


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
    visible = jnp.broadcast_to(lengths.astype(jnp.int32)[:, None], q.shape[:2])
    spans = paged.spans_of(spans, *q.shape[:2])
    return _call(q, cached, layer, own, weights, visible, spans, pages, topk, best_first=False)
