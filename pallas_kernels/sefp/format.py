"""SEFP E5Mm: one shared exponent per 64 weights, sign and magnitude per weight, and every width inside the widest.

A group's exponent E is that of its largest member plus one, clamped to [-14, 17]. At width m a weight is (-1)^s * a * 2^(E-m) with
a < 2^m, cut off, never rounded up; a narrower width drops the low bits of a and touches nothing else. Groups lie along the contracted
axis. (OTARo, arXiv 2511.13147, as far as it is public; the arithmetic is fixed in the project's specification of SEFP, 1.3-1.8.)

Storage of weights [..., K, N], G = ceil(K / 64) groups; the last one is padded with zeros:

    exponent  int8    [..., G, N]
    base      uint32  [..., G, N, 8]   eight nibbles [sign, three highest bits] per word, the signs turned one byte to the left
    planes    uint16  [..., G, N, 4]   one array per further bit, highest first

Element i of a group is nibble i % 8 of word i // 8, except that its sign stands in nibble (i + 2) % 8; in a plane it is bit i % 16
of halfword i // 16. Turned so, signs and magnitudes come to where a tensor core wants them in one rotation (``mosaic_gpu``).

A group of one column is contiguous in each array and columns are next to each other. So a row of the result needs no gathering, both
the contracted (G) and the output axis (N) can be sharded without cutting a group, and a width reads its own arrays and no others.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Integer, Num

from pallas_kernels import _checks
from pallas_kernels.numerics import power_of_two

GROUP = 64
BASE_WIDTH, MASTER_WIDTH = 3, 8
LOWEST_EXPONENT, HIGHEST_EXPONENT = -14, 17
LARGEST = 65504.0  # what an infinity counts as
ROUNDINGS = ("truncate", "nearest", "nested")
# Weight of E5M3's error in "nested", others' is 1. Of Gaussian weights (sigma 0.02) E5M3 then keeps 17.5 dB, where rounding to nearest
# has 17.7 and cutting off 12.2, and E5M8 21.9; with weight 1 it is 16.1 and 26.9. Held-out losses: docs/log.md.
NARROWEST = 16.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sefp:
    """Weights [..., inner, N] of a width from 3 to 8; a pytree whose leaves may be sharded, stacked and sliced along "...".

    Attributes:
      exponent: int8 [..., G, N].
      base: uint32 [..., G, N, 8].
      planes: up to five of uint16 [..., G, N, 4].
      inner: K before padding.
    """

    # Arrays, or what JAX puts in their place: shapes, shardings, cotangents.
    exponent: Any
    base: Any
    planes: tuple[Any, ...]
    inner: int = dataclasses.field(metadata={"static": True})

    @property
    def width(self) -> int:
        """Bits of magnitude that are stored."""
        return BASE_WIDTH + len(self.planes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights: [..., K, N]."""
        *batch, _, columns = self.exponent.shape
        return (*batch, self.inner, columns)

    def truncate(self, width: int) -> "Sefp":
        """The same weights at a lower width: fewer planes, nothing copied."""
        return dataclasses.replace(self, planes=self.planes[: self.check(width) - BASE_WIDTH])

    def nbytes(self, width: int | None = None) -> int:
        """Bytes read at ``width``: per padded group 8 * (width + 1) of codes and one of exponent."""
        width = self.width if width is None else self.check(width)
        return self.exponent.size * (GROUP * (width + 1) // 8 + 1)

    def check(self, width: int) -> int:
        """``width`` if it is stored here.

        Raises:
          ValueError, TypeError: if it isn't.
        """
        hint = f"{self.width} is stored; encode again for more."
        return _checks.static_int("Sefp", "width", width, BASE_WIDTH, self.width, hint)

    def __repr__(self) -> str:
        return f"Sefp(E5M{self.width}, shape={self.shape}, {self.nbytes()} bytes)"


def shared_exponent(w: Float[Array, "..."], axis: int) -> Int[Array, "..."]:
    """int32 E of float32 groups that lie along ``axis``, which stays with length 1; NaN counts as zero, infinity as 65504."""
    bits = jax.lax.bitcast_convert_type(finite(w), jnp.int32)
    exponent = ((bits >> 23) & 0xFF).max(axis, keepdims=True) - 126
    return jnp.clip(exponent, LOWEST_EXPONENT, HIGHEST_EXPONENT)


def finite(w: Float[Array, "..."]) -> Float[Array, "..."]:
    """Float32 ``w`` with NaN as zero and infinities as +-65504."""
    return jnp.where(jnp.isinf(w), jnp.copysign(LARGEST, w), jnp.where(jnp.isnan(w), 0.0, w))


def magnitudes(
    w: Float[Array, "..."], exponent: Int[Array, "..."], width: int | Int[Array, ""], rounding: str
) -> Float[Array, "..."]:
    """a as whole float32 numbers, exactly: |w| * 2^(width - E), rounded as ``encode`` says, at most 2^width - 1."""
    if rounding == "nested":
        whole = _nested(jnp.abs(finite(w)) * power_of_two(MASTER_WIDTH - exponent))
        return jnp.floor(whole * power_of_two(jnp.asarray(width, jnp.int32) - MASTER_WIDTH))
    scaled = jnp.abs(finite(w)) * power_of_two(width - exponent)
    whole = jnp.floor(scaled) if rounding == "truncate" else jnp.round(scaled)
    return jnp.minimum(whole, power_of_two(jnp.asarray(width, jnp.int32)) - 1.0)


def _nested(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The code at the widest width whose cut-off values at all of them are closest to x: the least weighted sum of squared errors.

    Cutting off never rounds up, so a code that is to do so at some width has to stand on that width's grid: those points, and the
    nearest code, are all that can be the best. Of equal ones the nearest to x at the widest width.
    """
    steps = [2.0**n for n in range(MASTER_WIDTH - BASE_WIDTH + 1)]

    def error(code: jax.Array) -> jax.Array:
        each = [jnp.square(jnp.floor(code / step) * step - x) for step in steps]
        return sum(each[:-1], NARROWEST * each[-1])

    best = least = None
    for step in steps:
        code = jnp.minimum(jnp.round(x / step) * step, 2.0**MASTER_WIDTH - 1.0)
        found = error(code)
        best = code if best is None else jnp.where(found < least, code, best)
        least = found if least is None else jnp.minimum(found, least)
    return best


def quantized(
    w: Float[Array, "..."], width: int | Int[Array, ""], rounding: str, axis: int
) -> Float[Array, "..."]:
    """Float32 groups along ``axis`` as the values that they have at ``width``; NaN stays."""
    exponent = shared_exponent(w, axis)
    magnitude = magnitudes(w, exponent, width, rounding)
    value = magnitude * power_of_two(exponent - width)
    value = jnp.where(w < 0, -value, value)
    # No negative zeros: an element that is cut off to nothing has no sign.
    return jnp.where(jnp.isnan(w), w, jnp.where(magnitude == 0, 0.0, value))


def check_rounding(rounding: str) -> None:
    """Raises ``ValueError`` for a rounding that there isn't."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}; got {rounding!r}.")


def groups_of(w: Num[Array, "*batch K N"]) -> Num[Array, "*batch G 64 N"]:
    """Groups along K, zeros after its end."""
    *batch, inner, columns = w.shape
    groups = -(-inner // GROUP)
    w = jnp.pad(w, [(0, 0)] * len(batch) + [(0, groups * GROUP - inner), (0, 0)])
    return w.reshape(*batch, groups, GROUP, columns)


def encode(
    w: Float[Array, "*batch K N"], *, width: int = MASTER_WIDTH, rounding: str = "truncate"
) -> Sefp:
    """Weights in SEFP.

    Args:
      w: [..., in, out].
      width: 3 to 8.
      rounding: "truncate", as OTARo has it; "nearest" (half to even), closer at ``width`` but not at those below it; or "nested",
        the code that is closest over all widths after its low bits are cut off, ours. With the first and the last, dropping planes
        equals encoding at the lower width.

    Returns:
      The stored form. In traced code NaN becomes zero, infinity 65504 and more than 2^17 saturates; ``unrepresentable`` counts them.

    Raises:
      ValueError, TypeError: for a width, rounding or type that there isn't, or NaN or infinity in an array that isn't traced.

    Example:
      >>> import jax.numpy as jnp
      >>> s = encode(jnp.linspace(-1.0, 1.0, 128).reshape(64, 2))
      >>> s, s.truncate(3).nbytes() / (64 * 2) * 8
      (Sefp(E5M8, shape=(64, 2), 146 bytes), 4.125)
    """
    _checks.floating("encode", w=w)
    if w.ndim < 2:
        raise ValueError(f"encode: w must be [..., K, N]; got shape {w.shape}. Add an axis.")
    width = _checks.static_int("encode", "width", width, BASE_WIDTH, MASTER_WIDTH)
    check_rounding(rounding)
    if not isinstance(w, jax.core.Tracer) and not bool(jnp.isfinite(w).all()):
        raise ValueError("encode: w holds NaN or infinity; replace them first.")
    return _encode(w, width, rounding)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _encode(w: jax.Array, width: int, rounding: str) -> Sefp:
    groups = groups_of(w.astype(jnp.float32))
    exponent = shared_exponent(groups, -2)
    magnitude = magnitudes(groups, exponent, width, rounding).astype(jnp.uint32)
    sign = ((groups < 0) & (magnitude > 0)).astype(jnp.uint32)
    sign, magnitude = (jnp.moveaxis(a, -2, -1) for a in (sign, magnitude))
    return pack(exponent[..., 0, :], sign, magnitude, width, w.shape[-2])


def pack(
    exponent: Int[Array, "*batch G N"],
    sign: Integer[Array, "*batch G N 64"],
    magnitude: Integer[Array, "*batch G N 64"],
    width: int,
    inner: int,
) -> Sefp:
    """The stored form of signs (0 or 1) and magnitudes (below 2^width)."""
    sign, magnitude = (a.astype(jnp.uint32) for a in (sign, magnitude))
    nibbles = _gathered((sign << 3) | (magnitude >> (width - BASE_WIDTH)), 8, 4)
    planes = tuple(
        _gathered((magnitude >> bit) & 1, 16, 1).astype(jnp.uint16)
        for bit in reversed(range(width - BASE_WIDTH))
    )
    return Sefp(exponent.astype(jnp.int8), _signs_turned(nibbles, 8), planes, inner)


def unpack(
    base: Integer[Array, "*group 8"], planes: Sequence[Integer[Array, "*group 4"]]
) -> Int[Array, "*group 64"]:
    """int32 signed codes q of the width that the planes give: weight = q * 2^(E - width)."""
    nibbles = _scattered(_signs_turned(base, 24), 8, 4)
    magnitude = nibbles & 7
    for plane in planes:
        magnitude = (magnitude << 1) | (_scattered(plane.astype(jnp.uint32), 16, 1) & 1)
    codes = magnitude.astype(jnp.int32)
    return jnp.where((nibbles & 8) != 0, -codes, codes)


def _signs_turned(words: jax.Array, left: int) -> jax.Array:
    """Nibbles whose sign bits are rotated within the word."""
    magnitudes, signs = words & jnp.uint32(0x7777_7777), words & jnp.uint32(0x8888_8888)
    return magnitudes | (signs << left) | (signs >> (32 - left))


def _gathered(parts: jax.Array, number: int, bits: int) -> jax.Array:
    """uint32 words of ``number`` neighbours of so many bits, the first one lowest."""
    parts = parts.reshape(*parts.shape[:-1], parts.shape[-1] // number, number)
    return (parts << _places(parts.ndim, number, bits)).sum(-1, dtype=jnp.uint32)


def _scattered(words: jax.Array, number: int, bits: int) -> jax.Array:
    """What ``_gathered`` took, with whatever stands above it in the word."""
    words = words[..., None] >> _places(words.ndim + 1, number, bits)
    return words.reshape(*words.shape[:-2], words.shape[-2] * number)


def _places(rank: int, number: int, bits: int) -> jax.Array:
    place = jnp.arange(number, dtype=jnp.uint32) * jnp.uint32(bits)
    return place.reshape((1,) * (rank - 1) + (number,))


def decode(
    s: Sefp, *, width: int | None = None, dtype: DTypeLike = jnp.bfloat16
) -> Float[Array, "*batch K N"]:
    """The weights at ``width`` (default: all that is stored), exact in bfloat16, float32, and up to E = 16 in float16.

    Raises:
      ValueError: if ``width`` isn't stored.
    """
    return _decode(s.truncate(s.width if width is None else width), dtype)


@functools.partial(jax.jit, static_argnums=1)
def _decode(s: Sefp, dtype: DTypeLike) -> jax.Array:
    w = jnp.moveaxis(grouped(s, dtype), -1, -2)
    *batch, groups, _, columns = w.shape
    return w.reshape(*batch, groups * GROUP, columns)[..., : s.inner, :]


def grouped(s: Sefp, dtype: DTypeLike) -> Float[Array, "*batch G N 64"]:
    """The weights of every stored bit in the order of storage."""
    scale = power_of_two(s.exponent.astype(jnp.int32) - s.width)
    return (unpack(s.base, s.planes).astype(jnp.float32) * scale[..., None]).astype(dtype)


def unrepresentable(w: Float[Array, "*batch K N"]) -> dict[str, Int[Array, ""]]:
    """How much of ``w`` SEFP can't hold: elements "nan" and "inf", and "saturated" groups with a finite value of 2^17 or more."""
    groups = groups_of(w.astype(jnp.float32))
    large = jnp.isfinite(groups) & (jnp.abs(groups) >= 2.0**HIGHEST_EXPONENT)
    return {
        "nan": jnp.isnan(w).sum(),
        "inf": jnp.isinf(w).sum(),
        "saturated": large.any(-2).sum(),
    }


def bits_per_weight(width: int) -> float:
    """Stored bits, the shared exponent included: 9.125 at width 8 down to 4.125 at 3."""
    return width + 1 + 8 / GROUP
