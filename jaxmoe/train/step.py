"""One optimiser step."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmoe import params as params_lib
from jaxmoe import sharding as sharding_lib
from jaxmoe.config import ModelConfig
from jaxmoe.moe import MoeOptions
from jaxmoe.moe.balance import update_bias
from jaxmoe.train.config import TrainConfig
from jaxmoe.train.data import Batch
from jaxmoe.train.dsa import initial_params, is_index, merged, trained
from jaxmoe.train.loss import as_batch, counts_of, loss


@struct.dataclass
class TrainState:
    """Everything a run needs to go on: step (int32 scalar), params, optimiser state.

    Leaves are arrays; or, in trees of the same form, ``jax.ShapeDtypeStruct``s or shardings.
    """

    step: Any
    params: params_lib.Params
    opt_state: Any


def learning_rate(train_config: TrainConfig) -> optax.Schedule:
    """Linear warm-up, whose first step already has a positive rate, then cosine to the final ratio."""
    c = train_config
    warmup = min(c.warmup_steps, c.steps // 10)

    def schedule(count: jax.Array) -> jax.Array:
        t = jnp.asarray(count, jnp.float32)
        rise = (t + 1) / (warmup + 1)
        done = jnp.clip((t - warmup) / max(c.steps - 1 - warmup, 1), 0.0, 1.0)
        end = c.final_learning_rate_ratio
        fall = end + (1 - end) * (1 + jnp.cos(jnp.pi * done)) / 2
        return c.peak_learning_rate * jnp.minimum(rise, fall)

    return schedule


def _group(path: tuple[Any, ...]) -> str:
    return "index" if is_index(path) else "model"


def group_norms(grads: params_lib.Params) -> dict[str, jax.Array]:
    """Norms of the gradient of the "model" and of its indexers ("index"), float32."""
    squares = {"model": jnp.zeros((), jnp.float32), "index": jnp.zeros((), jnp.float32)}
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        squares[_group(path)] += jnp.square(g.astype(jnp.float32)).sum()
    return {name: jnp.sqrt(total) for name, total in squares.items()}


def _clip(max_norm: float) -> optax.GradientTransformation:
    """Clips model and indexers each by their own norm: one norm would let either loss scale the other's step."""

    def update(grads, state, params=None):
        del params
        scale = {k: jnp.minimum(1.0, max_norm / (n + 1e-9)) for k, n in group_norms(grads).items()}
        clipped = jax.tree_util.tree_map_with_path(
            lambda path, g: g * scale[_group(path)].astype(g.dtype), grads
        )
        return clipped, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(
    config: ModelConfig,
    train_config: TrainConfig,
    schedule: optax.Schedule | None = None,
    decays: Any = None,
) -> optax.GradientTransformation:
    """AdamW with clipping, for what the stage trains (``dsa.trained``). Only matrices decay: neither norms nor biases.

    Its learning rate is ``learning_rate``, unless there is another ``schedule``; ``decays`` says of another tree what of it decays.
    """
    c = train_config
    if decays is None:
        decays = jax.tree.map(lambda s: s.init == "normal", trained(params_lib.spec(config), c))
    return optax.chain(
        _clip(c.clip_norm),
        optax.adamw(
            schedule or learning_rate(c),
            b1=c.beta1,
            b2=c.beta2,
            weight_decay=c.weight_decay,
            mask=decays,
        ),
    )


def abstract_state(config: ModelConfig, train_config: TrainConfig) -> TrainState:
    """The state as ``jax.ShapeDtypeStruct``s."""
    params = params_lib.abstract_params(config)
    init = make_optimizer(config, train_config).init
    optimizer = jax.eval_shape(init, trained(params, train_config))
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, optimizer)


