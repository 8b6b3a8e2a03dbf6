"""C++ backend for CPU: attends to the chosen rows where they lie, instead of gathering them first."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native, paged
from pallas_kernels.sparse_mla import gradient


def _call(q, cached, layer, own, rows, pages, scale, value_dim):
    native.require(q, stored=(cached, own))
    results = (
        jax.ShapeDtypeStruct((*q.shape[:3], value_dim), q.dtype),
        jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
    )
    layer, rows = jnp.asarray(layer, jnp.int32), rows.astype(jnp.int32)
    operands = (q, cached, layer, own, rows, paged.table_of(pages, q.shape[0]))
    return native.call("jaxmoe_sparse_mla", results, *operands, scale=np.float32(scale))


@gradient.differentiable
def sparse_mla(
    q: jax.Array, kv: jax.Array, indices: jax.Array, scale: float, value_dim: int
) -> tuple[jax.Array, jax.Array]:
    """See ``api.sparse_mla``."""
    none = jnp.zeros((kv.shape[0], 0, kv.shape[2]), kv.dtype)
    return _call(q, kv[None], 0, none, indices, None, scale, value_dim)


@gradient.differentiable_step
def sparse_mla_step(
    q: jax.Array,
    cached: jax.Array,
    layer: jax.Array | int,
    own: jax.Array,
    rows: jax.Array,
    pages: jax.Array | None,
    scale: float,
    value_dim: int,
) -> tuple[jax.Array, jax.Array]:
    """See ``api.sparse_mla_step``."""
    return _call(q, cached, layer, own, rows, pages, scale, value_dim)
