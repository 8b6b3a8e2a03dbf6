"""Local training of one client, as a pure function; :mod:`fed.cohort` runs it for thousands.

A client's batches are padded to the shapes of its group. Nothing may move on a step without examples: parameters, optimiser state
and step counter are all selected, else momentum and Adam drift (spec 5.2 measured 7e-1 and 4e-2).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from fed.models import Model, Params

OPTIMIZERS = ("sgd", "momentum", "adam", "adamw")


@struct.dataclass
class Batches:
    """What one client trains on: rows of a flat data set, by number.

    Attributes:
      inputs: [N, ...]; in a simulation everybody's, at a real client its own.
      labels: int32 [N, ...].
      index: int32 [S, B], examples of each step; anything where masked out.
      mask: bool [S, B].
    """

    inputs: Array
    labels: Array
    index: Int[Array, "S B"]
    mask: Bool[Array, "S B"]


# (params, inputs, labels, key) -> losses of the examples [B]
ExampleLosses = Callable[[Params, Array, Array, Array], Float[Array, " B"]]


@runtime_checkable
class GradientRule(Protocol):
    """How a step's gradient is made from its examples; the place for per-example clipping and noise (fed.privacy).

    Must be hashable: it is static under jit.
    """

    def __call__(
        self,
        losses: ExampleLosses,
        params: Params,
        inputs: Array,
        labels: Array,
        mask: Bool[Array, " B"],
        key: Array,
    ) -> tuple[Float[Array, ""], Params]:
        """(mean loss of the real examples, gradient)."""
        ...


@dataclasses.dataclass(frozen=True)
class LocalOptions:
    """How clients train.

    Attributes:
      epochs: passes over the client's data per round.
      batch_size: examples per step.
      steps: this many full batches instead of epochs, the same for every client.
      optimizer: sgd, momentum (0.9), adam or adamw. Clients are stateless: its state begins anew every round.
      learning_rate: of the optimiser.
      proximal: FedProx' mu: adds mu/2 * ||w - w_start||^2.
      gradient: replaces the mean gradient of the batch.
    """

    epochs: int = 1
    batch_size: int = 16
    steps: int | None = None
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    proximal: float = 0.0
    gradient: GradientRule | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1 or None; got {self.steps}.")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer must be one of {', '.join(OPTIMIZERS)}; got {self.optimizer!r}."
            )
        if self.proximal < 0 or not self.learning_rate > 0:
            raise ValueError(
                f"learning_rate must be positive and proximal not negative; got {self.learning_rate} and {self.proximal}."
            )


def make_optimizer(name: str, learning_rate: float) -> optax.GradientTransformation:
    """The optimiser of that name."""
    makers = {
        "sgd": optax.sgd,
        "momentum": functools.partial(optax.sgd, momentum=0.9),
        "adam": optax.adam,
        "adamw": optax.adamw,
    }
    return makers[name](learning_rate)


def update_params(
    optimizer: optax.GradientTransformation, gradient: Params, moments: Any, params: Params
) -> tuple[Params, Any]:
    """One step of an optimiser: (new params, new state)."""
    # optax mixes Python numbers and integers, which strict dtype promotion (as in our tests) refuses.
    with jax.numpy_dtype_promotion("standard"):
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments


def cross_entropy(
    logits: Float[Array, "B *S C"], labels: Int[Array, " B *S"]
) -> Float[Array, " B"]:
    """Cross-entropy of each example; of a sequence the mean over its positions."""
    chosen = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    losses = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(logits * chosen, axis=-1)
    return jnp.mean(losses.reshape(losses.shape[0], -1), axis=1)


def masked_mean(values: Float[Array, " B"], mask: Bool[Array, " B"]) -> Float[Array, ""]:
    """Mean over the real examples, 0 if there is none; what stands in padded ones cannot reach it."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1).astype(
        values.dtype
    )


def mean_gradient(
    losses: ExampleLosses,
    params: Params,
    inputs: Array,
    labels: Array,
    mask: Bool[Array, " B"],
    key: Array,
) -> tuple[Float[Array, ""], Params]:
    """The ordinary :class:`GradientRule`: gradient of the mean loss of the real examples."""
    return jax.value_and_grad(lambda p: masked_mean(losses(p, inputs, labels, key), mask))(params)


@struct.dataclass
class StepState:
    """What a local step reads and replaces: parameters, the optimiser's state, int32 steps done, float32 sum of their losses."""

    # Arrays, or what JAX puts in their place: shapes.
    params: Params
    optimizer: Any
    steps: Any
    loss: Any


def begin(params: Params, options: LocalOptions) -> StepState:
    """The state before a client's first step."""
    optimizer = make_optimizer(options.optimizer, options.learning_rate)
    return StepState(params, optimizer.init(params), jnp.int32(0), jnp.float32(0.0))


def local_step(
    model: Model,
    start: Params,
    state: StepState,
    inputs: Array,
    labels: Array,
    mask: Bool[Array, " B"],
    key: Array,
    options: LocalOptions,
) -> StepState:
    """One step on one batch; ``key`` is the client's of this round, from which the step's own is folded."""

    def losses(params: Params, x: Array, y: Array, k: Array) -> Array:
        return cross_entropy(model.apply(params, x, k), y)

    own = jax.random.fold_in(key, state.steps)
    rule = options.gradient or mean_gradient
    loss, gradient = rule(losses, state.params, inputs, labels, mask, own)
    if options.proximal:
        gradient = jax.tree.map(
            lambda g, w, w0: g + options.proximal * (w - w0), gradient, state.params, start
        )
    optimizer = make_optimizer(options.optimizer, options.learning_rate)
    trained, moments = update_params(optimizer, gradient, state.optimizer, state.params)
    new = StepState(trained, moments, state.steps + 1, state.loss + loss)
    return freeze(jnp.any(mask), new, state)


def freeze(live: Bool[Array, ""], new: StepState, old: StepState) -> StepState:
    """The new state where the step had an example, else the old one: all of it."""
    return jax.tree.map(lambda a, b: jnp.where(live, a, b), new, old)


def local_train(
    model: Model, params: Params, batches: Batches, key: Array, options: LocalOptions
) -> tuple[Params, dict[str, Array]]:
    """Trains one client: pure, traceable under jit, vmap and shard_map. The simulation and a real client run this same function.

    Args:
      model: the architecture.
      params: where it starts.
      batches: its examples by step.
      key: of this client in this round: fold_in(key of the round, client), so that it is the same whoever else takes part.
      options: hyper-parameters.

    Returns:
      (trained params, {"loss": mean loss over its steps, "steps": steps that had examples, "examples": examples seen}).
    """

    def step(state: StepState, row: tuple[Array, Array]) -> tuple[StepState, None]:
        index, mask = row
        x, y = jnp.take(batches.inputs, index, axis=0), jnp.take(batches.labels, index, axis=0)
        return local_step(model, params, state, x, y, mask, key, options), None

    state, _ = jax.lax.scan(step, begin(params, options), (batches.index, batches.mask))
    steps = jnp.maximum(state.steps, 1).astype(jnp.float32)
    return state.params, {
        "loss": state.loss / steps,
        "steps": state.steps,
        "examples": jnp.sum(batches.mask, dtype=jnp.int32),
    }
