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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gate(hidden: jax.Array, activation: str) -> jax.Array:
    """``act(gate) * up`` of [..., 2, F], in float32 inside (spec 11, trap 23)."""
    both = hidden.astype(jnp.float32)
    return (ACTIVATION[activation](both[..., 0, :]) * both[..., 1, :]).astype(hidden.dtype)


def _gate_forward(hidden, activation):
    return gate(hidden, activation), hidden


def _gate_backward(activation, hidden, dy):
    both, dy = hidden.astype(jnp.float32), dy.astype(jnp.float32)
    activated, pullback = jax.vjp(ACTIVATION[activation], both[..., 0, :])
    (d_gate,) = pullback(dy * both[..., 1, :])
    return (jnp.stack([d_gate, dy * activated], axis=-2).astype(hidden.dtype),)


# The default rule pads both halves to full size and adds them; this writes each once.
gate.defvjp(_gate_forward, _gate_backward)


def mlp(p: dict, config: ModelConfig, x: jax.Array) -> jax.Array:
    """Gated MLP: x [..., D] -> [..., D]."""
    return linear(gate(linear(x, p["gate_up"]), config.hidden_act), p["down"])
