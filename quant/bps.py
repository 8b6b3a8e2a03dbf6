"""Which width each step trains: bit-width path search as a pure function of a small state.

OTARo's formula isn't public. This is the specification's reconstruction R-BPS (2.2): every width once, high to low, then the
one with the highest upper confidence bound. Both the score and the schedule can be replaced (``BpsConfig``).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.sefp import MASTER_WIDTH

WIDTHS = (8, 7, 6, 5, 4, 3)
READINGS = ("loss_seeking", "loss_avoiding")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BpsState:
    """What the search knows; arrays, so that it can be a part of a compiled step and of a checkpoint.

    Attributes:
      step: int32, steps taken.
      visits: int32 [B], per width.
      losses: float32 [B], running losses; 0 before the first visit.
    """

    step: Any
    visits: Any
    losses: Any


def upper_confidence(config: "BpsConfig", state: BpsState) -> Float[Array, " B"]:
    """mu + exploration * sqrt(ln t / n), mu the running loss between the lowest (0) and the highest (1); t counts from 1.

    "loss_avoiding" turns mu round. A width whose loss isn't finite has the highest.
    """
    finite = jnp.isfinite(state.losses)
    lowest = jnp.min(state.losses, initial=jnp.inf, where=finite)
    highest = jnp.max(state.losses, initial=-jnp.inf, where=finite)
    span = jnp.where(highest > lowest, highest - lowest, 1.0)
    mu = jnp.where(finite, (state.losses - lowest) / span, 1.0)
    mu = mu if config.reading == "loss_seeking" else 1.0 - mu
    t = (state.step + 1).astype(jnp.float32)
    visits = jnp.maximum(state.visits, 1).astype(jnp.float32)
    return mu + config.exploration * jnp.sqrt(jnp.log(t) / visits)


def path_search(config: "BpsConfig", state: BpsState) -> Int[Array, ""]:
    """Every width once, high to low; then that of the highest score, of equal ones the larger."""
    number = len(config.widths)
    best = jnp.argmax(config.score(config, state)).astype(jnp.int32)
    return jnp.where(state.step < number, state.step, best)


def round_robin(config: "BpsConfig", state: BpsState) -> Int[Array, ""]:
    """One width after another."""
    return state.step % len(config.widths)


def uniform(config: "BpsConfig", state: BpsState) -> Int[Array, ""]:
    """Drawn from ``config.seed`` and the step's number."""
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    return jax.random.randint(key, (), 0, len(config.widths), jnp.int32)


@dataclasses.dataclass(frozen=True)
class BpsConfig:
    """The search; hashable, static under jit.

    Attributes:
      widths: descending, from 8 to 1.
      schedule: (config, state) -> index of the next step's width.
      score: (config, state) -> float32 [B], for ``path_search``.
      reading: what of a loss is worth a visit: "loss_seeking" trains the worst width, "loss_avoiding" the best.
      exploration: lambda; less than about 1 ends on one width, a few units are nearly round robin.
      decay: of the running losses; each new one counts 1 - decay. The paper's isn't public.
      seed: of ``uniform``.
    """

    widths: tuple[int, ...] = WIDTHS
    schedule: Callable[["BpsConfig", BpsState], jax.Array] = path_search
    score: Callable[["BpsConfig", BpsState], jax.Array] = upper_confidence
    reading: str = "loss_seeking"
    exploration: float = 1.0
    decay: float = 0.9
    seed: int = 0

    def __post_init__(self):
        inside = all(1 <= w <= MASTER_WIDTH for w in self.widths)
        if not self.widths or not inside or list(self.widths) != sorted(set(self.widths))[::-1]:
            raise ValueError(
                f"widths must be different ones from {MASTER_WIDTH} down to 1, descending; got {self.widths}."
            )
        if self.reading not in READINGS:
            raise ValueError(f"reading must be one of {READINGS}; got {self.reading!r}.")
        if not self.exploration >= 0:
            raise ValueError(f"exploration must be >= 0; got {self.exploration}.")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1); got {self.decay}.")


def init(config: BpsConfig) -> BpsState:
    """The state before the first step."""
    number = len(config.widths)
    return BpsState(
        jnp.zeros((), jnp.int32), jnp.zeros(number, jnp.int32), jnp.zeros(number, jnp.float32)
    )


def choose(config: BpsConfig, state: BpsState) -> Int[Array, ""]:
    """Index in ``config.widths`` of the next step's width."""
    return config.schedule(config, state)


def observe(
    config: BpsConfig, state: BpsState, index: Int[Array, ""] | int, loss: Float[Array, ""] | float
) -> BpsState:
    """The state after a step at that width with that loss; one that isn't finite counts as a visit only."""
    old = state.losses[index]
    new = jnp.asarray(loss, jnp.float32)
    running = jnp.where(
        state.visits[index] == 0, new, config.decay * old + (1 - config.decay) * new
    )
    running = jnp.where(jnp.isfinite(new), running, old)
    return BpsState(
        state.step + 1, state.visits.at[index].add(1), state.losses.at[index].set(running)
    )
