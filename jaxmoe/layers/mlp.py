"""Gated feed-forward layers."""

import functools

import jax
import jax.numpy as jnp

from jaxmoe.config import ModelConfig
from jaxmoe.layers.linear import linear

ACTIVATION = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def gate(hidden: jax.Array, activation: str) -> jax.Array:
    """``act(gate) * up`` of [..., 2, F], in float32 inside (spec 11, trap 23)."""
    both = hidden.astype(jnp.float32)
    return (ACTIVATION[activation](both[..., 0, :]) * both[..., 1, :]).astype(hidden.dtype)


def mlp(p: dict, config: ModelConfig, x: jax.Array) -> jax.Array:
    """Gated MLP: x [..., D] -> [..., D]."""
    return linear(gate(linear(x, p["gate_up"]), config.hidden_act), p["down"])
