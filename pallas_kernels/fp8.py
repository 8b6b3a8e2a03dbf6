"""Weights in 8 bits with a scale for each block of 128 x 128, as DeepSeek-V3's checkpoints store them (spec 1.3 and 7).

    values float8_e4m3fn [..., K, N]    scales float32 [..., ceil(K / 128), ceil(N / 128)]    weight = value * scale of its block

The scale is the block's largest magnitude over 448, the format's largest number. Blocks at the ends may be partial. Weights here are
[in, out] and the checkpoint's [out, in]: transposing both arrays goes from one to the other.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import _checks

BLOCK = 128
LARGEST = 448.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Block:
    """Weights [..., K, N]; a pytree whose leaves may be stacked and sliced along "...".

    Attributes:
      values: float8_e4m3fn [..., K, N].
      scales: float32 [..., ceil(K / 128), ceil(N / 128)].
    """

    # Arrays, or what JAX puts in their place: shapes, shardings, cotangents.
    values: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights: [..., K, N]."""
        return self.values.shape

    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.size + 4 * self.scales.size

    def __repr__(self) -> str:
        return f"Fp8Block(shape={self.shape}, {self.nbytes()} bytes)"


def encode(w: Float[Array, "*batch K N"]) -> Fp8Block:
    """Weights in blocks of 8 bits.

    A weight is off by at most 1/16 of itself or, if it is small, 1/1024 of the scale. A block with NaN or infinity becomes NaN.

    Args:
      w: [..., in, out].

    Raises:
      ValueError, TypeError: if w is not at least a matrix, or of no floating type.

    Example:
      >>> import jax.numpy as jnp
      >>> encode(jnp.ones((2, 256, 130)))
      Fp8Block(shape=(2, 256, 130), 66592 bytes)
    """
    _checks.floating("encode", w=w)
    if w.ndim < 2:
        raise ValueError(f"encode: w must be [..., K, N]; got shape {w.shape}. Add an axis.")
    return _encode(w)


@jax.jit
def _encode(w: jax.Array) -> Fp8Block:
    *batch, inner, columns = w.shape
    more = [(0, -size % BLOCK) for size in (inner, columns)]
    blocks = jnp.pad(w.astype(jnp.float32), [(0, 0)] * len(batch) + more)
    tall, wide = (size // BLOCK for size in blocks.shape[-2:])
    blocks = blocks.reshape(*batch, tall, BLOCK, wide, BLOCK)
    scales = jnp.abs(blocks).max((-3, -1)) / LARGEST
    # Of a block of zeros, or of numbers so small that what they are divided by has no inverse.
    scales = jnp.where(scales < jnp.finfo(jnp.float32).tiny, 1.0, scales)
    # Said outright: a maximum may leave NaN out.
    scales = jnp.where(jnp.isfinite(blocks).all((-3, -1)), scales, jnp.nan)
    # Clipped: the quotient may be rounded up past 448, and the cast does not saturate.
    values = jnp.clip(w.astype(jnp.float32) / _of_weights(scales, w.shape), -LARGEST, LARGEST)
    return Fp8Block(values.astype(jnp.float8_e4m3fn), scales)


def decode(w: Fp8Block, dtype: DTypeLike = jnp.bfloat16) -> Float[Array, "*batch K N"]:
    """Values times scales: the float32 product, then rounded to ``dtype``.

    Raises:
      ValueError, TypeError: if the parts of ``w`` do not fit together.
    """
    check("decode", w)
    return (w.values.astype(jnp.float32) * _of_weights(w.scales, w.shape)).astype(dtype)


def check(op: str, w: Fp8Block) -> None:
    """Raises ValueError or TypeError, for ``op``, unless values and scales are as ``Fp8Block`` says."""
    found = f"values {w.values.dtype}{w.values.shape} and scales {w.scales.dtype}{w.scales.shape}"
    if (w.values.dtype, w.scales.dtype) != (jnp.float8_e4m3fn, jnp.float32):
        raise TypeError(
            f"{op}: an Fp8Block has values of float8_e4m3fn and scales of float32; got {found}. Use fp8.encode."
        )
    *batch, inner, columns = w.values.shape
    scales = (*batch, -(-inner // BLOCK), -(-columns // BLOCK))
    if w.scales.shape != scales:
        raise ValueError(
            f"{op}: an Fp8Block has a scale for each {BLOCK} x {BLOCK} values, here {scales}; got {found}. Use fp8.encode."
        )


def _of_weights(scales: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Each block's scale for each of its weights [..., K, N]."""
    every = jnp.repeat(jnp.repeat(scales, BLOCK, axis=-2), BLOCK, axis=-1)
    return every[..., : shape[-2], : shape[-1]]
