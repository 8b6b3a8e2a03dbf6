"""One optimiser step."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxmoe import params as params_lib
from jaxmoe.config import ModelConfig
from jaxmoe.moe.balance import update_bias
from jaxmoe.train.config import TrainConfig
from jaxmoe.train.loss import loss


@struct.dataclass
class TrainState:
    """Everything a run needs to go on: step (int32 scalar), params, optimiser state."""

    step: jax.Array
    params: params_lib.Params
    opt_state: Any


def learning_rate(train_config: TrainConfig) -> optax.Schedule:
    """Linear warm-up from 0, then cosine to the final ratio."""
    c = train_config
    warmup = min(c.warmup_steps, c.steps // 10)
    return optax.warmup_cosine_decay_schedule(
        0.0, c.learning_rate, warmup, max(c.steps, warmup + 1), c.learning_rate * c.final_learning_rate_ratio
    )


def make_optimizer(config: ModelConfig, train_config: TrainConfig) -> optax.GradientTransformation:
    """AdamW with clipping. Only matrices decay: neither norms nor biases, so neither the routers' correction bias."""
    decays = jax.tree.map(lambda s: s.init == "normal", params_lib.spec(config))
    c = train_config
    return optax.chain(
        optax.clip_by_global_norm(c.clip_norm),
        optax.adamw(
            learning_rate(c), b1=c.beta1, b2=c.beta2, weight_decay=c.weight_decay, mask=decays
        ),
    )


def init_state(config: ModelConfig, train_config: TrainConfig) -> TrainState:
    """A fresh state from ``train_config.seed``."""
    params = params_lib.init_params(config, jax.random.key(train_config.seed))
    return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(config, train_config).init(params))


def update_biases(params: params_lib.Params, load: dict, speed: float) -> params_lib.Params:
    """Params with every router's correction bias moved towards balance; no gradient is involved."""

    def moved(layer: dict, layer_load: jax.Array) -> dict:
        if "moe" not in layer:
            return layer
        router = layer["moe"]["router"]
        router = {**router, "bias": update_bias(router["bias"], layer_load, speed)}
        return {**layer, "moe": {**layer["moe"], "router": router}}

    segments = [
        [moved(layer, layer_load) for layer, layer_load in zip(members, loads, strict=True)]
        for members, loads in zip(params["segments"], load["segments"], strict=True)
    ]
    updated = {**params, "segments": segments}
    if load["mtp"]:
        modules = list(params["mtp"])
        for i, layer_load in enumerate(load["mtp"]):
            modules[i] = {**modules[i], "layer": moved(modules[i]["layer"], layer_load)}
        updated["mtp"] = modules
    return updated


@functools.partial(jax.jit, static_argnames=("config", "train_config"), donate_argnums=(0,))
def train_step(
    state: TrainState, tokens: jax.Array, config: ModelConfig, train_config: TrainConfig
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step on windows [B, seq_len + 2]; donates ``state``.

    Returns:
      (new state, metrics): float32 scalars, and "load", int32 [E] per MoE layer stacked over all layers.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    (total, aux), grads = gradient(state.params, config, train_config, tokens)
    load = aux.pop("load")
    updates, opt_state = make_optimizer(config, train_config).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params = update_biases(params, load, train_config.bias_update_speed)
    metrics = {
        "total_loss": total,
        **aux,
        "grad_norm": optax.global_norm(grads),
        "learning_rate": learning_rate(train_config)(state.step),
    }
    loads = [x.reshape(-1, x.shape[-1]) for x in jax.tree.leaves(load) if x.shape[-1]]
    if loads:
        metrics["load"] = jnp.concatenate(loads)
    return TrainState(state.step + 1, params, opt_state), metrics
