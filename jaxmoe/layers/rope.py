"""Rotary position embedding with linear, Llama-3 and YaRN context extension (spec 2.3)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.config import ModelConfig, RopeConfig


class Rotation(NamedTuple):
    """cos and sin of every pair's angle: float32, [B, T, R/2]."""

    cos: jax.Array
    sin: jax.Array


def inverse_frequencies(rope: RopeConfig, dim: int) -> np.ndarray:
    """Angular frequency of each of the dim/2 pairs, float32 (every public implementation computes them so)."""
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    base = np.float32(1.0) / (np.float32(rope.theta) ** exponent)
    if rope.type == "linear":
        return base / np.float32(rope.factor)
    if rope.type == "llama3":
        return _llama3(rope, base)
    if rope.type == "yarn":
        return _yarn(rope, base, dim)
    return base


def _llama3(rope: RopeConfig, base: np.ndarray) -> np.ndarray:
    length = rope.original_max_position_embeddings
    wavelength = np.float32(2 * math.pi) / base
    slow = wavelength > length / rope.low_freq_factor
    fast = wavelength < length / rope.high_freq_factor
    scaled = base / np.float32(rope.factor)
    smooth = (length / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * scaled + smooth * base
    return np.where(slow, scaled, np.where(fast, base, between)).astype(np.float32)


def _yarn(rope: RopeConfig, base: np.ndarray, dim: int) -> np.ndarray:
    def pair_of(rotations: float) -> float:
        wavelengths = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(wavelengths) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return (base / np.float32(rope.factor) * ramp + base * (1 - ramp)).astype(np.float32)


def rotation(config: ModelConfig, positions: jax.Array) -> Rotation:
    """cos and sin for integer ``positions`` [B, T]; angles are float32 products (spec 11, trap 13)."""
    frequency = jnp.asarray(inverse_frequencies(config.rope, config.rope_dim))
    angle = positions.astype(jnp.float32)[..., None] * frequency[None, None]
    scale = jnp.float32(config.rope.cos_sin_scale())
    return Rotation(jnp.cos(angle) * scale, jnp.sin(angle) * scale)


def rotate(x: jax.Array, r: Rotation, *, interleave: bool) -> jax.Array:
    """Rotates the last axis of x [B, T, R] or [B, T, H, R].

    ``interleave`` pairs dimensions (2i, 2i+1), as MLA does; otherwise (i, i + R/2), as Llama and the V3.2 indexer
    do. Either way the result is in half-split order: dot products of two rotated vectors do not depend on it.
    """
    cos, sin = r.cos.astype(x.dtype), r.sin.astype(x.dtype)
    if x.ndim == 4:
        cos, sin = cos[:, :, None], sin[:, :, None]
    if interleave:
        a, b = x[..., 0::2], x[..., 1::2]
    else:
        a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