def state_shardings(config: ModelConfig, train_config: TrainConfig, mesh: Mesh) -> TrainState:
    """Shardings of a state on a mesh: the optimiser's moments like their parameters, the rest everywhere."""
    by_param = sharding_lib.shardings(config, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    optimizer = optax.tree_utils.tree_map_params(
        make_optimizer(config, train_config),
        lambda _, sharding: sharding,
        abstract_state(config, train_config).opt_state,
        trained(by_param, train_config),
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, by_param, optimizer)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sequences split over the mesh's data and expert axes."""
    return NamedSharding(mesh, PartitionSpec(_batch_axes(mesh)))


def _batch_axes(mesh: Mesh) -> tuple[str, ...]:
    return tuple(axis for axis in MoeOptions().token_axes if axis in mesh.shape)


def padded_rows(mesh: Mesh, rows: int, accumulate: int = 1) -> int:
    """The number of sequences at which ``rows`` divide over the mesh in each of a step's passes; the last ones are padding."""
    return rows + -rows % (accumulate * math.prod(mesh.shape[axis] for axis in _batch_axes(mesh)))


def place_batch(mesh: Mesh, rows: np.ndarray, accumulate: int = 1) -> jax.Array:
    """Rows [B, ...] over the mesh, with rows of zeros where they don't divide. Every process gives the same."""
    short = padded_rows(mesh, len(rows), accumulate) - len(rows)
    rows = np.pad(rows, ((0, short), *[(0, 0)] * (rows.ndim - 1)))
    return jax.make_array_from_callback(rows.shape, batch_sharding(mesh), rows.__getitem__)


def read_batch(
    mesh: Mesh | None, read: Callable[[slice], Batch], rows: int, accumulate: int = 1
) -> Batch:
    """``rows`` rows as ``place_batch`` puts them, of which each process reads only those on its devices.

    Args:
      mesh: the devices; None for one.
      read: gives some rows of the batch.
      rows: in all.
      accumulate: passes per step.
    """
    if mesh is None:
        return Batch(*map(jnp.asarray, read(slice(0, rows))))
    size, sharding = padded_rows(mesh, rows, accumulate), batch_sharding(mesh)
    indices = sharding.addressable_devices_indices_map((size,)).values()
    spans = [index[0].indices(size)[:2] for index in indices]
    first, end = min(begin for begin, _ in spans), max(end for _, end in spans)
    own = read(slice(min(first, rows), min(end, rows)))
    short = end - first - len(own.tokens)

    def place(values: np.ndarray) -> jax.Array:
        values = np.pad(values, ((0, short), (0, 0)))

        def part(index: tuple[slice, ...]) -> np.ndarray:
            begin, end, _ = index[0].indices(size)
            return values[begin - first : end - first]

        return jax.make_array_from_callback((size, values.shape[1]), sharding, part)

    return Batch(*map(place, own))


def init_state(
    config: ModelConfig,
    train_config: TrainConfig,
    mesh: Mesh | None = None,
    *,
    init_from: str | os.PathLike[str] | None = None,
) -> TrainState:
    """A fresh state from ``train_config.seed``, on one device or created in place on a mesh.

    With ``init_from``, a run or checkpoint, its parameters (``dsa.initial_params``).
    """
    shardings = None if mesh is None else state_shardings(config, train_config, mesh)
    where, seed = shardings and shardings.params, train_config.seed
    if init_from is None:
        params = params_lib.init_params(config, jax.random.key(seed), shardings=where)
    else:
        params = initial_params(config, seed, init_from, mesh)
    init = jax.jit(
        make_optimizer(config, train_config).init, out_shardings=shardings and shardings.opt_state
    )
    step = jnp.zeros((), jnp.int32)
    if mesh is not None:
        step = jax.device_put(step, shardings.step)
    return TrainState(step, params, init(trained(params, train_config)))


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


def _load_table(load: dict) -> jax.Array | None:
    """[layers, E] in layer order, the MTP module's last; None for a model without experts."""
    rows = []
    for members in load["segments"]:
        sparse = [x for x in members if x.shape[-1]]
        if sparse:  # a segment's members take turns
            rows.append(jnp.stack(sparse, axis=1).reshape(-1, sparse[0].shape[-1]))
    rows += [x[None] for x in load["mtp"] if x.shape[-1]]
    return jnp.concatenate(rows) if rows else None


@functools.partial(jax.jit, static_argnames=("config", "train_config", "mesh"), donate_argnums=(0,))
def train_step(
    state: TrainState,
    rows: Batch | jax.Array,
    config: ModelConfig,
    train_config: TrainConfig,
    mesh: Mesh | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step on rows [B, seq_len + 2] (``loss``); donates ``state``.

    On a mesh, ``state`` lies as ``state_shardings`` says (and stays so) and ``rows`` as ``place_batch`` puts them.

    A step whose loss, gradient or update is not finite changes nothing but the step number ("skipped" is 1).

    Returns:
      (new state, metrics): float32 scalars, and "load", int32 [layers, E], the choices per expert; on a mesh, everywhere.
    """
    c = train_config
    # Of what is frozen no gradient is computed.
    part = trained(state.params, c)
    (total, aux), grads = _gradient(part, state.params, config, c, rows, mesh)
    load = aux.pop("load")
    norms = group_norms(grads)
    finite = jnp.isfinite(total) & jnp.isfinite(norms["model"]) & jnp.isfinite(norms["index"])
    # optax mixes Python numbers and integers, which strict dtype promotion (as in our tests) refuses.
    with jax.named_scope("optimizer"), jax.numpy_dtype_promotion("standard"):
        # By the step's own number, which skipped steps count in.
        optimizer = make_optimizer(config, c, lambda _: learning_rate(c)(state.step))
        updates, opt_state = optimizer.update(grads, state.opt_state, part)
        finite = finite & jnp.isfinite(optax.tree.norm(updates))
        params = merged(state.params, optax.apply_updates(part, updates))
        # Routing stops gradients at the correction bias and it is not decayed, so only the load moves it.
        if c.trains_model:
            params = update_biases(params, load, c.bias_update_speed)
        after = TrainState(state.step + 1, params, opt_state)
        # A step that went wrong leaves no trace but its number, with which the next has other data.
        before = dataclasses.replace(state, step=after.step)
        after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)
    metrics = {
        "total_loss": total,
        **aux,
        "grad_norm": norms["model"],
        "index_grad_norm": norms["index"],
        "learning_rate": learning_rate(c)(state.step),
        "skipped": jnp.where(finite, 0.0, 1.0),
    }
    table = _load_table(load)
    if table is not None:
        metrics["load"] = table
    if mesh is not None:
        after = lax.with_sharding_constraint(after, state_shardings(config, c, mesh))
        metrics = lax.with_sharding_constraint(metrics, NamedSharding(mesh, PartitionSpec()))
    return after, metrics


def _gradient(
    part: params_lib.Params,
    params: params_lib.Params,
    config: ModelConfig,
    c: TrainConfig,
    rows: Batch | jax.Array,
    mesh: Mesh | None,
) -> tuple[tuple[jax.Array, dict], params_lib.Params]:
    """Of ``loss`` with respect to ``part`` of ``params``, a few rows at a time if there is to be accumulation."""
    batch = as_batch(rows, c.batch_size)
    counts = counts_of(batch)

    def loss_of(part: params_lib.Params, rows: Batch | jax.Array) -> tuple[jax.Array, dict]:
        cast = params_lib.cast(merged(params, part), config, c.compute_dtype)
        return loss(cast, config, c, rows, mesh, counts)

    gradient = jax.value_and_grad(loss_of, has_aux=True)
    if c.accumulate == 1:
        return gradient(part, rows)
    # Row i goes to pass i % accumulate, so that each pass has as many rows of every device.
    passes = jax.tree.map(lambda x: x.reshape(-1, c.accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(sums: Any, rows: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, gradient(part, rows)), None

    one = jax.tree.map(lambda x: x[0], passes)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, part, one))
    return lax.scan(add, zeros, passes)[0]
