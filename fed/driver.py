"""The course of every federated method: ask, train, check, combine, teach, evaluate, save.

Everything random is a function of (seed, round, client), so a run that goes on from a checkpoint gives the same bits.
"""

import dataclasses
import logging
import pathlib
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fed import costs, sampling
from fed.aggregate import Mean, check_clients, minimum_replies
from fed.cohort import Cohort, EngineOptions, choose, join, train_cohort
from fed.data import Dataset, Splits, Unlabelled
from fed.errors import BadUpdate, QuorumLost
from fed.evaluate import Evaluation, worst
from fed.history import History
from fed.models import check_same_task, inputs_of
from fed.partition import Partition
from fed.privacy import check_private, spent
from fed.rounds import Context, Method, RunOptions, State
from fed.sampling import Fleet, Plan
from fed.schedule import Bucket, buckets, steps_of
from fed.secure_aggregation import QuorumNotMet
from fed.store import Store
from fed.uploads import Attack

logger = logging.getLogger(__name__)

OnRound = Callable[[dict[str, Any]], None]


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
      ValueError: for data, partition, models and aggregator that do not fit each other, and empty clients (named).
      TypeError: for a proxy set with labels.
      BadUpdate: if ``bad_updates="raise"`` and a client sent one.
      QuorumLost: after ``most_skips`` skipped rounds in a row.
    """
    driver = Driver(method, data, partition, options, assignment)
    store = None if directory is None else Store(directory, driver.identity())
    state, records = driver.begin(store)
    # Of rounds before an interruption too.
    skipped = len(records) - max(
        (n + 1 for n, r in enumerate(records) if not r["skipped"]), default=0
    )
    for number in range(len(records), options.rounds):
        state, record = driver.round(state, number)
        records.append(record)
        skipped = skipped + 1 if record["skipped"] else 0
        if store is not None and (
            (number + 1) % options.save_every == 0 or number + 1 == options.rounds
        ):
            store.save(number + 1, state, records)
        if on_round is not None:
            on_round(record)
        if skipped >= options.most_skips:
            raise QuorumLost(
                f"{skipped} rounds in a row were skipped, the last because {record['reason']}; lower quorum or dropout, or raise "
                "participation or deadline_s."
            )
    return driver.history(state, records)


class Driver:
    """One run's constants: arrays on the device, plans, costs."""

    def __init__(
        self,
        method: Method,
        data: Splits,
        partition: Partition,
        options: RunOptions,
        assignment: Sequence[int] | None,
    ):
        self.method, self.options, self.partition, self.splits = method, options, partition, data
        chosen = _assigned(assignment, len(partition), len(method.models))
        _check(method, data, partition, options)
        _check_aggregator(method, partition, options, chosen)
        # A method that combines no updates has nothing from a private aggregator.
        self.private = (
            options if method.averages else dataclasses.replace(options, aggregator=Mean())
        )
        check_private(self.private, partition.sizes, chosen)
        spent(
            self.private, options.rounds
        )  # for want of the accountant it fails now, not at the end
        rows = np.zeros(len(partition), np.int64)
        for a in range(len(method.models)):
            rows[chosen == a] = np.arange((chosen == a).sum())
        self.statistics = partition.statistics(data.train.labels, data.train.classes)
        self.context = Context(
            options,
            chosen,
            rows,
            partition.sizes,
            jnp.asarray(data.proxy.inputs),
            self.statistics.histogram,
        )
        self.data = (jnp.asarray(data.train.inputs), jnp.asarray(data.train.labels))
        self.key = jax.random.key(options.seed)
        self.evaluation = Evaluation(data.test, data.validation, self.statistics.histogram)
        self.flops = [costs.step_flops(m, options.local) for m in method.models]
        self.down, self.up = method.transfer(self.context)
        local = options.local
        self.fleet = Fleet(
            partition.sizes.astype(np.int64),
            steps_of(partition.sizes.astype(np.int64), local.epochs, local.batch_size, local.steps),
            np.array([self.flops[a] for a in chosen]),
            np.array([self.down[a] + self.up[a] for a in chosen], np.float64),
        )
        self.engines: dict[int, EngineOptions] = {}
        self.plans: list[Plan] | None = None
        if options.sampling.buffer:
            self.plans = sampling.asynchronous(
                options.sampling, self.fleet, options.seed, options.rounds
            )

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be gone on from; the number of rounds may grow."""
        data = self.splits
        arrays = [data.proxy.inputs]
        for part in (data.train, data.validation, data.test):
            arrays += [part.inputs, part.labels]
        return {
            "method": self.method.name,
            "models": [m.name for m in self.method.models],
            "server": None if self.method.server is None else self.method.server.name,
            "options": repr(
                dataclasses.replace(self.options, rounds=1, engine=EngineOptions(), save_every=1)
            ),
            "method_options": repr(getattr(self.method, "options", None)),
            "partition": f"{self.partition!r} {_digest(self.partition.flat, self.partition.sizes)}",
            "assignment": _digest(self.context.assignment),
            "data": f"{data.train.name} {_digest(*arrays)}",
        }

    def begin(self, store: Store | None) -> tuple[State, list[dict[str, Any]]]:
        """The state to go on from, and the records before it."""
        state = self.method.init(jax.random.fold_in(self.key, 0), self.context)
        if store is None:
            return state, []
        state, records = store.restore(state)
        for a, backend in enumerate(records[-1].get("backends", ()) if records else ()):
            if backend is not None:  # what was measured holds for the rest of the run
                self.engines[a] = dataclasses.replace(self.options.engine, backend=backend)
        return state, records

    def round(self, state: State, number: int) -> tuple[State, dict[str, Any]]:
        """One round: (state after, record). A skipped round leaves the state as it was."""
        began = time.perf_counter()
        plan = self.plan(number)
        state, record = self.finish(state, plan, self.train(state, plan, number), number)
        return state, record | {"seconds": time.perf_counter() - began}

    def plan(self, number: int) -> Plan:
        """Who takes part in a round, and how."""
        if self.plans is not None:
            return self.plans[number]
        return sampling.plan(self.options.sampling, self.fleet, self.options.seed, number)

    def finish(
        self, state: State, plan: Plan, replies: list[Cohort], number: int
    ) -> tuple[State, dict[str, Any]]:
        """What follows training, wherever that took place: checks, the method's part, evaluation."""
        self._complain(replies, number)
        reason, metrics = self._too_few(replies), {}
        if reason is None:
            key = jax.random.fold_in(jax.random.fold_in(self.key, 1), number)
            try:
                state, metrics = self.method.update(state, replies, self.context, key)
            except QuorumNotMet as error:
                reason = str(error)
        if state.past:  # after a skipped round too: ages count rounds
            state = state.replace(past=(state.small, *state.past[:-1]))
        record = self._account(plan, replies, number) | {"skipped": reason is not None}
        record |= {k: float(v) for k, v in metrics.items()}
        if reason is not None:
            logger.warning("round %d is skipped: %s", number, reason)
            record["reason"] = reason
        if self.options.engine.backend == "auto":
            engines = [self.engines.get(a) for a in range(len(self.method.models))]
            record["backends"] = [None if e is None else e.backend for e in engines]
        last = number + 1 == self.options.rounds
        if last or (number + 1) % self.options.evaluate_every == 0:
            record |= self._evaluate(state)
        return state, record

    def _too_few(self, replies: list[Cohort]) -> str | None:
        """Why a round with these replies must be skipped; None if it need not be."""
        quorum, counts = self.options.sampling.quorum, [int(c.accepted.sum()) for c in replies]
        if sum(counts) < quorum:
            return f"{sum(counts)} usable replies came and the quorum is {quorum}"
        if not self.method.averages:
            return None
        least = minimum_replies(self.options.aggregator)
        for model, count in zip(self.method.models, counts, strict=True):
            if 0 < count < least:
                name = type(self.options.aggregator).__name__
                return f"{count} usable replies of {model.name} came and {name} needs {least}"
        return None

    def train(self, state: State, plan: Plan, number: int) -> list[Cohort]:
        """Phase (i) of a round, simulated: one cohort per architecture."""
        options, out = self.options, []
        key = training_key(self.options.seed, number)
        keep = self.method.keep or not isinstance(options.aggregator, Mean)
        weights = self.context.sizes.astype(np.float32)
        architecture = self.context.assignment[plan.replied]
        for a, model in enumerate(self.method.models):
            cohorts, ages = [], np.unique(plan.ages[architecture == a]).tolist()
            for age in ages:
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
                start = (
                    state.personal[a]
                    if personal
                    else (state.past[age][a] if state.past else state.small[a])
                )
                given = list(schedule)
                cohorts.append(
                    train_cohort(
                        model,
                        start,
                        self.data,
                        given,
                        key,
                        options.local,
                        self._engine(a, state, given, key),
                        weights=weights / np.float32(np.sqrt(1 + age)),
                        personal=self.context.rows if personal else None,
                        uploads=options.uploads,
                        keep=keep,
                    )
                )
            out.append(join(cohorts, ages))
        return out

    def _engine(self, a: int, state: State, given: list[Bucket], key: Array) -> EngineOptions:
        """How clients of an architecture are computed; measured once where the options leave it open."""
        if self.options.engine.backend != "auto":
            return self.options.engine
        if a not in self.engines:
            if not given:
                return dataclasses.replace(self.options.engine, backend="vmap")
            start = state.small[a]
            self.engines[a] = choose(
                self.method.models[a],
                start,
                self.data,
                given[0],
                key,
                self.options.local,
                self.options.engine,
                self.context.sizes.astype(np.float32),
            )
        return self.engines[a]

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
        flops = sum(n * self.flops[assignment[k]] for k, n in steps.items())
        # A late reply comes all the same, unless everybody sends what there is at the deadline.
        late = [] if self.options.sampling.partial_work else plan.late
        sent = [*plan.replied, *late]
        return {
            "round": number,
            "asked": len(plan.asked),
            "replied": len(plan.replied),
            "dropped": plan.dropped.tolist(),
            "late": plan.late.tolist(),
            "rejected": [k for c in replies for k in c.rejected],
            "loss": float(losses.mean()) if len(losses) else float("nan"),
            "bytes_down": int(sum(self.down[assignment[k]] for k in plan.asked)),
            "bytes_up": int(sum(self.up[assignment[k]] for k in sent)),
            "client_flops": float(flops),
            "simulated_seconds": plan.seconds,
        }

    def _evaluate(self, state: State) -> dict[str, float]:
        found: dict[str, float] = {}
        method, context = self.method, self.context
        if state.large is not None and method.server is not None:
            hits = self.evaluation.hits(method.server, state.large)
            test, validation = self.evaluation.accuracy(hits)
            found |= {"large_accuracy": float(test), "large_validation": float(validation)}
        tests, validations, own, members = [], [], [], []
        for a, model in enumerate(method.models):
            clients = np.flatnonzero(context.assignment == a)
            many = state.personal is not None
            params = state.personal[a] if many else state.small[a]
            hits = self.evaluation.hits(model, params, many=many)
            test, validation = self.evaluation.accuracy(hits)
            tests.append(np.broadcast_to(test, len(clients)))
            validations.append(np.broadcast_to(validation, len(clients)))
            own.append(self.evaluation.own(hits, clients))
            members.append(float(np.mean(test)))
        each = np.concatenate(own)
        found["small_accuracy"] = float(np.concatenate(tests).mean())
        found["small_validation"] = float(np.concatenate(validations).mean())
        found["own_accuracy"], found["own_worst"] = float(each.mean()), worst(each)
        if len(members) > 1:
            found |= {
                f"small_accuracy_{m.name}": v for m, v in zip(method.models, members, strict=True)
            }
        return found

    def history(self, state: State, records: list[dict[str, Any]]) -> History:
        """The run's result."""
        measured = [costs.measure(m, self.options.local) for m in self.method.models]
        per_client = [
            dataclasses.asdict(c) | {"name": m.name, "bytes_down": d, "bytes_up": u}
            for c, m, d, u in zip(measured, self.method.models, self.down, self.up, strict=True)
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
            tuple(spent(self.private, len(records))),
        )


