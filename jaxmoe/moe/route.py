"""Expert routing: sigmoid scores, group-limited selection with a bias, normalised weights (spec 5)."""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxmoe.config import ModelConfig
from jaxmoe.layers.linear import dense, in_place, linear
from pallas_kernels import native


class Routing(NamedTuple):
    """expert_ids [T, A] int32 (best first), weights [T, A] float32, scores [T, E] float32 in (0, 1)."""

    expert_ids: jax.Array
    weights: jax.Array
    scores: jax.Array


def _allowed_groups(choice: jax.Array, config: ModelConfig) -> jax.Array:
    """[T, E] bool: experts of the topk_group groups with the largest sum of their two best scores."""
    tokens, experts = choice.shape
    grouped = choice.reshape(tokens, config.n_group, experts // config.n_group)
    best_two = lax.top_k(grouped, 2)[0]
    group_score = best_two[..., 0] + best_two[..., 1]
    best = lax.top_k(group_score, config.topk_group)[1]
    chosen = jax.nn.one_hot(best, config.n_group, dtype=bool).any(1)
    return jnp.repeat(chosen, experts // config.n_group, axis=1, total_repeat_length=experts)


def _sigmoid(x: jax.Array) -> jax.Array:
    """In C++, for steps: an element's bits do not depend on how many there are."""
    return native.call("jaxmoe_sigmoid", jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def route(p: dict, config: ModelConfig, x: jax.Array) -> Routing:
    """Chooses experts for every token.

    Everything is float32. The correction bias only decides who is chosen; the weights come from the unbiased scores.
    Experts of excluded groups are out of the race (-inf, not 0: spec 11, trap 17). Ties go to the lower expert.

    Args:
      p: router parameters, "weight" [D, E] and "bias" [E].
      config: the model.
      x: [T, D].
    """
    logits = linear(x.astype(jnp.float32), {"weight": p["weight"]})
    scores = _sigmoid(logits) if in_place(logits, p["weight"]) else jax.nn.sigmoid(logits)
    choice = lax.stop_gradient(scores) + dense(p["bias"]).astype(jnp.float32)[None]
    if config.n_group > 1 and config.topk_group < config.n_group:
        choice = jnp.where(_allowed_groups(choice, config), choice, -jnp.inf)
    ids = lax.top_k(choice, config.num_experts_per_tok)[1].astype(jnp.int32)
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if config.norm_topk_prob:
        # Added one by one: XLA chooses how to reduce by the number of tokens, which must not matter.
        total = functools.reduce(operator.add, jnp.split(weights, weights.shape[-1], axis=-1))
        weights = weights / (total + 1e-20)
    return Routing(ids, weights * jnp.float32(config.routed_scaling_factor), scores)


def expert_load(expert_ids: jax.Array, num_experts: int) -> jax.Array:
    """[E] int32: how many (token, choice) pairs chose each expert."""
    return jax.nn.one_hot(expert_ids.reshape(-1), num_experts, dtype=jnp.int32).sum(0)
