"""C++ backend for CPU: few rows per group read each matrix once, in place; many are multiplied in register tiles.

Matrices in SEFP are multiplied from their stored bits.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import native
from pallas_kernels.fp8 import Fp8Block
from pallas_kernels.grouped_matmul import xla
from pallas_kernels.grouped_matmul.weights import Weights
from pallas_kernels.sefp import native as sefp
from pallas_kernels.sefp.format import Sefp


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


@jax.custom_vjp
def _grouped_sefp(
    x: jax.Array, w: Sefp, group_sizes: jax.Array, group_offset: jax.Array
) -> jax.Array:
    return sefp.rows_times_groups(x, w, group_sizes, group_offset)


def _sefp_backward(residuals, dy):
    w, group_sizes, group_offset = residuals
    dx = xla.rows_times_groups(dy, w, group_sizes, group_offset, transpose=True)
    return dx, None, None, None


_grouped_sefp.defvjp(
    lambda x, w, sizes, offset: (_grouped_sefp(x, w, sizes, offset), (w, sizes, offset)),
    _sefp_backward,
)


def grouped_matmul(
    x: jax.Array, w: Weights, group_sizes: jax.Array, group_offset: jax.Array | int
) -> jax.Array:
    """See ``api.grouped_matmul``."""
    group_offset = jnp.asarray(group_offset, jnp.int32)
    if isinstance(w, Fp8Block):
        raise NotImplementedError("w must be an array or in SEFP; it is stored as Fp8Block")
    if isinstance(w, Sefp):
        native.require(x)
        return _grouped_sefp(x, w, group_sizes, group_offset)
    native.require(x, w)
    return _grouped_matmul(x, w, group_sizes, group_offset)
