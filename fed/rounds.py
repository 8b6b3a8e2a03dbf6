"""What federated methods have in common: options, state, and federated averaging. :mod:`fed.driver` runs them."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array

from fed import ensemble
from fed.aggregate import Aggregator, Mean
from fed.clients import LocalOptions
from fed.cohort import Cohort, EngineOptions
from fed.models import Model, Params, as_model
from fed.sampling import Sampling
from fed.uploads import Upload, upload_bytes

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What all methods share.

    Attributes:
      rounds: of communication.
      seed: of everything random.
      local: clients' training.
      engine: how cohorts are computed.
      sampling: who takes part and replies.
      aggregator: how updates of one architecture are combined.
      uploads: hooks on updates (compression, clipping, attacks).
      empty_clients: "refuse" or "skip".
      bad_updates: "reject" (left out, logged with the client's number) or "raise".
      evaluate_every: rounds between evaluations; the last one is always evaluated.
      save_every: rounds between checkpoints, where a directory is given.
      most_skips: rounds in a row that may fail the quorum.
    """

    rounds: int = 20
    seed: int = 0
    local: LocalOptions = LocalOptions()
    engine: EngineOptions = EngineOptions()
    sampling: Sampling = Sampling()
    aggregator: Aggregator = Mean()
    uploads: tuple[Upload, ...] = ()
    empty_clients: str = "refuse"
    bad_updates: str = "reject"
    evaluate_every: int = 1
    save_every: int = 1
    most_skips: int = 10

    def __post_init__(self) -> None:
        for name in ("rounds", "evaluate_every", "save_every", "most_skips"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        for name, allowed in (
            ("empty_clients", ("refuse", "skip")),
            ("bad_updates", ("reject", "raise")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be {' or '.join(allowed)}; got {getattr(self, name)!r}."
                )


@struct.dataclass
class State:
    """All that a run remembers: one tree, which is what a checkpoint holds.

    Attributes:
      small: parameters of each client architecture.
      past: older versions of ``small``, newest first, for asynchronous arrival.
      personal: of each architecture its members' own parameters, stacked in order of client number; None where clients keep none.
      large: the server's parameters, or None.
      moments: optimiser state of the server's training, or None.
      extra: what a method adds.
    """

    small: tuple[Params, ...]
    past: tuple[tuple[Params, ...], ...]
    personal: tuple[Params, ...] | None
    large: Params | None
    moments: Any
    extra: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """What a run knows and a method may use. There are no labels but those that clients train on.

    Attributes:
      options: of the run.
      assignment: architecture of each client [N].
      rows: place of each client among those of its architecture [N].
      sizes: examples [N].
      proxy: inputs of the proxy set on the device.
      counts: label histogram of the clients [N, C], which methods may read only where clients agree to share it.
    """

    options: RunOptions
    assignment: np.ndarray
    rows: np.ndarray
    sizes: np.ndarray
    proxy: Array
    counts: np.ndarray


class Method:
    """A federated method; the defaults are those of federated averaging, for one or more architectures.

    Attributes:
      name: in reports.
      models: architectures of the clients.
      server: the server's model, or None.
      keep: the server needs each client's update, not only their mean; so not with an aggregator that hides them.
      averages: updates are combined by the run's aggregator.
      personal: clients begin a round with their own parameters.
      silent: nothing is communicated.
    """

    name = "fedavg"
    keep = False
    averages = True
    personal = False
    silent = False

    def __init__(self, models: Sequence[Model], server: Model | None = None):
        self.models = tuple(as_model(m) for m in models)
        self.server = None if server is None else as_model(server)

    def init(self, key: Array, context: Context) -> State:
        """The state before the first round."""
        keys = [jax.random.fold_in(key, i) for i in range(len(self.models) + 1)]
        small = tuple(m.init(k) for m, k in zip(self.models, keys[1:], strict=True))
        past = (
            (small,) * (context.options.sampling.staleness + 1)
            if context.options.sampling.buffer
            else ()
        )
        personal = None
        if self.personal:
            members = np.bincount(context.assignment, minlength=len(self.models))
            personal = tuple(
                jax.tree.map(lambda x, n=n: jnp.repeat(x[None], n, axis=0), p)
                for p, n in zip(small, members, strict=True)
            )
        large = None if self.server is None else self.server.init(keys[0])
        return State(small, past, personal, large, None, None)

    def update(
        self, state: State, replies: list[Cohort], context: Context, key: Array
    ) -> tuple[State, dict[str, float]]:
        """What the server does with the replies, one cohort per architecture: (state, metrics)."""
        return self.average(state, replies, context, key), {}

    def average(self, state: State, replies: list[Cohort], context: Context, key: Array) -> State:
        """Each architecture's parameters plus its combined update; architectures without a reply stay as they are."""
        small = []
        for i, (params, cohort) in enumerate(zip(state.small, replies, strict=True)):
            update = combine(cohort, context.options.aggregator, jax.random.fold_in(key, i))
            small.append(params if update is None else _added(params, update))
        return state.replace(small=tuple(small))

    def transfer(self, context: Context) -> tuple[list[int], list[int]]:
        """Bytes down to and up from one client of each architecture per round."""
        if self.silent:
            return [0] * len(self.models), [0] * len(self.models)
        up = [upload_bytes(context.options.uploads, m.shapes) for m in self.models]
        return [m.nbytes for m in self.models], up


def members(
    state: State, replies: list[Cohort], context: Context
) -> list[tuple[Params | None, np.ndarray]]:
    """Every accepted reply as a model: what the client began with plus its update, kept.

    Returns:
      per architecture (parameters stacked [K, ...], numbers of the clients [K]); (None, none) where nobody replied.
    """
    found = []
    for a, cohort in enumerate(replies):
        if not cohort.accepted.any():
            found.append((None, cohort.clients[:0]))
        elif state.personal is not None:
            found.append(ensemble.trained(state.personal[a], cohort, context.rows[cohort.clients]))
        elif state.past and cohort.ages is not None:
            versions = jax.tree.map(lambda *x: jnp.stack(x), *(past[a] for past in state.past))
            found.append(ensemble.trained(versions, cohort, cohort.ages))
        else:
            found.append(ensemble.trained(state.small[a], cohort))
    return found


def keep_personal(
    state: State, members: Sequence[tuple[Params | None, np.ndarray]], context: Context
) -> State:
    """Each member's model (of :func:`members`, or changed since) in its own place among the personal ones."""
    stacked = list(state.personal)
    for a, (params, clients) in enumerate(members):
        if len(clients):
            rows = context.rows[clients]
            stacked[a] = jax.tree.map(lambda s, p, rows=rows: s.at[rows].set(p), stacked[a], params)
    return state.replace(personal=tuple(stacked))


def in_chunks(f: Callable[[Params], Any], stacked: Params, rows: np.ndarray, chunk: int) -> Any:
    """``f`` of ``rows`` of stacked models, ``chunk`` at a time, which bounds its memory; its results [K, ...] as one."""
    parts = [
        f(jax.tree.map(lambda x, some=rows[at : at + chunk]: x[some], stacked))
        for at in range(0, len(rows), chunk)
    ]
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


@jax.jit
def _added(params: Params, update: Params) -> Params:
    return jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, update)


def combine(cohort: Cohort, aggregator: Aggregator, key: Array) -> Params | None:
    """The cohort's combined update; None if nobody's was usable."""
    if cohort.mean is None or isinstance(aggregator, Mean):
        return cohort.mean
    good = np.flatnonzero(cohort.accepted)
    kept = jax.tree.map(lambda x: x[good], cohort.updates)
    return aggregator.combine(
        kept, jnp.asarray(cohort.weights[good]), jnp.asarray(cohort.clients[good]), key
    )
