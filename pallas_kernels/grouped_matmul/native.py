"""C++ backend for CPU: few rows per group read each matrix once, in place; many are multiplied in register tiles."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import native
from pallas_kernels.grouped_matmul import weights
from pallas_kernels.grouped_matmul.weights import Weights


def _rows_times_groups(x, w, group_sizes, group_offset, *, transpose: bool) -> jax.Array:
    result = jax.ShapeDtypeStruct((x.shape[0], w.shape[1 if transpose else 2]), x.dtype)
    operands = (x, w, group_sizes, group_offset)
    return native.call("jaxmoe_grouped_matmul", result, *operands, transpose=transpose)


@jax.custom_vjp
def _grouped_matmul(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, group_offset: jax.Array
) -> jax.Array:
    return _rows_times_groups(x, w, group_sizes, group_offset, transpose=False)


def _forward(x, w, group_sizes, group_offset):
    return _grouped_matmul(x, w, group_sizes, group_offset), (x, w, group_sizes, group_offset)


def _backward(residuals, dy):
    x, w, group_sizes, group_offset = residuals
    dx = _rows_times_groups(dy, w, group_sizes, group_offset, transpose=True)
    used = jax.ShapeDtypeStruct((group_sizes.shape[0], *w.shape[1:]), w.dtype)
    dw = native.call("jaxmoe_grouped_outer", used, x, dy, group_sizes)
    if used.shape != w.shape:
        dw = lax.dynamic_update_slice_in_dim(jnp.zeros_like(w), dw, group_offset, 0)
    return dx, dw, None, None


_grouped_matmul.defvjp(_forward, _backward)


def grouped_matmul(
    x: jax.Array, w: Weights, group_sizes: jax.Array, group_offset: jax.Array | int
) -> jax.Array:
    """See ``api.grouped_matmul``."""
    weights.require_array(w)
    native.require(x, w)
    return _grouped_matmul(x, w, group_sizes, jnp.asarray(group_offset, jnp.int32))
