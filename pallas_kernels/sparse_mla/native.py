"""C++ backend for CPU: attends to the chosen rows where they lie, instead of gathering them first."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native
from pallas_kernels.sparse_mla import reference


def _call(q, cached, layer, own, rows, scale, value_dim):
    native.require(q, cached, own)
    results = (
        jax.ShapeDtypeStruct((*q.shape[:3], value_dim), q.dtype),
        jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
    )
    layer, rows = jnp.asarray(layer, jnp.int32), rows.astype(jnp.int32)
    return native.call(
        "jaxmoe_sparse_mla", results, q, cached, layer, own, rows, scale=np.float32(scale)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def sparse_mla(
    q: jax.Array, kv: jax.Array, indices: jax.Array, scale: float, value_dim: int
) -> tuple[jax.Array, jax.Array]:
    """See ``api.sparse_mla``."""
    none = jnp.zeros((kv.shape[0], 0, kv.shape[2]), kv.dtype)
    return _call(q, kv[None], 0, none, indices, scale, value_dim)


def _forward(q, kv, indices, scale, value_dim):
    return sparse_mla(q, kv, indices, scale, value_dim), (q, kv, indices)


def _backward(scale, value_dim, residuals, cotangents):
    q, kv, indices = residuals

    def differentiable(q, kv):
        return reference.sparse_mla(q, kv, indices, scale, value_dim)

    return *jax.vjp(differentiable, q, kv)[1](cotangents), None


sparse_mla.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def sparse_mla_step(
    q: jax.Array,
    cached: jax.Array,
    layer: jax.Array | int,
    own: jax.Array,
    rows: jax.Array,
    scale: float,
    value_dim: int,
) -> tuple[jax.Array, jax.Array]:
    """See ``api.sparse_mla_step``."""
    return _call(q, cached, layer, own, rows, scale, value_dim)


def _step_forward(q, cached, layer, own, rows, scale, value_dim):
    residuals = (q, cached, layer, own, rows)
    return sparse_mla_step(*residuals, scale, value_dim), residuals


def _step_backward(scale, value_dim, residuals, cotangents):
    q, cached, layer, own, rows = residuals

    def differentiable(q, cached, own):
        return reference.sparse_mla_step(q, cached, layer, own, rows, scale, value_dim)

    d_q, d_cached, d_own = jax.vjp(differentiable, q, cached, own)[1](cotangents)
    return d_q, d_cached, None, d_own, None


sparse_mla_step.defvjp(_step_forward, _step_backward)
