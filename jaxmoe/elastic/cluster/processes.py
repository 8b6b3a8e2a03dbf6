"""Ranks as processes, and the controller that keeps a model served while they die and return.

The controller holds no weights and computes nothing: it schedules, and so it can outlive any rank. A rank's death shows as a
closed connection, as an error of a collective, as silence, or as a step that takes too long; all lead the same way: end what is
being computed, commit the smaller membership, place again only those experts that have lost their last copy, put the survivors
into a mesh whose order was not used before, and go on with programs that are there already. A step whose results are
not in from every rank has not happened: nothing of it counts as computed and none of its tokens is seen.
"""

import functools
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np

from jaxmoe.config import ModelConfig
from jaxmoe.elastic.cluster.controller import Controller
from jaxmoe.elastic.cluster.drains import Drain
from jaxmoe.elastic.cluster.messages import Compile, Fault, Step, Weights
from jaxmoe.elastic.cluster.options import ClusterOptions
from jaxmoe.elastic.cluster.startup import Startup
from jaxmoe.elastic.cluster.status import ClusterStatus, Event, RankStatus, State, Verification
from jaxmoe.elastic.cluster.supervisor import Member
from jaxmoe.elastic.placement import CoverageLost
from jaxmoe.engine import sampling
from jaxmoe.engine.runner import Change, Outcome, Packing, Sizes, asks_of, outcomes_of
from jaxmoe.engine.scheduler import Work
from jaxmoe.engine.step import Batch
from jaxmoe.errors import JaxMoeError


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
        self._number = 0  # of the last step
        self._trust = False  # in the next step's results, whatever they are
        self._startup: Startup | None = None
        self._begun: Controller | None = None  # once started
        self.load = np.zeros((0, 0), np.int64)
        self.drafted = self.accepted = 0
        self.computing_s = 0.0  # of the last step, from its orders to its results
        self.buckets: list[int] = []  # known once started
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
        self._packing = Packing(sizes, self.ranks)
        self.buckets = self._packing.buckets
        self._startup = self._startup_of(sizes)
        try:
            self._begun = Controller(self._startup, self.options)
        except BaseException:
            self._startup.close()
            raise

    def _startup_of(self, sizes: Sizes) -> Startup:
        return Startup(
            self.weights, self.config, self.options, sizes, self._slots, lambda: self.on_change()
        )

    def close(self) -> None:
        """Ends all processes."""
        if self._begun is not None:
            self._begun.end()
        if self._startup is not None:
            self._startup.close()

    # -- what there is -----------------------------------------------------------------------------

    @property
    def _controller(self) -> Controller:
        if self._begun is None:
            raise JaxMoeError("the cluster has no ranks yet; pass it to Engine(cluster=...) first.")
        return self._begun

    @property
    def active(self) -> tuple[int, ...]:
        """Ranks that take part."""
        return self._begun.team.membership.ranks if self._begun else ()

    @property
    def epoch(self) -> int:
        """Of the membership; every change, every new try and every part of a rebalancing has one of its own."""
        return self._begun.team.epoch if self._begun else 0

    @property
    def events(self) -> list[Event]:
        """What has changed so far."""
        return list(self._controller.events)

    @property
    def dropped(self) -> dict[str, int]:
        """Messages of ranks that did not count, by kind and reason."""
        return self._controller.team.dropped

    @property
    def refusal(self) -> str | None:
        """Why nothing can be computed at present; None if it can."""
        return self._controller.layout.refusal

    @property
    def rank_experts(self) -> list[list[int]]:
        """Experts in each rank's slots of the first layer that has some; none for a rank that is away."""
        if self._begun is None:
            return [[] for _ in range(self.ranks)]
        by_rank = self._controller.layout.placement.slot_expert[0].reshape(self.ranks, -1)
        return [[expert for expert in own if expert >= 0] for own in by_rank.tolist()]

    @property
    def pids(self) -> dict[int, int]:
        """Processes of the ranks that take part."""
        members = dict(self._controller.team.members)
        return {rank: member.process.pid for rank, member in members.items()}

    @property
    def starting_pids(self) -> dict[int, int]:
        """Processes on their way: starting, or ready and not taken in yet."""
        return {m.rank: m.process.pid for m in self._controller.supervisor.waiting}

    def status(self) -> ClusterStatus:
        """This moment."""
        supervisor, drains = self._controller.supervisor, self._controller.drains
        placement, held = self._controller.layout.placement, self.rank_experts
        states: dict[int, tuple[State, Member]] = {
            member.rank: (state, member)
            for state, members in (
                ("starting", supervisor.starting),
                ("ready", supervisor.ready),
                ("active", list(self._controller.team.members.values())),
            )
            for member in members
        }
        ranks = []
        for rank in range(self.ranks):
            state, member = states.get(rank, ("away", None))
            if member is None:
                state = "drained" if rank in drains.done else "away"
                ranks.append(RankStatus(rank, state, -1, None, 0, 0))
                continue
            if rank in drains.running:
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
            found = {} if self.refusal is not None else self._controller.layout.verify()
            future.set_result(found)

        self._between_steps(work, future)
        return future.result()

    def _between_steps(self, work: Callable[[], None], future: Future) -> None:
        self._controller.between_steps(work, future)
        self.on_change()

    def drain(self, rank: int, timeout_s: float = 30.0) -> Future:
        """Takes a rank out on purpose: it gets no new requests; when it has none, or after ``timeout_s``, its experts move,
        then it ends. Requests that it still has go on elsewhere.

        Returns:
          Its result, None, is there when the rank is out. It raises ValueError if the rank does not take part, and CoverageLost
          if the others could not hold all experts.
        """
        self._check_rank(rank)
        drain = Drain(time.monotonic() + timeout_s, Future())
        self._between_steps(functools.partial(self._controller.drain, rank, drain), drain.future)
        return drain.future

    def resume(self, rank: int) -> Future:
        """Starts a rank again that was drained, or has died too often; the result is there when it is on its way."""
        self._check_rank(rank)
        future: Future = Future()
        self._between_steps(functools.partial(self._controller.resume, rank, future), future)
        return future

    def kill(self, rank: int) -> None:
        """SIGKILL to a rank's process.

        Raises:
          ValueError: if it has none.
        """
        self._check_rank(rank)
        there = {m.rank: m for m in self._controller.supervisor.waiting}
        member = {**there, **self._controller.team.members}.get(rank)
        if member is None:
            raise ValueError(f"rank must have a process; got {rank}, which has none. See status().")
        member.process.kill()

    def inject(self, rank: int, fault: Fault) -> None:
        """Has something go wrong in a rank; if it does not take part, in its next process. For experiments."""
        self._check_rank(rank)
        member = self._controller.team.members.get(rank)
        if member is not None and member.alive:
            member.send(fault)
        else:
            self._controller.supervisor.inject(rank, fault)

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank must be in 0..{self.ranks - 1}; got {rank}.")

    # -- steps: what Engine asks of a Runner -------------------------------------------------------

    def pending(self) -> bool:
        """Whether ``poll`` has something to do."""
        return self._controller.pending()

    def poll(self) -> Change | None:
        """Between steps: takes note of ranks that have died, takes in those that have returned, evens out the experts."""
        return self._delivered(self._controller.poll())

    def _delivered(self, result: Any) -> Any:
        """The result; a change with everything lost that the engine has not been told of, whatever has come between."""
        if result is None and self._controller.owed:
            result = self._controller.change()
        if isinstance(result, Change):
            self._controller.owed = set()
        return result

    def pack(self, works: list[list[Work]]) -> list[Batch] | None:
        """The ranks' batches; None if there is nothing to do."""
        for rank, drain in self._controller.drains.running.items():
            drain.busy = bool(works[rank])
        return self._packing.pack(works)

    def run(self, works: list[list[Work]], batches: list[Batch]) -> list[list[Outcome]] | Change:
        """A step's outcomes; or, if it could not be computed, how the membership has changed: then nothing has happened."""
        if self.refusal is not None:
            raise CoverageLost(self.refusal)
        if not self._controller.team.members:
            raise CoverageLost("no rank is left.")
        work = functools.partial(self._run, works, batches)
        return self._delivered(self._controller.guarded(work))

    def _run(self, works: list[list[Work]], batches: list[Batch]) -> list[list[Outcome]] | Change:
        team, layout = self._controller.team, self._controller.layout
        began, rows = time.perf_counter(), len(batches[0].rows)
        trust, self._trust = self._trust, False
        self._number += 1
        for rank, member in team.members.items():
            asks = asks_of(works[rank])
            inputs = sampling.prepare([asks], rows, self.config.vocab_size)
            member.send(Step(self.epoch, self._number, batches[rank], inputs, trust))
        replies = team.gather("done", self.options.deadline_s, self._number)
        values = {rank: reply.value for rank, reply in replies.items()}
        if not trust and not all(value.finite for value in values.values()):
            change = self._controller.mend()
            # All is as it was loaded: then it is the model that says so.
            self._trust = change is None
            return change or self._controller.change()
        self.computing_s = time.perf_counter() - began
        self._controller.step_done(len(batches[0].tokens), self.computing_s)
        load = sum(np.asarray(value.load, np.int64) for value in values.values())
        self.load = layout.load = load + (self.load if self.load.size else 0)
        return [
            outcomes_of(mine, values[rank].sampled, 0) if rank in values else []
            for rank, mine in enumerate(works)
        ]

    def warm_up(self, size: int) -> set[tuple]:
        """Compiles a step of ``size`` tokens for every number of ranks, each once; then runs an empty one."""
        most = self.options.ranks
        least = most if self.options.frozen else -(-self.config.n_routed_experts // self._slots)
        numbers = tuple(range(least, most + 1))
        # With other ranks once more, if some are lost meanwhile; the engine hears of that when it asks next.
        while isinstance(
            self._controller.guarded(functools.partial(self._warm_up, size, numbers)), Change
        ):
            if self.refusal is not None:
                raise CoverageLost(self.refusal)
        return {("step", size, number) for number in numbers}

    def _warm_up(self, size: int, numbers: tuple[int, ...]) -> Any:
        team, start_s = self._controller.team, self.options.start_s
        first, *others = team.members.values()
        # One compiles what all need for themselves, for the others to find it, while they compile the steps.
        for i, member in enumerate(others):
            member.send(Compile(self.epoch, size, numbers[i :: len(others)], False))
        first.send(Compile(self.epoch, size, () if others else numbers, True))
        team.gather("compiled", start_s, silence_s=start_s)
        if others:
            for member in others:
                member.send(Compile(self.epoch, size, (), True))
            ranks = [member.rank for member in others]
            team.gather("compiled", start_s, of=ranks, silence_s=start_s)
        idle = [[] for _ in range(self.ranks)]
        return self._run(idle, self._packing.idle(size))

    def restore(self) -> bool:
        """Nothing to restore: ranks keep their own caches."""
        return False
