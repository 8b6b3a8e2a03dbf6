"""The course of every federated method: ask, train, check, combine, teach, evaluate, save. Methods differ in what the server does.

Everything random is a function of (seed, round, client), so a run that goes on from a checkpoint gives the same bits.
"""

import dataclasses
import logging
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array

from fed import costs, sampling
from fed.aggregate import Aggregator, Mean
from fed.clients import LocalOptions
from fed.cohort import Cohort, EngineOptions, join, train_cohort
from fed.data import Dataset, Splits, Unlabelled
from fed.errors import BadUpdate, QuorumLost
from fed.evaluate import Evaluation, worst
from fed.history import History
from fed.models import Model, Params, check_same_task
from fed.partition import Partition
from fed.sampling import Fleet, Plan, Sampling
from fed.schedule import buckets, steps_of
from fed.store import Store
from fed.uploads import Upload, upload_bytes

logger = logging.getLogger(__name__)

OnRound = Callable[[dict[str, Any]], None]


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
        for name in ("rounds", "evaluate_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        for name, allowed in (("empty_clients", ("refuse", "skip")), ("bad_updates", ("reject", "raise"))):
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
      keep: the server needs each client's update, not only their mean.
      personal: clients begin a round with their own parameters.
      silent: nothing is communicated.
    """

    name = "fedavg"
    keep = False
    personal = False
    silent = False

    def __init__(self, models: Sequence[Model], server: Model | None = None):
        self.models, self.server = tuple(models), server

    def init(self, key: Array, context: Context) -> State:
        """The state before the first round."""
        keys = [jax.random.fold_in(key, i) for i in range(len(self.models) + 1)]
        small = tuple(m.init(k) for m, k in zip(self.models, keys[1:], strict=True))
        past = (small,) * (context.options.sampling.staleness + 1) if context.options.sampling.buffer else ()
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


def run(
    method: Method,
    data: Splits,
    partition: Partition,
    options: RunOptions = RunOptions(),
    *,
    assignment: Sequence[int] | None = None,
    directory: str | pathlib.Path | None = None,
    on_round: OnRound | None = None,
) -> History:
    """Runs a method.

    Args:
      method: what the server does.
      data: training, proxy and test parts.
      partition: of ``data.train``.
      options: of the run.
      assignment: architecture of each client; default: in turn.
      directory: gets checkpoints and ``rounds.jsonl``; a run found there goes on.
      on_round: called with each round's record.

    Raises:
      ValueError: for data, partition and models that do not fit each other, and empty clients (named).
      BadUpdate: if ``bad_updates="raise"`` and a client sent one.
      QuorumLost: after ``most_skips`` skipped rounds in a row.
    """
    driver = _Driver(method, data, partition, options, assignment)
    store = None if directory is None else Store(directory, driver.identity())
    state, records = driver.begin(store)
    skipped = 0
    for number in range(len(records), options.rounds):
        state, record = driver.round(state, number)
        records.append(record)
        skipped = skipped + 1 if record["skipped"] else 0
        if store is not None and ((number + 1) % options.save_every == 0 or number + 1 == options.rounds):
            store.save(number + 1, state, records)
        if on_round is not None:
            on_round(record)
        if skipped >= options.most_skips:
            raise QuorumLost(
                f"the quorum of {options.sampling.quorum} usable replies failed in {skipped} rounds in a row; lower quorum "
                "or dropout, or raise participation or deadline_s."
            )
    return driver.history(state, records)


class _Driver:
    """One run's constants: arrays on the device, plans, costs."""

    def __init__(
        self,
        method: Method,
        data: Splits,
        partition: Partition,
        options: RunOptions,
        assignment: Sequence[int] | None,
    ):
        self.method, self.options, self.partition = method, options, partition
        _check(method, data, partition, options)
        count = len(partition)
        chosen = np.arange(count) % len(method.models) if assignment is None else np.asarray(assignment)
        if chosen.shape != (count,) or not np.isin(chosen, range(len(method.models))).all():
            raise ValueError(
                f"assignment must give each of {count} clients an architecture below {len(method.models)}; got {chosen.tolist()}."
            )
        rows = np.zeros(count, np.int64)
        for a in range(len(method.models)):
            rows[chosen == a] = np.arange((chosen == a).sum())
        self.statistics = partition.statistics(data.train.labels, data.train.classes)
        self.context = Context(
            options, chosen, rows, partition.sizes, jnp.asarray(data.proxy.inputs), self.statistics.histogram
        )
        self.data = (jnp.asarray(data.train.inputs), jnp.asarray(data.train.labels))
        self.key = jax.random.key(options.seed)
        self.evaluation = Evaluation(data.test, self.statistics.histogram)
        self.validation = Evaluation(data.validation, self.statistics.histogram)
        self.costs = [costs.measure(m, options.local) for m in method.models]
        self.down, self.up = method.transfer(self.context)
        local = options.local
        self.fleet = Fleet(
            partition.sizes.astype(np.int64),
            steps_of(partition.sizes.astype(np.int64), local.epochs, local.batch_size, local.steps),
            np.array([self.costs[a].step_flops for a in chosen]),
            np.array([self.down[a] + self.up[a] for a in chosen], np.float64),
        )
        self.plans: list[Plan] | None = None
        if options.sampling.buffer:
            self.plans = sampling.asynchronous(options.sampling, self.fleet, options.seed, options.rounds)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be gone on from; the number of rounds may grow."""
        return {
            "method": self.method.name,
            "models": [m.name for m in self.method.models],
            "server": None if self.method.server is None else self.method.server.name,
            "options": repr(dataclasses.replace(self.options, rounds=1, engine=EngineOptions(), save_every=1)),
            "method_options": repr(getattr(self.method, "options", None)),
            "partition": repr(self.partition),
        }

    def begin(self, store: Store | None) -> tuple[State, list[dict[str, Any]]]:
        """The state to go on from, and the records before it."""
        state = self.method.init(jax.random.fold_in(self.key, 0), self.context)
        return (state, []) if store is None else store.restore(state)

    def round(self, state: State, number: int) -> tuple[State, dict[str, Any]]:
        """One round: (state after, record). A skipped round leaves the state as it was."""
        began = time.perf_counter()
        if self.plans is not None:
            plan = self.plans[number]
        else:
            plan = sampling.plan(self.options.sampling, self.fleet, self.options.seed, number)
        replies = self._train(state, plan, number)
        usable = int(sum(c.accepted.sum() for c in replies))
        record = self._account(plan, replies, number) | {"skipped": usable < self.options.sampling.quorum}
        if not record["skipped"]:
            key = jax.random.fold_in(jax.random.fold_in(self.key, 1), number)
            state, metrics = self.method.update(state, replies, self.context, key)
            if state.past:
                state = state.replace(past=(state.small, *state.past[:-1]))
            record |= {k: float(v) for k, v in metrics.items()}
        last = number + 1 == self.options.rounds
        if last or (number + 1) % self.options.evaluate_every == 0:
            record |= self._evaluate(state)
        return state, record | {"seconds": time.perf_counter() - began}

    def _train(self, state: State, plan: Plan, number: int) -> list[Cohort]:
        options, out = self.options, []
        key = jax.random.fold_in(jax.random.fold_in(self.key, 2), number)
        keep = self.method.keep or not isinstance(options.aggregator, Mean)
        weights = self.context.sizes.astype(np.float32)
        architecture = self.context.assignment[plan.replied]
        for a, model in enumerate(self.method.models):
            cohorts = []
            for age in np.unique(plan.ages[architecture == a]):
                here = (architecture == a) & (plan.ages == age)
                schedule = buckets(
                    self.partition,
                    plan.replied[here],
                    seed=options.seed,
                    round_number=number,
                    epochs=options.local.epochs,
                    batch_size=options.local.batch_size,
                    steps=options.local.steps,
                    limits=plan.limits[here],
                    most=options.engine.buckets,
                )
                personal = state.personal is not None
                start = state.personal[a] if personal else (state.past[age][a] if state.past else state.small[a])
                cohorts.append(
                    train_cohort(
                        model,
                        start,
                        self.data,
                        list(schedule),
                        key,
                        options.local,
                        options.engine,
                        weights=weights / np.float32(np.sqrt(1 + age)),
                        personal=self.context.rows if personal else None,
                        uploads=options.uploads,
                        keep=keep,
                    )
                )
            out.append(join(cohorts))
        self._complain(out, number)
        return out

    def _complain(self, replies: list[Cohort], number: int) -> None:
        for cohort in replies:
            for client, norm in zip(cohort.clients, cohort.norm, strict=True):
                if client not in cohort.rejected:
                    continue
                what = "is not finite" if not np.isfinite(norm) else f"has norm {norm:.3g}"
                message = f"update of client {client} in round {number} {what}"
                if self.options.bad_updates == "raise":
                    raise BadUpdate(f"{message}; it is left out with bad_updates='reject'.")
                logger.warning("%s; rejected", message)

    def _account(self, plan: Plan, replies: list[Cohort], number: int) -> dict[str, Any]:
        """Who took part, what it cost."""
        assignment = self.context.assignment
        steps = {int(k): int(n) for c in replies for k, n in zip(c.clients, c.steps, strict=True)}
        losses = np.concatenate([c.loss[c.accepted] for c in replies])
        flops = sum(n * self.costs[assignment[k]].step_flops for k, n in steps.items())
        asked = assignment[plan.asked]
        return {
            "round": number,
            "asked": len(plan.asked),
            "replied": len(plan.replied),
            "dropped": plan.dropped.tolist(),
            "late": plan.late.tolist(),
            "rejected": [k for c in replies for k in c.rejected],
            "loss": float(losses.mean()) if len(losses) else float("nan"),
            "bytes_down": int(sum(self.down[a] for a in asked)),
            "bytes_up": int(sum(self.up[a] for a in assignment[plan.replied])),
            "client_flops": float(flops),
            "simulated_seconds": plan.seconds,
        }

    def _evaluate(self, state: State) -> dict[str, float]:
        found: dict[str, float] = {}
        method, context = self.method, self.context
        if state.large is not None and method.server is not None:
            for name, on in (("large_accuracy", self.evaluation), ("large_validation", self.validation)):
                found[name] = float(on.accuracy(on.hits(method.server, state.large)))
        means, validation, own, members = [], [], [], []
        for a, model in enumerate(method.models):
            clients = np.flatnonzero(context.assignment == a)
            many = state.personal is not None
            params = state.personal[a] if many else state.small[a]
            hits = self.evaluation.hits(model, params, many=many)
            means.append(np.broadcast_to(self.evaluation.accuracy(hits), len(clients)))
            seen = self.validation.hits(model, params, many=many)
            validation.append(np.broadcast_to(self.validation.accuracy(seen), len(clients)))
            own.append(self.evaluation.own(hits, clients))
            members.append(float(np.mean(means[-1])))
        each = np.concatenate(own)
        found["small_accuracy"] = float(np.concatenate(means).mean())
        found["small_validation"] = float(np.concatenate(validation).mean())
        found["own_accuracy"], found["own_worst"] = float(each.mean()), worst(each)
        if len(members) > 1:
            found |= {f"small_accuracy_{m.name}": v for m, v in zip(method.models, members, strict=True)}
        return found

    def history(self, state: State, records: list[dict[str, Any]]) -> History:
        """The run's result."""
        per_client = [
            dataclasses.asdict(c) | {"name": m.name, "bytes_down": d, "bytes_up": u}
            for c, m, d, u in zip(self.costs, self.method.models, self.down, self.up, strict=True)
        ]
        return History(
            self.method.name,
            records,
            state.large,
            state.small,
            state.personal,
            (self.method.server, self.method.models),
            str(self.statistics),
            {"clients": per_client},
        )


def _check(method: Method, data: Splits, partition: Partition, options: RunOptions) -> None:
    if not isinstance(data.proxy, Unlabelled):
        raise TypeError(
            f"data.proxy must be fed.data.Unlabelled, which has no labels to read; got {type(data.proxy).__name__}; take "
            "dataset.unlabelled(indices)."
        )
    if partition.total != len(data.train):
        raise ValueError(
            f"partition must be of data.train, {len(data.train)} examples; got one of {partition.total}; partition after the split."
        )
    empty = np.flatnonzero(partition.sizes == 0)
    if len(empty) and options.empty_clients == "refuse":
        raise ValueError(
            f"every client must have examples; client {', '.join(map(str, empty[:10]))} has none; give it some or set "
            "empty_clients='skip'."
        )
    if len(empty) == len(partition):
        raise ValueError(f"a client must have examples; all {len(partition)} have none.")
    server = {} if method.server is None else {"the server's model": method.server}
    models = server | {f"client model {i}": m for i, m in enumerate(method.models)}
    check_same_task(models)
    first = method.models[0]
    if first.inputs.shape != data.train.shape or first.outputs[0].shape[-1] < data.train.classes:
        raise ValueError(
            f"models must take {data.train.shape} and tell {data.train.classes} classes; {first.name} takes {first.inputs.shape} "
            f"and tells {first.outputs[0].shape[-1]}."
        )
    _note_single_class(partition, data.train)


def _note_single_class(partition: Partition, train: Dataset) -> None:
    """Clients of one class are legal, and worth knowing of: their models learn nothing but to name it."""
    if train.labels.ndim > 1:
        return
    single = [k for k, part in enumerate(partition) if len(part) and len(set(train.labels[part].tolist())) == 1]
    if single:
        logger.warning("clients with one class only: %s", ", ".join(map(str, single)))
