"""Normalisations, computed in float32."""

import jax
import jax.numpy as jnp


def _along_last(w: jax.Array, x: jax.Array) -> jax.Array:
    """``w`` [D] as float32 with the rank of ``x`` [..., D]."""
    return jnp.expand_dims(w.astype(jnp.float32), tuple(range(x.ndim - 1)))


def rms_norm(x: jax.Array, p: dict[str, jax.Array], eps: float) -> jax.Array:
    """``x / rms(x) * weight`` over the last axis; float32 inside, x's dtype outside."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return (y * _along_last(p["weight"], y)).astype(x.dtype)


def layer_norm(x: jax.Array, p: dict[str, jax.Array], eps: float) -> jax.Array:
    """Mean-subtracting norm with weight and bias: the indexer's key norm is this, not RMSNorm (spec 11, trap 7)."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, -1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return (y * _along_last(p["weight"], y) + _along_last(p["bias"], y)).astype(x.dtype)
