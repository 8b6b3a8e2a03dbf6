"""Grouped products of operands rounded to 8 bits, forward and backward, as DeepSeek-V3 was trained (spec 7).

Every product, of the forward pass and of both gradients, has operands in e4m3 and sums in float32. Activations and gradients have a
scale for each 128 numbers along the sum, weights for each block of 128 x 128. Scales are powers of two, so that a rounded number is one
of bfloat16 too, and any backend's product of 16 bits or more is the product of 8 bits: exact here, not yet faster.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import _implementation
from pallas_kernels.cache_rows import scale_exponents
from pallas_kernels.fp8 import BLOCK
from pallas_kernels.grouped_matmul.api import check, grouped_matmul
from pallas_kernels.grouped_matmul.weights import Quantised
from pallas_kernels.numerics import power_of_two


def rounded(x: Float[Array, "*batch R C"], rows: int, columns: int) -> Float[Array, "*batch R C"]:
    """``x`` with its numbers rounded to e4m3, scaled by a power of two for each tile of ``rows`` x ``columns``.

    A number is off by at most 1/16 of itself or, if it is small, 1/1024 of its tile's scale (the smallest power of two at which the
    largest number fits into 448). Tiles at the ends may be partial. A tile with NaN becomes NaN.
    """
    *batch, height, width = x.shape
    more = [(0, 0)] * len(batch) + [(0, -height % rows), (0, -width % columns)]
    tiles = jnp.pad(x.astype(jnp.float32), more)
    padded = tiles.shape
    tall, wide = padded[-2] // rows, padded[-1] // columns
    tiles = tiles.reshape(*batch, tall, rows, wide, columns).swapaxes(-3, -2)
    flat = tiles.reshape(*tiles.shape[:-2], rows * columns)
    exponent = scale_exponents(flat)[..., None]
    values = (flat * power_of_two(-exponent)).astype(jnp.float8_e4m3fn).astype(jnp.float32)
    flat = values * power_of_two(exponent)
    tiles = flat.reshape(tiles.shape).swapaxes(-3, -2).reshape(padded)
    return tiles[..., :height, :width].astype(x.dtype)


def grouped_matmul_fp8(
    x: Float[Array, "M K"],
    w: Float[Array, "G K N"],
    group_sizes: Int[Array, " E"],
    *,
    group_offset: Int[Array, ""] | int = 0,
    implementation: _implementation.Implementation = None,
) -> Float[Array, "M N"]:
    """``grouped_matmul`` of operands rounded to 8 bits, and so its gradients.

    A tile of 128 rows, along which the gradient of w sums, may reach over groups: they share its scale.

    Args:
      x, w, group_sizes, group_offset, implementation: as of ``grouped_matmul``; w is an array of x's dtype.

    Returns:
      [M, N] in x's dtype.

    Raises:
      ValueError, TypeError, NotImplementedError, ExceptionGroup: as ``grouped_matmul``.
    """
    if isinstance(w, Quantised):
        raise TypeError(
            f"grouped_matmul_fp8: w must be an array, which it rounds itself; got {type(w).__name__}. Give that to grouped_matmul."
        )
    check("grouped_matmul_fp8", x, w, group_sizes, group_offset)
    offset = jnp.asarray(group_offset, jnp.int32)
    return _product(x, w, group_sizes, offset, _implementation.hashable(implementation))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _product(x, w, group_sizes, offset, implementation):
    return _forward(x, w, group_sizes, offset, implementation)[0]


def _forward(x, w, group_sizes, offset, implementation):
    with jax.named_scope("fp8"):
        of_x, of_w = rounded(x, 1, BLOCK), rounded(w, BLOCK, BLOCK)
    y = grouped_matmul(of_x, of_w, group_sizes, group_offset=offset, implementation=implementation)
    return y, (x, of_w, group_sizes, offset)


def _backward(implementation, residuals, dy):
    x, of_w, group_sizes, offset = residuals
    product = functools.partial(
        grouped_matmul,
        group_sizes=group_sizes,
        group_offset=offset,
        implementation=implementation,
    )
    with jax.named_scope("fp8"):
        # Each gradient sums along another axis, along which its operands' tiles lie.
        along_columns, along_rows, of_x = (
            rounded(dy, 1, BLOCK),
            rounded(dy, BLOCK, 1),
            rounded(x, BLOCK, 1),
        )
    (dx,) = jax.vjp(lambda x: product(x, of_w), x)[1](along_columns)
    (dw,) = jax.vjp(lambda w: product(of_x, w), of_w)[1](along_rows)
    return dx, dw, None, None


_product.defvjp(_forward, _backward)
