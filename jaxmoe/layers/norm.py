"""Normalisations, computed in float32."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.layers.linear import Stacked, dense, in_place
from pallas_kernels import native


def _along_last(w: jax.Array | Stacked, x: jax.Array) -> jax.Array:
    """``w`` [D] as float32 with the rank of ``x`` [..., D]."""
    return jnp.expand_dims(dense(w).astype(jnp.float32), tuple(range(x.ndim - 1)))


def _native(x: jax.Array, p: dict[str, Any], eps: float, *, centre: bool) -> jax.Array:
    """Either norm in C++, whose rows do not depend on each other; XLA's do, through its choice of a reduction."""
    weight = p["weight"].stack
    bias = p["bias"].stack if "bias" in p else jnp.zeros((0, weight.shape[1]), jnp.float32)
    rows = x.reshape(-1, x.shape[-1])
    operands = (rows, weight, bias, p["weight"].layer)
    result = jax.ShapeDtypeStruct(rows.shape, rows.dtype)
    y = native.call("jaxmoe_norm", result, *operands, eps=np.float32(eps), centre=centre)
    return y.reshape(x.shape)


def rms_norm(x: jax.Array, p: dict[str, jax.Array | Stacked], eps: float) -> jax.Array:
    """``x / rms(x) * weight`` over the last axis; float32 inside, x's dtype outside."""
    if in_place(x, p["weight"]):
        return _native(x, p, eps, centre=False)
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return (y * _along_last(p["weight"], y)).astype(x.dtype)


def layer_norm(x: jax.Array, p: dict[str, jax.Array | Stacked], eps: float) -> jax.Array:
    """Mean-subtracting norm with weight and bias: the indexer's key norm is this, not RMSNorm (spec 11, trap 7)."""
    if in_place(x, p["weight"]):
        return _native(x, p, eps, centre=True)
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, -1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return (y * _along_last(p["weight"], y) + _along_last(p["bias"], y)).astype(x.dtype)
