"""The oracles: groups in exact integers and fractions, and the two ops in the plainest jnp."""

import math
from collections.abc import Iterable
from fractions import Fraction

import jax
import jax.numpy as jnp

from pallas_kernels import _checks
from pallas_kernels.sefp import format as sefp


def exact_group(
    values: Iterable[float], width: int, *, rounding: str = "truncate"
) -> tuple[int, list[int]]:
    """(E, q) of one group of finite numbers in Python's exact arithmetic: value i becomes q[i] * 2^(E - width)."""
    fractions = [Fraction(float(v)) for v in values]
    largest = max(abs(f) for f in fractions)
    # frexp's mantissa is in [0.5, 1), so its exponent is floor(log2) + 1.
    exponent = math.frexp(float(largest))[1] if largest else sefp.LOWEST_EXPONENT
    exponent = min(max(exponent, sefp.LOWEST_EXPONENT), sefp.HIGHEST_EXPONENT)
    codes = []
    for f in fractions:
        scaled = abs(f) * Fraction(2) ** (width - exponent)
        whole = math.floor(scaled) if rounding == "truncate" else round(scaled)
        whole = min(whole, 2**width - 1)
        codes.append(-whole if f < 0 else whole)
    return exponent, codes


def sefp_truncate(w: jax.Array, width: int | jax.Array, *, axis: int, rounding: str) -> jax.Array:
    """See ``api.sefp_truncate``: one group after another."""
    _checks.not_empty(w=w)
    moved = jnp.moveaxis(w.astype(jnp.float32), axis, 0)
    parts = [
        sefp.quantized(moved[start : start + sefp.GROUP], width, rounding, 0)
        for start in range(0, moved.shape[0], sefp.GROUP)
    ]
    return jnp.moveaxis(jnp.concatenate(parts), 0, axis).astype(w.dtype)


def sefp_matmul(x: jax.Array, s: sefp.Sefp) -> jax.Array:
    """See ``api.sefp_matmul``: everything in float32."""
    w = sefp.decode(s, dtype=jnp.float32)
    return jnp.dot(x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST)
