"""SEFP in plain JAX; XLA fuses what it can. Never refuses."""

import jax
import jax.numpy as jnp

from pallas_kernels.numerics import power_of_two, precision_of
from pallas_kernels.sefp import format as sefp

_FUSED_ROWS = 2  # up to which every row reads and decodes the bits by itself, in one fusion, and no weight is written


def sefp_truncate(w: jax.Array, width: int | jax.Array, *, axis: int, rounding: str) -> jax.Array:
    """See ``api.sefp_truncate``. Two passes over w: XLA doesn't keep a group between its maximum and its rounding."""
    moved = jnp.moveaxis(w, axis, -2)
    groups = sefp.quantized(sefp.groups_of(moved.astype(jnp.float32)), width, rounding, -2).astype(
        w.dtype
    )
    *batch, count, group, columns = groups.shape
    flat = groups.reshape(*batch, count * group, columns)[..., : moved.shape[-2], :]
    return jnp.moveaxis(flat, -2, axis)


def sefp_matmul(x: jax.Array, s: sefp.Sefp) -> jax.Array:
    """See ``api.sefp_matmul``."""
    x = groups_of_rows(x, s)
    if x.shape[0] <= _FUSED_ROWS:
        codes = sefp.unpack(s.base, s.planes).astype(jnp.float32)
        scale = power_of_two(s.exponent.astype(jnp.int32) - s.width)
        sums = (codes[None] * x[:, :, None].astype(jnp.float32)).sum(-1)
        return (sums * scale[None]).sum(1)
    return jnp.einsum(
        "bgk,gnk->bn",
        x,
        sefp.grouped(s, x.dtype),
        precision=precision_of(x.dtype),
        preferred_element_type=jnp.float32,
    )


def sefp_matmul_transposed(dy: jax.Array, s: sefp.Sefp) -> jax.Array:
    """float32 [B, K]: dy [B, N] times the transposed weights."""
    dx = jnp.einsum(
        "bn,gnk->bgk",
        dy,
        sefp.grouped(s, dy.dtype),
        precision=precision_of(dy.dtype),
        preferred_element_type=jnp.float32,
    )
    return dx.reshape(dy.shape[0], dx.shape[1] * sefp.GROUP)[:, : s.inner]


def groups_of_rows(x: jax.Array, s: sefp.Sefp) -> jax.Array:
    """[B, G, 64]: x [B, K] in groups, zeros after its end."""
    groups = s.exponent.shape[-2]
    x = jnp.pad(x, ((0, 0), (0, groups * sefp.GROUP - s.inner)))
    return x.reshape(x.shape[0], groups, sefp.GROUP)
