"""What dispatched rows are stored as: a cast, or narrow values with a scale per tile.

A ``Payload`` holds one function from a row's tiles to what is stored. It is plain ``jnp`` on the last axis, so that XLA applies
it to all tokens and a kernel to the row that it holds in registers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from pallas_kernels import _checks, cache_rows
from pallas_kernels.numerics import power_of_two
from pallas_kernels.sefp import format as sefp


class Encoded(NamedTuple):
    """Rows with scales.

    Attributes:
      values: [R, N] of the payload's dtype.
      scales: [R, D / tile], one for each tile of a row.
    """

    values: Shaped[Array, "R N"]
    scales: Shaped[Array, "R G"]


@dataclasses.dataclass(frozen=True)
class Payload:
    """An encoding of rows, tile by tile. Equal payloads must hold the same function: it is static under jit.

    Attributes:
      tile: how many neighbouring numbers are encoded together.
      encode: float32 tiles [..., tile] to (values [..., N],), or to (values [..., N], scales [...]).
      fuses: whether a Hopper kernel may run ``encode`` on the row that it moves: if it has a value for each number, and nothing
        but arithmetic, conversions, maxima over tiles and ``lax.broadcast_in_dim``. If not, XLA runs it before.
      decode: (values [..., N], scales [...]) to float32 tiles [..., tile]; None where there are no scales.
    """

    tile: int
    encode: Callable[[jax.Array], tuple[jax.Array, ...]]
    fuses: bool = False
    decode: Callable[[jax.Array, jax.Array], jax.Array] | None = None


def _fp8(tiles: jax.Array) -> tuple[jax.Array, jax.Array]:
    exponent = cache_rows.scale_exponents(tiles)
    factor = power_of_two(-exponent)
    # Written as one step: kernels place what a tile gives beside its numbers, but reshape nothing.
    factor = lax.broadcast_in_dim(factor, tiles.shape, tuple(range(factor.ndim)))
    return (tiles * factor).astype(jnp.float8_e4m3fn), power_of_two(exponent)


# Scales as in cache_rows: the smallest power of two that is at least 1e-4 and 1/448 of the tile's largest magnitude. Nothing
# exceeds 448 after it, so that there is nothing to clip.
FP8 = Payload(
    cache_rows.TILE, _fp8, fuses=True, decode=lambda v, s: v.astype(jnp.float32) * s[..., None]
)


def _bytes(words: jax.Array) -> jax.Array:
    """[N, W] words as [N, bytes]."""
    parts = lax.bitcast_convert_type(words, jnp.uint8)
    return parts.reshape(words.shape[0], words.shape[1] * words.dtype.itemsize)


def _words(values: jax.Array, dtype: Any) -> jax.Array:
    """[..., bytes] as [..., W] words of ``dtype``."""
    size = jnp.dtype(dtype).itemsize
    parts = values.reshape(*values.shape[:-1], values.shape[-1] // size, size)
    return lax.bitcast_convert_type(parts, dtype)


def sefp_payload(width: int) -> Payload:
    """SEFP of 3 to 8 bits of magnitude: for each 64 numbers 8 * (width + 1) bytes, the base's before the planes', and an exponent.

    Bytes lie as ``pallas_kernels.sefp.format`` stores a group. A narrower width is a prefix of each tile.

    Raises:
      ValueError, TypeError: for another width.
    """
    # Outside the cache, for which 3.0 is 3.
    return _sefp(
        _checks.static_int("sefp_payload", "width", width, sefp.BASE_WIDTH, sefp.MASTER_WIDTH)
    )


@functools.cache
def _sefp(width: int) -> Payload:
    def encode_tiles(tiles: jax.Array) -> tuple[jax.Array, jax.Array]:
        flat = tiles.reshape(math.prod(tiles.shape[:-1]), sefp.GROUP)
        stored = sefp.encode(flat.T, width=width)
        parts = [_bytes(words[0]) for words in (stored.base, *stored.planes)]
        values = jnp.concatenate(parts, axis=-1).reshape(*tiles.shape[:-1], 8 * (width + 1))
        return values, stored.exponent.reshape(tiles.shape[:-1])

    def decode_tiles(values: jax.Array, exponents: jax.Array) -> jax.Array:
        base, *planes = jnp.split(values, list(range(32, values.shape[-1], 8)), axis=-1)
        planes = tuple(_words(plane, jnp.uint16) for plane in planes)
        stored = sefp.Sefp(exponents, _words(base, jnp.uint32), planes, sefp.GROUP)
        return sefp.grouped(stored, jnp.float32)

    return Payload(sefp.GROUP, encode_tiles, decode=decode_tiles)


@functools.cache
def _cast(dtype: Any) -> Payload:
    return Payload(128, lambda tiles: (tiles.astype(dtype),), fuses=True)


def payload_of(dtype: Any, stored: Any) -> Payload | None:
    """The payload that ``dispatch``'s ``dtype`` asks for; None to move rows of ``stored`` as they are."""
    if dtype is None or isinstance(dtype, Payload):
        return dtype
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:  # no dtype at all
        dtype = repr(dtype)
    if dtype == jnp.float8_e4m3fn:
        return FP8
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(
            "dispatch: dtype must be None, float32, bfloat16, float16, float8_e4m3fn or a Payload; "
            f"got {dtype}. For SEFP give sefp_payload(width)."
        )
    return None if dtype == stored else _cast(dtype)


