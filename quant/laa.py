"""When a step moves the weights: low-precision asynchronous accumulation as a pure function of a small state.

Gradients at low widths are noisy. They are collected over several steps, while steps at high widths go on, and move the weights
together; so they were taken at different weights, which is meant. OTARo's numbers aren't public; these are the specification's
reconstruction R-LAA (2.3).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

REDUCTIONS, FLUSHES = ("mean", "sum"), ("drop", "apply")


@dataclasses.dataclass(frozen=True)
class LaaConfig:
    """The accumulation; hashable, static under jit.

    Attributes:
      low: widths whose gradients are collected; () for none: every step moves the weights.
      every: how many of them make one optimiser step.
      reduce: "mean" or "sum" of them.
      flush: what becomes of those that are left at the end: "drop", or "apply".
    """

    low: tuple[int, ...] = (4, 3)
    every: int = 8
    reduce: str = "mean"
    flush: str = "drop"

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"every must be at least 1; got {self.every}.")
        if self.reduce not in REDUCTIONS:
            raise ValueError(f"reduce must be one of {REDUCTIONS}; got {self.reduce!r}.")
        if self.flush not in FLUSHES:
            raise ValueError(f"flush must be one of {FLUSHES}; got {self.flush!r}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LaaState:
    """Collected gradients.

    Attributes:
      total: a tree like the parameters, or () if nothing is ever collected.
      count: int32, how many are in it.
    """

    total: Any
    count: Any


def init(config: LaaConfig, params: Any) -> LaaState:
    """Nothing collected."""
    total = jax.tree.map(jnp.zeros_like, params) if config.low else ()
    return LaaState(total, jnp.zeros((), jnp.int32))


def _reduced(config: LaaConfig, total: Any, count: Int[Array, ""]) -> Any:
    if config.reduce == "sum":
        return total
    return jax.tree.map(lambda g: g / jnp.maximum(count, 1).astype(g.dtype), total)


def accumulate(
    config: LaaConfig, state: LaaState, width: Int[Array, "..."] | int, grads: Any
) -> tuple[Bool[Array, ""], Any, LaaState]:
    """What a step's gradients do.

    Args:
      config: the accumulation.
      state: what was collected.
      width: the step's; may be traced. With ``low`` empty it isn't looked at.
      grads: the step's.

    Returns:
      (whether the optimiser takes a step, the gradients that it then takes, new state). If it doesn't, moments, step count and
      weight decay must not move either.
    """
    if not config.low:
        return jnp.ones((), bool), grads, state
    low = jnp.isin(jnp.asarray(width, jnp.int32), jnp.asarray(config.low, jnp.int32))
    count = state.count + low.astype(jnp.int32)
    full = low & (count == config.every)
    total = jax.tree.map(lambda a, g: jnp.where(low, a + g, a), state.total, grads)
    taken = jax.tree.map(lambda a, g: jnp.where(full, a, g), _reduced(config, total, count), grads)
    emptied = jax.tree.map(lambda a: jnp.where(full, jnp.zeros_like(a), a), total)
    return ~low | full, taken, LaaState(emptied, jnp.where(full, 0, count))


def flush(config: LaaConfig, state: LaaState) -> tuple[Any | None, LaaState]:
    """At the end of a run: (gradients for one more optimiser step, or None; emptied state). Not for traced code."""
    if not config.low:
        return None, state
    empty = LaaState(jax.tree.map(jnp.zeros_like, state.total), jnp.zeros((), jnp.int32))
    if config.flush == "drop" or int(state.count) == 0:
        return None, empty
    return _reduced(config, state.total, state.count), empty
