"""Ranks as processes, and the controller that keeps a model served while they die and return.

The controller holds no weights and computes nothing: it schedules, and so it can outlive any rank. A rank's death shows as a
closed connection, as an error of a collective, as silence, or as a step that takes too long; all lead the same way: end what is
being computed, commit the smaller membership, place again only those experts that have lost their last copy, put the survivors
into a mesh whose order was not used before, and go on with programs that are there already. A step whose results are
not in from every rank has not happened: nothing of it counts as computed and none of its tokens is seen.
"""

import dataclasses
import functools
import logging
import math
import os
import pathlib
import queue
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

import numpy as np

from jaxmoe.config import ModelConfig
from jaxmoe.elastic import distributed
from jaxmoe.elastic.cluster import programs
from jaxmoe.elastic.cluster.drains import Drain, Drains
from jaxmoe.elastic.cluster.layout import Layout, Memory, Phases
from jaxmoe.elastic.cluster.messages import Abort, Compile, Fault, Fetch, Setup, Step, Stop, Weights
from jaxmoe.elastic.cluster.options import ClusterOptions
from jaxmoe.elastic.cluster.orders import OrdersExhausted
from jaxmoe.elastic.cluster.shard import routed_layers
from jaxmoe.elastic.cluster.status import (
    ClusterStatus,
    Event,
    EventType,
    RankStatus,
    State,
    Verification,
)
from jaxmoe.elastic.cluster.supervisor import Member, Supervisor
from jaxmoe.elastic.cluster.team import RankFailed, Team
from jaxmoe.elastic.inventory import host_backup
from jaxmoe.elastic.membership import Membership
from jaxmoe.elastic.placement import CoverageLost, rebalance
from jaxmoe.elastic.repair import Plan
from jaxmoe.engine import sampling
from jaxmoe.engine.runner import Change, Outcome, Packing, Sizes, asks_of, outcomes_of
from jaxmoe.engine.scheduler import Work
from jaxmoe.engine.step import Batch
from jaxmoe.errors import JaxMoeError
from jaxmoe.params import Params, abstract_params

logger = logging.getLogger(__name__)


