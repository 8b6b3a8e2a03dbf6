"""How a cache stores its rows: in float32, in bfloat16, or in 8 bits with scales. An array's dtype says which.

A row is ``values`` numbers, then a rest that is precision sensitive (a rotated key), or none. In uint8 it is the row
that DeepSeek-V3.2 calls "V32" (spec 2.4), generalised to other sizes; 656 bytes for 512 values and a rest of 64, 132
for an index key of 128:

    values float8_e4m3fn | a float32 scale for each 128 of them, the last tile may be shorter | the rest in bfloat16

The scale is the smallest power of two that is at least 1e-4 and 1/448 of the tile's largest magnitude. So scaling is
exact, nothing overflows, and a value is off by at most 1/16 of itself or, if it is small, 1/1024 of the scale.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.numerics import power_of_two

FORMATS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "fp8": jnp.uint8}
TILE = 128
_LOWEST = -13  # exponent: 2^-13 is the smallest power of two >= 1e-4


def stored_size(size: int, values: int, dtype: Any) -> int:
    """Elements of ``dtype`` that a row of ``size`` numbers is stored as, the first ``values`` of them in 8 bits if any."""
    if dtype != jnp.uint8:
        return size
    return values + 4 * math.ceil(values / TILE) + 2 * (size - values)


def encode(rows: jax.Array, values: int, dtype: Any) -> jax.Array:
    """Rows as a cache of ``dtype`` stores them.

    Args:
      rows: [..., size], floating.
      values: how many of a row's numbers come before its rest.
      dtype: float32 or bfloat16; uint8 for 8 bits.

    Returns:
      [..., stored_size(size, values, dtype)] of ``dtype``. Each row by itself: the same whatever stands beside it.
    """
    if dtype != jnp.uint8:
        # Said outright: XLA may keep the precision that a conversion there and back would take away.
        kept = jnp.finfo(dtype)
        return lax.reduce_precision(rows, kept.nexp, kept.nmant).astype(dtype)
    numbers, rest = jnp.split(rows, [values], axis=-1)
    tile, tiles = _tiles(values)
    numbers = jnp.pad(
        numbers.astype(jnp.float32), [(0, 0)] * (rows.ndim - 1) + [(0, tiles * tile - values)]
    ).reshape(*rows.shape[:-1], tiles, tile)
    exponent = scale_exponents(numbers)
    codes = (numbers * power_of_two(-exponent)[..., None]).astype(jnp.float8_e4m3fn)
    codes = codes.reshape(*rows.shape[:-1], -1)[..., :values]
    parts = (codes, power_of_two(exponent), rest.astype(jnp.bfloat16))
    return jnp.concatenate([_bytes(part) for part in parts], axis=-1)


def decode(stored: jax.Array, values: int, dtype: Any) -> jax.Array:
    """The rows [..., size] in ``dtype`` that ``encode`` has stored; exact."""
    if stored.dtype != jnp.uint8:
        return stored.astype(dtype)
    tile, tiles = _tiles(values)
    codes, scales, rest = jnp.split(stored, [values, values + 4 * tiles], axis=-1)
    numbers = lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)
    numbers = numbers * jnp.repeat(_from_bytes(scales, jnp.float32), tile, axis=-1)[..., :values]
    rest = _from_bytes(rest, jnp.bfloat16)
    return jnp.concatenate([numbers.astype(dtype), rest.astype(dtype)], axis=-1)


def _tiles(values: int) -> tuple[int, int]:
    """Size and number of tiles."""
    return min(values, TILE), math.ceil(values / TILE)


def scale_exponents(numbers: jax.Array) -> jax.Array:
    """int32 exponents of the scales of float32 tiles [..., tile], from the bits: a division may round."""
    bits = lax.bitcast_convert_type(jnp.abs(numbers).max(-1), jnp.int32)
    # 448 is 1.75 * 2^8: the exponent less 8, and one more if the mantissa is above 1.75.
    above = ((bits & 0x7FFFFF) > 0x600000).astype(jnp.int32)
    return jnp.maximum((bits >> 23) - 127 - 8 + above, _LOWEST)


def _bytes(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint8).reshape(*x.shape[:-1], -1)


def _from_bytes(x: jax.Array, dtype: Any) -> jax.Array:
    return lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, dtype.dtype.itemsize), dtype)
