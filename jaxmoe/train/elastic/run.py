"""The controller of a training run whose ranks may die: it holds no state and computes nothing, so it can outlive any rank.

A step without results from all ranks has not happened. What a rank takes along is in a neighbour's host memory as of the last
snapshot; the survivors put the state together from there, on a smaller mesh, and go on with the same data in the same order.
Metrics and checkpoints are written here, so no rank is needed for them.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import socket
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import jax

from jaxmoe import checkpoint
from jaxmoe.elastic import distributed
from jaxmoe.elastic.cluster import programs
from jaxmoe.elastic.cluster.layout import Phases
from jaxmoe.elastic.cluster.messages import Abort
from jaxmoe.elastic.cluster.orders import Order, Orders, OrdersExhausted
from jaxmoe.elastic.cluster.supervisor import Member, Supervisor
from jaxmoe.elastic.cluster.team import RankFailed, Team
from jaxmoe.elastic.membership import Membership
from jaxmoe.errors import JaxMoeError
from jaxmoe.train.data import DataOptions
from jaxmoe.train.elastic import parts, peers
from jaxmoe.train.elastic.events import EVENTS, Event
from jaxmoe.train.elastic.messages import Compile, Install, Prepare, Setup, Snapshot, Step, name_of
from jaxmoe.train.elastic.options import ElasticOptions
from jaxmoe.train.loop import TOKENS, Progress, Run, progress_of
from jaxmoe.train.metrics import Metrics
from jaxmoe.train.processes import kept
from jaxmoe.train.step import TrainState, abstract_state

logger = logging.getLogger(__name__)

MOST_TRIES = 5  # of one step
_CONTROLLER = "controller"


class RanksLost(JaxMoeError):
    """No rank is left; the message says what to go on from."""


class ElasticRun:
    """A run and its ranks.

    Args:
      run: the run's files.
      data: what to train on.
      options: ranks and limits.
      on_event: called after every change of the ranks.
    """

    def __init__(
        self,
        run: Run,
        data: DataOptions,
        options: ElasticOptions,
        on_event: Callable[[Event], None],
    ):
        self._run, self._data, self.options, self._on_event = run, data, options, on_event
        self._experts = run.config.n_routed_experts
        self._axes = parts.expert_axes(run.config, run.train_config)
        # The controller's own: what it has read from the last checkpoint.
        self._store = peers.Store()
        self._orders = Orders(options.devices)
        self._used: set[Order] = set()
        self._planned: dict[frozenset[int], Order] = {}  # meshes that may come next
        self._key = os.urandom(32)
        self._tries = 0
        self.step = 0
        """Steps done."""
        # Steps of the last snapshot, and of the last of which all ranks have all they keep.
        self._snapshot = self._safe = 0
        self._saved = checkpoint.latest_step(run.checkpoints)
        self.state: TrainState | None = None
        """As this run saved it last; None before."""

    # -- life --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the ranks, compiles, and puts the state into them.

        Raises:
          RankFailed: if they do not start.
        """
        phases, options = Phases(), self.options
        self._run.peak_flops()  # measured before the ranks keep the machine busy
        step = self._read()
        phases.mark("read")
        self._supervisor = Supervisor(
            self._folder,
            lambda: None,
            silence_s=options.silence_s,
            start_s=options.start_s,
            module="jaxmoe.train.elastic.rank",
            devices=options.devices,
        )
        coordinator = f"127.0.0.1:{_free_port()}"
        self._service = distributed.serve(coordinator, options.ranks)
        self._listener = peers.serve(self._store, self._folder, _CONTROLLER, self._key)
        self._setup = self._setup_of(coordinator)
        for rank in range(options.ranks):
            self._supervisor.launch(rank, self._setup)
        members = self._wait_for_all()
        incarnations = tuple(members[rank].incarnation for rank in range(options.ranks))
        membership = Membership(0, (True,) * options.ranks, incarnations)
        self._team = Team(membership, options.silence_s)
        self._team.members.update(members)
        phases.mark("start")
        numbers = tuple(range(options.ranks, 0, -1))
        for i, member in enumerate(members.values()):
            member.send(Compile(self._team.epoch, numbers[i :: len(members)]))
        replies = self._team.gather("compiled", options.start_s)
        phases.mark("compile")
        compiled = sum(reply.value for reply in replies.values())
        compiled += self._install(step, {_CONTROLLER: frozenset(range(self._experts))}, phases)
        self._tell("started", range(options.ranks), 0, self._origin, phases, compiled)

    @contextlib.contextmanager
    def processes(self) -> Iterator[None]:
        """Everything that was started inside has ended afterwards."""
        with tempfile.TemporaryDirectory(prefix="jaxmoe-") as folder:
            self._folder = pathlib.Path(folder)
            try:
                yield
            finally:
                if hasattr(self, "_supervisor"):
                    self._supervisor.close()
                if hasattr(self, "_team"):
                    for member in self._team.members.values():
                        member.end()
                if hasattr(self, "_service"):
                    self._service.shutdown()
                    self._listener.close()

    def _setup_of(self, coordinator: str) -> Setup:
        run, options = self._run, self.options
        base = options.programs or str(self._folder / "programs")
        return Setup(
            coordinator,
            options.ranks,
            options.devices,
            run.config,
            run.train_config,
            self._data,
            str(run.directory / TOKENS),
            run.corpus.fingerprint,
            str(self._folder),
            self._key,
            str(programs.folder_for(base, run.config, run.train_config.trajectory())),
        )

    def _wait_for_all(self) -> dict[int, Member]:
        deadline = time.monotonic() + self.options.start_s
        while len(self._supervisor.ready) < self.options.ranks:
            if self._supervisor.given_up or time.monotonic() > deadline:
                ready = {member.rank for member in self._supervisor.ready}
                raise RankFailed(
                    self._supervisor.given_up or set(range(self.options.ranks)) - ready
                )
            time.sleep(0.01)
        members = {member.rank: member for member in self._supervisor.ready}
        for member in members.values():
            self._supervisor.take(member)
        return members

    # -- the state ---------------------------------------------------------------------------------

    def _read(self) -> int:
        """Takes the last checkpoint's state, or the first state, into this process's store; returns its step."""
        state = self._run.start()
        step = int(state.step)
        self._origin = "seed" if self._saved is None else "checkpoint"
        leaves = jax.tree.leaves(state)
        self._store.keep()
        self._store.put(step, parts.take_apart(leaves, self._axes, range(self._experts)))
        return step

    def _names(self) -> dict[int, str]:
        return {
            rank: name_of(rank, member.incarnation) for rank, member in self._team.members.items()
        }

    def _install(self, step: int, held: dict[str, frozenset[int]], phases: Phases) -> int:
        """Begins an epoch with the state of ``step``, whose experts those in ``held`` have; returns programs compiled."""
        names = self._names()
        order = self._planned.pop(frozenset(names), None) or self._fresh(names)
        ranks = [rank for rank, _ in order]
        shape = parts.mesh_shape(len(ranks), self._experts)
        wanted = {
            names[rank]: parts.kept_experts(position, shape, self._experts)
            for position, rank in enumerate(ranks)
        }
        sources = parts.plan_sources(wanted, held)
        by_position = tuple(names[rank] for rank in ranks)
        for rank, name in names.items():
            self._team.members[rank].send(
                Install(self._team.epoch, order, by_position, step, sources[name])
            )
        replies = self._team.gather("installed", self.options.deadline_s)
        phases.mark("install")
        slowest = max(replies.values(), key=lambda reply: sum(reply.value.seconds.values()))
        for name, seconds in slowest.value.seconds.items():
            phases.of_which("install", name, seconds)
        self._order, self._shape = ranks, shape
        self.step = self._snapshot = self._safe = step
        self._store.keep()  # the ranks have it now
        self._prepare()
        return sum(reply.value.compiled for reply in replies.values())

    def _fresh(self, ranks: Collection[int]) -> Order:
        """An order of which no part that communicates has been used."""
        shape = parts.mesh_shape(len(ranks), self._experts)
        try:
            while True:
                order = self._orders.fresh(ranks)
                groups = parts.groups(order, shape)
                if self._used.isdisjoint(groups):
                    self._used.update(groups)
                    return order
        except OrdersExhausted as error:
            raise JaxMoeError(f"{error} {self._kept()}") from error

    def _prepare(self) -> None:
        """Decides which meshes come next if one rank is lost or joins, and has their programs loaded meanwhile."""
        members = frozenset(self._team.members)
        absent = set(range(self.options.ranks)) - members
        likely = [members - {rank} for rank in members if len(members) > 1]
        likely += [members | {rank} for rank in absent]
        for ranks in likely:
            if ranks not in self._planned:
                self._planned[ranks] = self._fresh(ranks)
        for rank, member in self._team.members.items():
            orders = tuple(self._planned[ranks] for ranks in likely if rank in ranks)
            member.send(Prepare(self._team.epoch, orders))

    def _launch(self, rank: int) -> None:
        """Starts a rank again; it loads the programs for the mesh that it will make with those that are there."""
        order = self._planned[frozenset(self._team.members) | {rank}]
        self._supervisor.launch(rank, dataclasses.replace(self._setup, prepare=(order,)))

    def _copy(self) -> None:
        """A snapshot of the state as it is, if there is none yet."""
        if self._snapshot < self.step:
            self._team.tell(Snapshot(self._team.epoch, self.step))
            self._team.gather("copied", self.options.deadline_s, self.step)
            self._snapshot = self.step

    def _held(self) -> dict[str, frozenset[int]]:
        """Experts that each rank's snapshot is sure to hold: its own."""
        names = self._names()
        return {
            names[rank]: frozenset(parts.own_experts(position, self._shape, self._experts))
            for position, rank in enumerate(self._order)
        }

    def _save(self) -> None:
        """Writes a checkpoint of the state, from the ranks' snapshots."""
        self._copy()
        held = self._held()
        wanted = {_CONTROLLER: range(self._experts)}
        (sources,) = parts.plan_sources(wanted, held).values()
        by_name = {name: rank for rank, name in self._names().items()}
        whole = peers.Store()
        for name in {*sources.experts, sources.common}:
            experts, common = sources.experts.get(name, ()), name == sources.common
            try:
                part = peers.fetch(
                    self._folder, name, self._key, self.step, experts, common=common,
                    timeout_s=self.options.deadline_s,
                )  # fmt: skip
            except OSError:
                raise RankFailed([by_name[name]]) from None
            whole.put(self.step, part)
        leaves = parts.put_together(whole.get(self.step), self._axes, range(self._experts))
        structure = jax.tree.structure(abstract_state(self._run.config, self._run.train_config))
        self.state = jax.tree.unflatten(structure, leaves)
        self._run.save(self.state)
        self._saved = self.step

    # -- membership --------------------------------------------------------------------------------

    def _tell(
        self,
        kind: Any,
        ranks: Iterable[int],
        redone: int,
        source: Any,
        phases: Phases,
        compiled: int,
    ) -> None:
        event = Event(
            kind,
            tuple(sorted(ranks)),
            self.step,
            redone,
            source,
            round(phases.total, 4),
            {name: round(seconds, 4) for name, seconds in phases.seconds.items()},
            self._team.membership.ranks,
            self._shape._asdict(),
            compiled,
            {rank: member.process.pid for rank, member in self._team.members.items()},
        )
        with (self._run.directory / EVENTS).open("a") as file:
            file.write(json.dumps(event.to_dict()) + "\n")
        self._on_event(event)

    def _recover(self, gone: Iterable[int]) -> None:
        """Goes on without ``gone``, and without those that fail meanwhile; with nobody gone, with the same ranks once more."""
        phases, gone, lost, before = Phases(), set(gone), set(), self.step
        self._tries += 1
        if self._tries > MOST_TRIES:
            raise JaxMoeError(
                f"step {self.step + 1} has failed {MOST_TRIES} times; see the ranks' messages. {self._kept()}"
            )
        while True:
            lost |= gone
            try:
                source, compiled = self._without(gone, phases)
                break
            except RankFailed as error:
                gone = set(error.ranks)
        self._metrics.drop_after(self.step)
        self._tell(
            "lost" if lost else "retried", lost, before - self.step, source, phases, compiled
        )
        if self.options.respawn:
            for rank in lost:
                self._launch(rank)

    def _without(self, gone: set[int], phases: Phases) -> tuple[str, int]:
        """Ends ``gone`` and what the others compute, and begins an epoch; returns its state's origin, and programs compiled."""
        team = self._team
        for rank in gone:
            team.members.pop(rank).end()
        if not team.members:
            raise RanksLost(f"all ranks are lost at step {self.step + 1}. {self._kept()}")
        team.commit(team.membership.without(gone) if gone else team.membership.renewed())
        team.tell(Abort(team.epoch))
        replies = team.gather("aborted", self.options.deadline_s)
        phases.mark("abort")
        inventories = {rank: reply.value for rank, reply in replies.items()}
        step = parts.restorable(inventories, self._experts)
        if step is None or step < (self._saved or 0):
            step, held = self._read(), {_CONTROLLER: frozenset(range(self._experts))}
            source = self._origin
        else:
            names, source = self._names(), "memory"
            held = {names[rank]: of[step] for rank, of in inventories.items() if step in of}
        phases.mark("plan")
        return source, self._install(step, held, phases)

    def _kept(self) -> str:
        return kept(self._saved)

    def _join(self, member: Member) -> None:
        """Takes in a rank that has returned; no step is lost, since the survivors copy their state first."""
        phases = Phases()
        self._copy()
        phases.mark("copy")
        held = self._held()
        self._supervisor.take(member)
        team = self._team
        team.commit(team.membership.with_joined(member.rank, member.incarnation))
        team.members[member.rank] = member
        compiled = self._install(self.step, held, phases)
        self._tell("joined", [member.rank], 0, "memory", phases, compiled)

    # -- steps -------------------------------------------------------------------------------------

    def train(
        self, received: list[int], on_progress: Callable[[Progress], None] | None
    ) -> dict[str, Any]:
        """The remaining steps, until a signal is received; the last one's record."""
        with Metrics(self._run.directory, self.step) as self._metrics:
            return self._train(received, on_progress)

    def _train(
        self, received: list[int], on_progress: Callable[[Progress], None] | None
    ) -> dict[str, Any]:
        c, record = self._run.train_config, {}
        while True:
            stop = bool(received)
            try:
                self._between_steps()
                if self._is_due(stop=stop):
                    self._save()
                if stop or self.step == c.steps:
                    return record
                record = self._advance()
            except RankFailed as error:
                self._recover(error.ranks)
                continue
            self._tries = 0
            self._metrics.write(record)
            self._run.skipped.check(record, c)
            if on_progress is not None:
                on_progress(progress_of(record, c.steps))

    def _between_steps(self) -> None:
        """Notices ranks that have died, takes in one that has returned, and makes a snapshot when it is time."""
        if dead := self._team.dead:
            raise RankFailed(dead)
        for member in self._supervisor.ready[:1]:
            self._join(member)
        if self.step - self._snapshot >= self.options.snapshot_every:
            self._copy()

    def _is_due(self, *, stop: bool) -> bool:
        c = self._run.train_config
        if self.step == (self._saved or 0):
            return False
        return stop or self.step == c.steps or self.step % c.save_every == 0

    def _batches(self, evaluation: str | None) -> int:
        """About how many batches an evaluation scores, each of which may take as long as a step."""
        c = self._run.train_config
        of = {None: 0, "probe": c.probe_bytes, "final": c.eval_bytes}[evaluation]
        scored = min(of, self._run.corpus.validation.size)
        return -(-scored // (max(1, c.seq_len // 2) * c.batch_size))

    def _advance(self) -> dict[str, Any]:
        """One step: its line of the metrics."""
        c, began, number = self._run.train_config, time.perf_counter(), self.step
        evaluation = None
        if number + 1 == c.steps:
            evaluation = "final"
        elif (number + 1) % c.eval_every == 0:
            evaluation = "probe"
        self._team.tell(Step(self._team.epoch, number, evaluation, self._safe))
        deadline_s = self.options.deadline_s * (1 + self._batches(evaluation))
        replies = self._team.gather("done", deadline_s, number)
        self._safe = min(reply.value.protected for reply in replies.values())
        value = next(iter(replies.values())).value
        self.step = number + 1
        # As in ``train`` an evaluation is no part of the step.
        scoring_s = max(reply.value.scoring_s for reply in replies.values())
        seconds, ranks = time.perf_counter() - began - scoring_s, len(replies)
        record = self._run.record(self.step, value.metrics, seconds, ranks)
        return record | {"ranks": ranks} | (value.held_out or {})


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