MOST_TRIES = 5  # of a step that fails although no rank is gone
_FLOOR = 2  # ranks that should hold each expert
_BACKUPS = 2  # hosts that keep each expert


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Cluster:
    """A model on rank processes, for ``Engine(cluster=...)``.

    ``drain``, ``resume``, ``kill``, ``inject``, ``status`` and ``verify`` may be called from any thread but the engine's.

    Args:
      weights: where the ranks load the model from.
      config: the model; its MTP module is left out.
      options: sizes and limits.
    """

    def __init__(
        self, weights: Weights, config: ModelConfig, options: ClusterOptions = ClusterOptions()
    ):
        if not config.n_routed_experts:
            raise ValueError(
                "a cluster shares experts; this model has none. Use Engine without one."
            )
        self.weights, self.options = weights, options
        self.config = config.replace(num_nextn_predict_layers=0)
        self.ranks = options.ranks + options.spares  # so many there can be
        experts = config.n_routed_experts
        redundant = experts if options.redundant_experts is None else options.redundant_experts
        self._slots = min(experts, -(-(experts + redundant) // options.ranks))
        self._number = self._tries = 0
        self._trust = False
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._team = Team(Membership.initial(options.ranks, capacity=self.ranks), options.silence_s)
        self._layout: Layout | None = None  # known once started, like the next two
        self._supervisor: Supervisor | None = None
        self._service: Any = None
        self._plans: dict[Member, Plan] = {}  # of ranks that wait: what they are getting
        self._drains = Drains()
        self._wanted = options.ranks
        self.load = np.zeros((0, 0), np.int64)
        self.drafted = self.accepted = 0
        self.computing_s = 0.0  # of the last step, from its orders to its results
        self.buckets: list[int] = []  # known once started
        self.events: list[Event] = []
        self.on_change: Callable[[], None] = lambda: None

    # -- life --------------------------------------------------------------------------------------

    def start(self, sizes: Sizes) -> None:
        """Starts the processes and begins the first epoch.

        Raises:
          ValueError: for sizes with drafts: ranks have no MTP module yet; and if ranks load different weights.
          RankFailed: if processes do not start.
        """
        if sizes.drafts:
            raise ValueError(
                f"speculative_tokens={sizes.drafts} is not possible with a cluster yet; use 0."
            )
        self._sizes, self._packing = sizes, Packing(sizes, self.ranks)
        self.buckets = self._packing.buckets
        self._folder = tempfile.TemporaryDirectory(prefix="jaxmoe-")
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _setup(self, coordinator: str) -> Setup:
        options, layers = self.options, routed_layers(self.config)
        shape = (self.ranks, layers, self.config.n_routed_experts)
        backup = np.zeros(shape, bool)
        if options.host_backup:
            share = host_backup(options.ranks, *shape[1:], copies=min(_BACKUPS, options.ranks))
            backup = share[np.arange(self.ranks) % options.ranks]
        base = options.programs or str(pathlib.Path(self._folder.name) / "programs")
        shapes = (self.ranks, options.devices, self._slots, self.weights.dtype)
        return Setup(
            coordinator,
            self.ranks,
            options.devices,
            self.config,
            self._sizes,
            self.weights,
            self._slots,
            None,
            backup,
            self._folder.name,
            str(programs.folder_for(base, self.config, self._sizes, *shapes)),
        )

    def _begin(self, epoch: int = 0) -> None:
        """Starts all processes and begins an epoch with the first placement."""
        layers, experts = routed_layers(self.config), self.config.n_routed_experts
        membership = Membership.initial(self.options.ranks, capacity=self.ranks)
        placement = rebalance(np.ones((layers, experts)), membership, self._slots, floor=_FLOOR)
        coordinator = f"127.0.0.1:{_free_port()}"
        self._service = distributed.serve(coordinator, self.ranks)
        self._setup_later = self._setup(coordinator)
        first = dataclasses.replace(self._setup_later, initial=placement.slot_expert)
        folder = pathlib.Path(self._folder.name)
        self._supervisor = Supervisor(
            folder, lambda: self.on_change(), devices=self.options.devices
        )
        for rank in range(self.ranks):
            self._supervisor.launch(rank, first)
        taken = self._wait_for(range(self.options.ranks))
        self._check_same(taken)
        incarnations = [taken[r].incarnation if r in taken else -1 for r in range(self.ranks)]
        membership = dataclasses.replace(membership, epoch=epoch, incarnations=tuple(incarnations))
        self._team = Team(membership, self.options.silence_s)
        self._team.members.update(taken)
        sizes = abstract_params(self.config, self.weights.dtype)
        memory = Memory(self._setup_later.backup, self._canaries, _expert_bytes(sizes))
        options = self.options
        self._layout = Layout(self._team, placement, memory, options.devices, options.deadline_s)
        self._layout.begin(Phases())

    def _wait_for(self, ranks: Iterable[int]) -> dict[int, Member]:
        """Takes the processes of these ranks when they are ready."""
        taken: dict[int, Member] = {}
        deadline = time.monotonic() + self.options.start_s
        while missing := set(ranks) - set(taken):
            for member in self._supervisor.ready:
                if member.rank in missing:
                    self._supervisor.take(member)
                    taken[member.rank] = member
            if self._supervisor.given_up or time.monotonic() > deadline:
                for member in taken.values():
                    member.end()
                raise RankFailed(self._supervisor.given_up or missing)
            time.sleep(0.01)
        return taken

    def _check_same(self, members: dict[int, Member]) -> None:
        """Takes note of the weights' checksums, which must be the same everywhere."""
        first = next(iter(members.values())).ready
        self._canaries, self._trunk = first.canaries, first.trunk
        for rank, member in members.items():
            if not self._same(member):
                for each in members.values():
                    each.end()
                raise ValueError(
                    f"all ranks must load the same weights; those of rank {rank} differ from rank {min(members)}'s. "
                    "Name one checkpoint that does not change."
                )

    def _same(self, member: Member) -> bool:
        canaries, trunk = member.ready.canaries, member.ready.trunk
        return np.array_equal(canaries, self._canaries) and trunk == self._trunk

    def close(self) -> None:
        """Ends all processes."""
        self._end_processes()
        self._folder.cleanup()

    def _end_processes(self) -> None:
        if self._supervisor is not None:
            self._supervisor.close()
        for member in list(self._team.members.values()):  # the engine may be changing them
            member.end()
        self._team.members.clear()
        if self._service is not None:
            self._service.shutdown()
            self._service = None

    # -- what there is -----------------------------------------------------------------------------

    @property
    def active(self) -> tuple[int, ...]:
        """Ranks that take part."""
        return self._team.membership.ranks

    @property
    def epoch(self) -> int:
        """Of the membership; every change, every new try and every part of a rebalancing has one of its own."""
        return self._team.epoch

    @property
    def dropped(self) -> dict[str, int]:
        """Messages of ranks that did not count, by kind and reason."""
        return self._team.dropped

    @property
    def refusal(self) -> str | None:
        """Why nothing can be computed at present; None if it can."""
        return self._layout.refusal

    @property
    def rank_experts(self) -> list[list[int]]:
        """Experts in each rank's slots of the first layer that has some; none for a rank that is away."""
        if self._layout is None:
            return [[] for _ in range(self.ranks)]
        by_rank = self._layout.placement.slot_expert[0].reshape(self.ranks, -1).tolist()
        return [[expert for expert in own if expert >= 0] for own in by_rank]

    @property
    def pids(self) -> dict[int, int]:
        """Processes of the ranks that take part."""
        return {rank: member.process.pid for rank, member in dict(self._team.members).items()}

    @property
    def starting_pids(self) -> dict[int, int]:
        """Processes on their way: starting, or ready and not taken in yet."""
        waiting = (*self._supervisor.starting, *self._supervisor.ready)
        return {member.rank: member.process.pid for member in waiting}

    def status(self) -> ClusterStatus:
        """This moment."""
        supervisor, placement, held = self._supervisor, self._layout.placement, self.rank_experts
        states: dict[int, tuple[State, Member]] = {
            member.rank: (state, member)
            for state, members in (
                ("starting", supervisor.starting),
                ("ready", supervisor.ready),
                ("active", list(self._team.members.values())),
            )
            for member in members
        }
        ranks = []
        for rank in range(self.ranks):
            state, member = states.get(rank, ("away", None))
            if member is None:
                state = "drained" if rank in self._drains.done else "away"
                ranks.append(RankStatus(rank, state, -1, None, 0, 0))
                continue
            if rank in self._drains.running:
                state = "draining"
            pid, experts = member.process.pid, len(set(held[rank]))
            ranks.append(RankStatus(rank, state, member.incarnation, pid, member.compiles, experts))
        return ClusterStatus(
            self.epoch,
            self.refusal,
            placement.min_copies,
            placement.digest,
            tuple(ranks),
            self.dropped,
            len(self.events),
        )

    # -- orders from outside -----------------------------------------------------------------------

    def verify(self) -> dict[int, Verification]:
        """Between two steps: every rank's tables and the weights in its slots, checked; nothing while coverage is lost."""
        future: Future = Future()

        def work() -> None:
            try:
                future.set_result({} if self.refusal is not None else self._layout.verify())
            except RankFailed as error:
                future.set_exception(error)
                raise

        self._between_steps(work)
        return future.result()

    def _between_steps(self, work: Callable[[], None]) -> None:
        self._tasks.put(work)
        self.on_change()

    def drain(self, rank: int, timeout_s: float = 30.0) -> Future:
        """Takes a rank out on purpose: it gets no new requests; when it has none, or after ``timeout_s``, its experts move, then it
        ends. Requests that it still has go on elsewhere.

        Returns:
          Its result, None, is there when the rank is out. It raises ValueError if the rank does not take part, and CoverageLost
          if the others could not hold all experts.
        """
        self._check_rank(rank)
        drain = Drain(time.monotonic() + timeout_s, Future())
        self._between_steps(functools.partial(self._drain, rank, drain))
        return drain.future

    def resume(self, rank: int) -> Future:
        """Starts a rank again that was drained, or whose process has died too often; the result is there when it is on its way."""
        self._check_rank(rank)
        future: Future = Future()
        self._between_steps(functools.partial(self._resume, rank, future))
        return future

    def kill(self, rank: int) -> None:
        """SIGKILL to a rank's process.

        Raises:
          ValueError: if it has none.
        """
        self._check_rank(rank)
        pid = {**self.starting_pids, **self.pids}.get(rank)
        if pid is None:
            raise ValueError(f"rank must have a process; got {rank}, which has none. See status().")
        os.kill(pid, signal.SIGKILL)

    def inject(self, rank: int, fault: Fault) -> None:
        """Has something go wrong in a rank; if it does not take part, in its next process. For experiments."""
        self._check_rank(rank)
        member = self._team.members.get(rank)
        if member is not None and member.alive:
            member.send(fault)
        else:
            self._supervisor.inject(rank, fault)

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank must be in 0..{self.ranks - 1}; got {rank}.")

    def _drain(self, rank: int, drain: Drain) -> None:
        rest = len(self._open) - 1
        if rank not in self._open:
            drain.future.set_exception(
                ValueError(f"rank must take part ({list(self._open)}) to be drained; got {rank}.")
            )
        elif rest * self._slots < self.config.n_routed_experts:
            drain.future.set_exception(
                CoverageLost(
                    f"without rank {rank} the other {rest} ranks have {rest * self._slots} slots per layer for "
                    f"{self.config.n_routed_experts} experts; bring another one back first."
                )
            )
        else:
            self._drains.running[rank] = drain

    def _resume(self, rank: int, future: Future) -> None:
        there = {*self.starting_pids, *self._team.members}
        if rank in there:
            future.set_exception(
                ValueError(f"rank must be out to be resumed; got {rank}, which has a process.")
            )
            return
        if rank in self._drains.done:
            self._drains.done.discard(rank)
            self._wanted += 1
        self._supervisor.given_up.discard(rank)
        self._launch(rank)
        future.set_result(None)

    # -- membership --------------------------------------------------------------------------------

    @property
    def _open(self) -> tuple[int, ...]:
        """Ranks that get new requests."""
        return tuple(rank for rank in self.active if rank not in self._drains.running)

    def _joiner(self) -> Member | None:
        """The process that something is to be done for, so that it takes part."""
        if len(self.active) >= self._wanted:
            return None
        ready = self._supervisor.ready
        asked = [member for member in ready if member in self._plans]
        if asked:  # one at a time: every change makes the plans of others void
            return asked[0] if asked[0].answer is not None else None
        return ready[0] if ready else None

    def pending(self) -> bool:
        """Whether ``poll`` has something to do."""
        return bool(
            self._team.dead
            or not self._tasks.empty()
            or self._drains.running
            or self._joiner()
            or (self._layout.restless and not self._plans)
        )

    def poll(self) -> Change | None:
        """Between steps: takes note of ranks that have died, takes in those that have returned, evens out the experts."""
        return self._guarded(self._poll)

    def _guarded(self, work: Callable[[], Any]) -> Any:
        """Does work in which ranks may fail, and what follows if they do."""
        try:
            try:
                return work()
            except RankFailed as error:
                return self._recover(error.ranks)
        except OrdersExhausted as error:
            return self._renew(str(error))

    def _poll(self) -> Change | None:
        if dead := self._team.dead:
            return self._recover(dead)
        while not self._tasks.empty():
            self._tasks.get()()
        if change := self._go_on_draining():
            return change
        if member := self._joiner():
            return self._go_on_joining(member)
        if self._layout.restless and not self._plans:
            return self._tidy()
        return None

    def _tell(self, kind: EventType, ranks: Iterable[int], phases: Phases) -> None:
        """Takes note of a change."""
        event = Event(
            kind,
            tuple(sorted(ranks)),
            self.epoch,
            phases.at,
            phases.total,
            dict(phases.seconds),
            self.active,
            self._layout.placement.min_copies,
        )
        self.events.append(event)
        logger.warning(
            "%s ranks=%s epoch=%d active=%s seconds=%.3f",
            kind,
            list(event.ranks),
            event.epoch,
            list(event.active),
            event.seconds,
        )

    def _launch(self, rank: int) -> None:
        self._layout.began(rank)
        self._supervisor.launch(rank, self._setup_later)

    def _recover(self, gone: Iterable[int]) -> Change:
        """Goes on without ``gone``, and without those that fail meanwhile; with nobody gone, with the same ranks once more."""
        phases, gone, lost = Phases(), set(gone), set()
        self._tries = 0 if gone else self._tries + 1
        if self._tries > MOST_TRIES:
            tries, self._tries = self._tries, 0
            raise JaxMoeError(f"a step has failed {tries} times; see the ranks' logs.")
        while True:
            lost |= gone
            for rank in gone & set(self._team.members):
                self._team.members.pop(rank).end()
            current = self._team.membership
            leaving = gone & set(current.ranks)
            self._team.commit(current.without(leaving) if leaving else current.renewed())
            try:
                self._team.tell(Abort(self.epoch))
                self._team.gather("aborted", self.options.deadline_s)
                phases.mark("abort")
                self._layout.repair(phases, lost)
                break
            except RankFailed as error:
                gone = set(error.ranks)
        self._tell("lost" if lost else "retried", lost, phases)
        for rank in lost:
            if rank in self._drains.running:
                self._out(rank)
            elif self.options.respawn:
                self._launch(rank)
        self._layout.settle(_FLOOR, self.options.chunk_moves, anew=False)
        return Change(self._open, frozenset(lost))

    def _renew(self, reason: str) -> Change:
        """Starts all processes again; requests wait for them."""
        logger.warning("all ranks start again: %s", reason)
        phases, epoch = Phases(), self.epoch
        self._end_processes()
        self._drains, self._wanted = Drains(), self.options.ranks
        self._plans.clear()
        self._begin(epoch + 1)
        phases.mark("load")
        self._tell("renewed", self.active, phases)
        return Change(self._open, frozenset(range(self.ranks)))

    def _go_on_draining(self) -> Change | None:
        new = [drain for drain in self._drains.running.values() if not drain.announced]
        for drain in new:
            drain.announced = True
        if new:
            return Change(self._open, frozenset())
        due = [rank for rank, drain in self._drains.running.items() if drain.due]
        return self._leave(due[0]) if due else None

    def _leave(self, rank: int) -> Change:
        """A rank goes on purpose: the others get from it what they need."""
        phases, member = Phases(), self._team.members.pop(rank)
        self._team.commit(self._team.membership.without([rank]))
        try:
            self._layout.repair(phases, leaving={rank: member})
            member.send(Stop())
        except RankFailed as error:
            return self._recover({*error.ranks, rank})
        finally:
            member.end()
        self._out(rank)
        self._tell("drained", [rank], phases)
        self._layout.settle(_FLOOR, self.options.chunk_moves, anew=True)
        return Change(self._open, frozenset([rank]))

    def _out(self, rank: int) -> None:
        self._drains.done.add(rank)
        self._wanted -= 1
        self._drains.running.pop(rank).future.set_result(None)

    def _go_on_joining(self, member: Member) -> Change | None:
        """A rank that is ready gets its experts, while the others serve; when it has them, it takes part."""
        plan = self._plans.pop(member, None)
        if not self._same(member):
            logger.error("rank %d has loaded other weights than the others: given up", member.rank)
            self._supervisor.drop(member.rank)
            self._supervisor.given_up.add(member.rank)
            return None
        if self.refusal is not None:
            return self._join(member, None)
        if plan is None or plan.epoch != self.epoch:
            plan = self._plans[member] = self._layout.join_plan(member.rank)
            fills = self._layout.fills_for(plan, member.rank)
            self._supervisor.ask(member, Fetch(self.epoch, fills))
            return None
        answer = member.answer
        if answer.kind == "failed" or answer.value.failed:
            logger.warning("rank %d could not get its experts: %s", member.rank, answer.value)
            return self._mend()  # a source may be damaged
        return self._join(member, plan)

    def _join(self, member: Member, plan: Plan | None) -> Change:
        phases, rank = Phases(), member.rank
        self._supervisor.take(member)
        self._team.commit(self._team.membership.with_joined(rank, member.incarnation))
        self._team.members[rank] = member
        try:
            if plan is None:
                self._layout.repair(phases)
            else:
                self._layout.join(plan, phases)
        except RankFailed as error:
            return self._recover(error.ranks)
        self._tell("joined", [rank], phases)
        self._layout.settle(_FLOOR, self.options.chunk_moves, anew=True)
        return Change(self._open, frozenset())

    def _tidy(self) -> None:
        phases = Phases()
        try:
            self._layout.tidy(phases)
        except CoverageLost:
            return self._mend()
        if not self._layout.restless:
            self._tell("rebalanced", self.active, phases)
        return None

    def _mend(self) -> Change | None:
        """Compares all weights with their checksums, and gets those again that are damaged; None if none are."""
        phases = Phases()
        wrong = [
            (rank, layer, slot)
            for rank, found in self._layout.verify().items()
            for layer, slot in found.wrong
        ]
        phases.mark("plan")
        if not wrong:
            return None
        self._team.commit(self._team.membership.renewed())
        self._layout.repair(phases, wrong=wrong)
        self._tell("repaired", {rank for rank, _, _ in wrong}, phases)
        self._layout.settle(_FLOOR, self.options.chunk_moves, anew=False)
        return Change(self._open, frozenset())

    # -- steps: what Engine asks of a Runner -------------------------------------------------------

    def pack(self, works: list[list[Work]]) -> list[Batch] | None:
        """The ranks' batches; None if there is nothing to do."""
        for rank, drain in self._drains.running.items():
            drain.busy = bool(works[rank])
        return self._packing.pack(works)

    def run(self, works: list[list[Work]], batches: list[Batch]) -> list[list[Outcome]] | Change:
        """A step's outcomes; or, if it could not be computed, how the membership has changed: then nothing has happened."""
        if self.refusal is not None:
            raise CoverageLost(self.refusal)
        return self._guarded(functools.partial(self._run, works, batches))

    def _run(self, works: list[list[Work]], batches: list[Batch]) -> list[list[Outcome]] | Change:
        began, rows = time.perf_counter(), len(batches[0].rows)
        trust, self._trust = self._trust, False
        self._number += 1
        for rank, member in self._team.members.items():
            asks = asks_of(works[rank])
            inputs = sampling.prepare([asks], rows, self.config.vocab_size)
            member.send(Step(self.epoch, self._number, batches[rank], inputs, trust))
        replies = self._team.gather("done", self.options.deadline_s, self._number)
        values = {rank: reply.value for rank, reply in replies.items()}
        if not trust and not all(value.finite for value in values.values()):
            change = self._mend()
            self._trust = (
                change is None
            )  # all is as it was loaded: then it is the model that says so
            return change or Change(self._open, frozenset())
        self._layout.sizes = (len(batches[0].tokens),)
        self._tries, self.computing_s = 0, time.perf_counter() - began
        load = sum(np.asarray(value.load, np.int64) for value in values.values())
        self.load = self._layout.load = load + (self.load if self.load.size else 0)
        return [
            outcomes_of(mine, values[rank].sampled, 0) if rank in values else []
            for rank, mine in enumerate(works)
        ]

    def warm_up(self, size: int) -> set[tuple]:
        """Compiles a step of ``size`` tokens for every number of ranks, each once; then runs an empty one."""
        least = -(-self.config.n_routed_experts // self._slots)
        numbers = tuple(range(least, self.options.ranks + 1))
        first, *others = self._team.members.values()
        # One compiles what all need for themselves, for the others to find it, while they compile the steps.
        for i, member in enumerate(others):
            member.send(Compile(self.epoch, size, numbers[i :: len(others)], False))
        first.send(Compile(self.epoch, size, () if others else numbers, True))
        start_s = self.options.start_s
        self._team.gather("compiled", start_s, silence_s=start_s)
        if others:
            for member in others:
                member.send(Compile(self.epoch, size, (), True))
            ranks = [member.rank for member in others]
            self._team.gather("compiled", start_s, of=ranks, silence_s=start_s)
        idle = [[] for _ in range(self.ranks)]
        self.run(idle, self._packing.idle(size))
        return {("step", size, number) for number in numbers}

    def restore(self) -> bool:
        """Nothing to restore: ranks keep their own caches."""
        return False


def _expert_bytes(params: Params) -> int:
    """Of one expert."""
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.shape[2:])
        for segment in params["segments"]
        for member in segment
        if "moe" in member
        for leaf in member["moe"]["experts"].values()
    ) // sum("moe" in member for segment in params["segments"] for member in segment)