def encode(x: jax.Array, payload: Payload | None) -> tuple[jax.Array, ...]:
    """(values [T, N],) or (values, scales [T, D / tile]) of rows [T, D]; the last tile of a row may be shorter.

    A short tile is filled with zeros, and its values beyond D are cut off; that needs one value per number.
    """
    if payload is None:
        return (x,)
    size, tile = x.shape[1], payload.tile
    tiles = math.ceil(size / tile)
    padded = jnp.pad(x.astype(jnp.float32), [(0, 0), (0, tiles * tile - size)])
    values, *scales = payload.encode(padded.reshape(x.shape[0], tiles, tile))
    if values.shape[-1] != tile and size % tile:
        raise ValueError(
            f"dispatch: this payload packs several numbers in a value, so D must be a multiple of its tile, {tile}; "
            f"got {size}. Pad x's columns, or use float8_e4m3fn."
        )
    values = values.reshape(x.shape[0], tiles * values.shape[-1])
    return values[:, :size] if size % tile else values, *scales


def decode_rows(rows: Encoded, payload: Payload) -> Float[Array, "R D"]:
    """Rows with scales as float32 numbers; D is what the payload encoded, or whole tiles where it packs several in a value.

    Raises:
      ValueError, TypeError: for rows that are not of this payload.
    """
    if not isinstance(rows, Encoded):
        raise TypeError(
            f"decode_rows: rows must be Encoded, of a dispatch with scales; got {type(rows).__name__}. Others need no decoding."
        )
    if payload.decode is None:
        raise ValueError("decode_rows: the payload has no decode. Give the one that encoded rows.")
    count, tiles = rows.scales.shape
    one, scale = jax.eval_shape(
        payload.encode, jax.ShapeDtypeStruct((1, payload.tile), jnp.float32)
    )
    # Of the last tile, in which each number then has its value.
    short = tiles * one.size - rows.values.shape[1]
    least = one.size if one.size == payload.tile else 1
    if (rows.values.dtype, rows.scales.dtype) != (one.dtype, scale.dtype) or not 0 <= short < least:
        raise ValueError(
            f"decode_rows: the payload makes {one.size} values of {one.dtype} for each scale of {scale.dtype}; got "
            f"{rows.values.dtype}{rows.values.shape} and {rows.scales.dtype}{rows.scales.shape}. Give the one that encoded rows."
        )
    values = jnp.pad(rows.values, [(0, 0), (0, short)]).reshape(count, tiles, one.size)
    decoded = payload.decode(values, rows.scales).reshape(count, tiles * payload.tile)
    return decoded[:, : decoded.shape[1] - short]
