"""Load balancing in training: the auxiliary-loss-free bias and the sequence-wise loss (spec 5)."""

import jax
import jax.numpy as jnp


def sequence_balance_loss(scores: jax.Array, expert_ids: jax.Array) -> jax.Array:
    """Sum over experts of f_e * P_e, averaged over sequences, without its coefficient.

    f_e is the share of the sequence's choices that fell on e, times E; P_e the mean normalised score. f counts the
    experts actually chosen (with the bias): the report leaves open which (spec 5), and this is the load to balance.
    Gradient flows through P only.

    Args:
      scores: [B, T, E] float32 sigmoid scores.
      expert_ids: [B, T, A] int32.

    Returns:
      float32 scalar; 1.0 when perfectly balanced.
    """
    experts, active = scores.shape[-1], expert_ids.shape[-1]
    chosen = jax.nn.one_hot(expert_ids, experts, dtype=jnp.float32).sum((1, 2))
    share = chosen * (experts / (active * expert_ids.shape[1]))
    mean_score = (scores / scores.sum(-1, keepdims=True)).mean(1)
    return (jax.lax.stop_gradient(share) * mean_score).sum(-1).mean()


def update_bias(bias: jax.Array, load: jax.Array, speed: float) -> jax.Array:
    """The correction bias after a step: up by ``speed`` for underloaded experts, down for overloaded ones.

    Args:
      bias: [..., E] float32.
      load: [..., E] choices per expert over the whole batch (all data-parallel ranks).
      speed: gamma; 0.001 in V3's pre-training.
    """
    load = load.astype(jnp.float32)
    return bias + jnp.float32(speed) * jnp.sign(load.mean(-1, keepdims=True) - load)