def training_key(seed: int, round_number: int) -> Array:
    """Key of a round's local training: the same in a simulation and in a deployment."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 2), round_number)


def _assigned(assignment: Sequence[int] | None, clients: int, architectures: int) -> np.ndarray:
    """Architecture of each client, int [N]."""
    chosen = np.arange(clients) % architectures if assignment is None else np.asarray(assignment)
    if chosen.shape != (clients,) or not np.isin(chosen, range(architectures)).all():
        raise ValueError(
            f"assignment must give each of {clients} clients an architecture below {architectures}; got {chosen.tolist()}."
        )
    return chosen


def _digest(*arrays: np.ndarray) -> str:
    """CRC-32 of arrays, their shapes and dtypes."""
    found = 0
    for array in arrays:
        found = zlib.crc32(f"{array.shape} {array.dtype}".encode(), found)
        found = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8), found)
    return f"{found:08x}"


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
    wrong = [k for u in options.uploads if isinstance(u, Attack) for k in u.clients]
    wrong = [k for k in wrong if not 0 <= k < len(partition)]
    if wrong:
        raise ValueError(
            f"attacking clients must be among the {len(partition)}, counted from 0; got {wrong[0]}; name others."
        )
    _check_parts(data)
    _check_models(method, data)
    _note_single_class(partition, data.train)


def _check_parts(data: Splits) -> None:
    """A hand-made :class:`Splits` may hold anything."""
    wanted, classes = inputs_of(data.train.inputs), data.train.classes
    parts = {"proxy": data.proxy, "validation": data.validation, "test": data.test}
    for name, part in parts.items():
        if not len(part) and name != "validation":
            raise ValueError(f"data.{name} must have examples; got none; give it a share in split.")
        found = inputs_of(part.inputs)
        if found != wanted:
            raise ValueError(
                f"data.{name} must have inputs as data.train has, {wanted.shape} {wanted.dtype}; got {found.shape} {found.dtype}; "
                "convert them."
            )
        if isinstance(part, Dataset) and part.classes != classes:
            raise ValueError(
                f"data.{name} must have the classes of data.train, {classes}; got {part.classes}; number labels alike."
            )


def _check_models(method: Method, data: Splits) -> None:
    server = {} if method.server is None else {"the server's model": method.server}
    models = server | {f"client model {i}": m for i, m in enumerate(method.models)}
    check_same_task(models)
    first = method.models[0]
    if first.inputs.shape != data.train.shape or first.outputs[0].shape[-1] < data.train.classes:
        raise ValueError(
            f"models must take {data.train.shape} and tell {data.train.classes} classes; {first.name} takes {first.inputs.shape} "
            f"and tells {first.outputs[0].shape[-1]}."
        )


def _check_aggregator(
    method: Method, partition: Partition, options: RunOptions, assignment: np.ndarray
) -> None:
    """What the aggregator's promise would not hold for, or what would end the run later."""
    aggregator = options.aggregator
    name = type(aggregator).__name__
    if method.keep and not method.silent and not aggregator.individual:
        raise ValueError(
            f"aggregator must show each update to {method.name}, which reads single clients' models; got {name}, which hides them; "
            "secure aggregation goes with mode='homo' and with averaging."
        )
    if not method.averages:
        if not isinstance(aggregator, Mean):
            logger.warning("%s combines no updates: aggregator %s has no effect", method.name, name)
        return
    able = partition.sizes > 0
    most = int(np.bincount(assignment[able]).max())
    if options.sampling.sampler != "poisson":
        most = min(most, max(1, round(options.sampling.participation * int(able.sum()))))
    if options.sampling.buffer:
        most = min(int(np.bincount(assignment[able]).max()), options.sampling.buffer)
    check_clients(aggregator, partition.sizes, most)


def _note_single_class(partition: Partition, train: Dataset) -> None:
    """Clients of one class are legal, and worth knowing of: their models learn nothing but to name it."""
    if train.labels.ndim > 1:
        return
    single = [
        k
        for k, part in enumerate(partition)
        if len(part) and len(set(train.labels[part].tolist())) == 1
    ]
    if single:
        logger.warning("clients with one class only: %s", ", ".join(map(str, single)))
