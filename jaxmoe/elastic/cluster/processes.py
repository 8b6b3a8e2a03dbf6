"""Ranks as processes, and the controller that keeps a model served while they die and return.

The controller holds no weights and computes nothing: it schedules, and so it can outlive any rank. A rank's death shows as a
closed connection, as an error of a collective, as silence, or as a step that takes too long; all lead the same way: end what is
being computed, commit the smaller membership, place again only those experts that have lost their last copy, put the survivors
into a mesh whose order was not used before, and go on with programs that are there already. A step whose results are
not in from every rank has not happened: nothing of it counts as computed and none of its tokens is seen.
"""

import dataclasses
import itertools
import logging
import pathlib
import socket
import tempfile
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import wait
from typing import Any

import numpy as np

from jaxmoe.config import ModelConfig
from jaxmoe.elastic import distributed
from jaxmoe.elastic.cluster.messages import (
    Abort,
    Compile,
    Fill,
    Install,
    Ping,
    Reply,
    Setup,
    Step,
    Weights,
)
from jaxmoe.elastic.cluster.supervisor import Member, Supervisor
from jaxmoe.elastic.inventory import Bandwidths, Inventory
from jaxmoe.elastic.membership import Ledger, Membership
from jaxmoe.elastic.placement import CoverageLost, Placement
from jaxmoe.elastic.repair import plan_join, plan_repair
from jaxmoe.engine import sampling
from jaxmoe.engine.runner import Change, Outcome, Packing, Sizes, asks_of, outcomes_of
from jaxmoe.engine.scheduler import Work
from jaxmoe.engine.step import Batch
from jaxmoe.errors import JaxMoeError

logger = logging.getLogger(__name__)


MOST_TRIES = 5  # of a step that fails although no rank is gone


class RankFailed(JaxMoeError):
    """Ranks have gone while something was asked of them."""

    def __init__(self, ranks: Iterable[int]):
        self.ranks = frozenset(ranks)
        super().__init__(f"ranks {sorted(self.ranks)} have failed.")


@dataclasses.dataclass(frozen=True)
class ClusterOptions:
    """Sizes and limits of a cluster of processes."""

    ranks: int = 4
    """Processes that share the requests and the experts."""
    redundant_experts: int | None = None
    """Copies beyond the first, over all ranks; default: one of each expert."""
    respawn: bool = True
    """Whether a rank that has died is started again."""
    silence_s: float = 2.0
    """After so long without an answer to a ping a rank counts as dead."""
    deadline_s: float = 60.0
    """After so long without a step's result a rank counts as dead though it answers."""
    start_s: float = 300.0
    """How long processes may take to start."""
    programs: str | None = None
    """Folder of compiled programs, kept between runs; whoever can write there can run code in the ranks. Default a new one."""

    def __post_init__(self):
        if self.ranks < 1:
            raise ValueError(f"ranks must be >= 1; got {self.ranks}.")
        if self.redundant_experts is not None and self.redundant_experts < 0:
            raise ValueError(f"redundant_experts must be >= 0; got {self.redundant_experts}.")


class _Phases:
    """Seconds of a recovery by what they were spent on."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def mark(self, phase: str) -> None:
        """What has passed since the last mark was for this."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Cluster:
    """A model on rank processes, for ``Engine(cluster=...)``.

    Args:
      weights: where the ranks load the model from.
      config: the model, without MTP module.
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
        self.ranks = options.ranks
        experts = config.n_routed_experts
        redundant = experts if options.redundant_experts is None else options.redundant_experts
        per_rank = -(-(experts + redundant) // self.ranks)
        table = np.arange(self.ranks * per_rank) % experts
        self._placement = Placement(table[None].astype(np.int32), experts, self.ranks)
        self._ledger = Ledger(Membership.initial(self.ranks))
        self._members: dict[int, Member] = {}
        self._refusal: str | None = None  # why nothing can be computed at present
        self._number = self._tries = 0
        self._orders: set[tuple[int, ...]] = set()
        self._epoch = -1
        self._pings = itertools.count()
        self.load = np.zeros((0, 0), np.int64)
        self.drafted = self.accepted = 0
        self.computing_s = 0.0  # of the last step, from its orders to its results
        self.buckets: list[int] = []  # known once started
        self.events: list[dict[str, Any]] = []
        self.dropped = 0
        self.on_change: Callable[[], None] = lambda: None

    # -- life --------------------------------------------------------------------------------------

    def start(self, sizes: Sizes) -> None:
        """Starts the processes and puts the first placement into them.

        Raises:
          ValueError: for sizes with drafts: ranks have no MTP module yet.
          RankFailed: if processes do not start.
        """
        if sizes.drafts:
            raise ValueError(
                f"speculative_tokens={sizes.drafts} is not possible with a cluster yet; use 0."
            )
        self._packing = Packing(sizes, self.ranks)
        self.buckets = self._packing.buckets
        self._folder = tempfile.TemporaryDirectory(prefix="jaxmoe-")
        folder, coordinator = pathlib.Path(self._folder.name), f"127.0.0.1:{_free_port()}"
        self._service = distributed.serve(coordinator, self.ranks)
        setup = Setup(
            coordinator,
            self.ranks,
            self.config,
            sizes,
            self.weights,
            self._placement.slots_per_rank,
            self.options.programs or str(folder / "programs"),
        )
        self._supervisor = Supervisor(folder, setup, lambda: self.on_change())
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        """Waits for all processes and installs the first placement."""
        for rank in range(self.ranks):
            self._supervisor.launch(rank)
        deadline = time.monotonic() + self.options.start_s
        while self._supervisor.ready < self.ranks:
            if self._supervisor.given_up or time.monotonic() > deadline:
                raise RankFailed(self._supervisor.given_up or range(self.ranks))
            time.sleep(0.01)
        taken = [self._supervisor.take() for _ in range(self.ranks)]
        self._members = {member.rank: member for member in taken}
        incarnations = tuple(self._members[rank].incarnation for rank in range(self.ranks))
        self._ledger = Ledger(Membership(0, (True,) * self.ranks, incarnations))
        self._install({rank: self._fills_of(self._placement, rank) for rank in range(self.ranks)})

    def close(self) -> None:
        """Ends all processes."""
        self._supervisor.close()
        for member in self._members.values():
            member.end()
        self._service.shutdown()
        self._folder.cleanup()

    # -- membership --------------------------------------------------------------------------------

    @property
    def active(self) -> tuple[int, ...]:
        """Ranks that take part."""
        return self._ledger.current.ranks

    @property
    def epoch(self) -> int:
        """Of the present mesh; every change of membership and every new try has one of its own."""
        return self._epoch

    @property
    def rank_experts(self) -> list[list[int]]:
        """Experts in each rank's slots; none for a rank that is away."""
        by_rank = self._placement.slot_expert[0].reshape(self.ranks, -1).tolist()
        return [[expert for expert in own if expert >= 0] for own in by_rank]

    def pending(self) -> bool:
        """Whether ``poll`` has something to do."""
        return self._supervisor.ready > 0 or not all(m.alive for m in self._members.values())

    def poll(self) -> Change | None:
        """Between steps: takes note of ranks that have died, and takes in those that have returned."""
        gone = [rank for rank, member in self._members.items() if not member.alive]
        if gone:
            return self._recover(gone)
        if self._supervisor.ready:
            return self._join()
        return None

    def _fills_of(self, placement: Placement, rank: int) -> tuple[Fill, ...]:
        per_rank = placement.slots_per_rank
        own = placement.slot_expert[0, rank * per_rank : (rank + 1) * per_rank]
        return tuple(Fill(slot, int(e), "host") for slot, e in enumerate(own) if e >= 0)

    def _order(self, ranks: Iterable[int]) -> tuple[int, ...]:
        """The ranks in an order that no mesh has had."""
        for order in itertools.permutations(sorted(ranks)):
            if order not in self._orders:
                self._orders.add(order)
                return order
        raise JaxMoeError(
            f"every order of ranks {sorted(ranks)} has been used; restart the cluster."
        )

    def _install(self, fills: dict[int, tuple[Fill, ...]]) -> None:
        """Begins a new epoch on the active ranks."""
        order = self._order(self._members)
        self._epoch += 1
        per_rank = self._placement.slots_per_rank
        by_rank = self._placement.slot_expert[0].reshape(-1, per_rank)
        experts = by_rank[list(order)].reshape(-1)
        for rank, member in self._members.items():
            member.send(Install(self._epoch, order, experts, fills.get(rank, ())))
        self._gather("installed")

    def _recover(self, gone: Iterable[int]) -> Change:
        """Goes on without ``gone``, and without those that fail meanwhile; with nobody gone, with the same ranks once more."""
        phases, gone, lost = _Phases(), set(gone), set()
        self._tries += 1
        if self._tries > MOST_TRIES:
            raise JaxMoeError(f"a step has failed {self._tries} times; see the ranks' logs.")
        while True:
            lost |= gone
            for rank in gone:
                self._members.pop(rank).end()
            phases.mark("end")
            try:
                self._repair(gone, lost, phases)
                break
            except RankFailed as error:
                gone = set(error.ranks)
        event = {"type": "lost", "ranks": sorted(lost), "epoch": self._epoch}
        self.events.append(event | {"phases": phases.seconds})
        logger.warning(
            "lost ranks=%s active=%s phases=%s", sorted(lost), self.active, phases.seconds
        )
        if self.options.respawn:
            for rank in lost:
                self._supervisor.launch(rank)
        return Change(self.active, frozenset(lost))

    def _repair(self, gone: set[int], lost: set[int], phases: "_Phases") -> None:
        """Ends what is being computed, commits the membership, covers all experts again, and begins a new epoch."""
        current = self._ledger.current
        leaving = gone & set(current.ranks)
        if leaving:
            if leaving == set(current.ranks):
                raise CoverageLost("no rank is left.")
            self._ledger.commit(current.epoch, current.without(leaving))
        for member in self._members.values():
            member.send(Abort(self._epoch))
        self._gather("aborted")
        phases.mark("abort")
        inventory = Inventory.of(self._placement, 1, host=self._hosts())
        inventory = inventory.without(lost, self._placement.slots_per_rank)
        bandwidths = Bandwidths.uniform(self.ranks)
        fills: dict[int, tuple[Fill, ...]] = {}
        try:
            plan = plan_repair(self._placement, self._ledger.current, inventory, bandwidths)
            self._placement, self._refusal = plan.placement, None
            fills = _fills(plan.moves, self._placement.slots_per_rank)
        except CoverageLost as error:
            self._placement, self._refusal = self._placement.without(sorted(lost)), str(error)
            logger.error("cannot serve: %s", error)
        phases.mark("plan")
        if self._refusal is None:
            self._install(fills)
        phases.mark("install")

    def _hosts(self) -> np.ndarray:
        return np.ones((self.ranks, self._placement.layers, self._placement.experts), bool)

    def _join(self) -> Change:
        """Takes in one rank that has returned; the others only adopt new tables."""
        began = time.perf_counter()
        member = self._supervisor.take()
        current = self._ledger.current
        inventory = Inventory.of(self._placement, 1, host=self._hosts())
        plan = plan_join(
            self._placement, current, member.rank, inventory, Bandwidths.uniform(self.ranks)
        )
        self._ledger.commit(current.epoch, current.with_joined(member.rank, member.incarnation))
        self._members[member.rank] = member
        before, self._placement = self._placement, plan.placement
        try:
            if self._placement.min_copies:
                self._install(_fills(plan.moves, self._placement.slots_per_rank))
                self._refusal = None
        except RankFailed as error:
            self._placement = before
            return self._recover(error.ranks)
        seconds = time.perf_counter() - began
        event = {"type": "joined", "ranks": [member.rank], "epoch": self._epoch}
        self.events.append(event | {"phases": {"install": seconds}})
        logger.warning("joined rank=%d seconds=%.3f", member.rank, seconds)
        return Change(self.active, frozenset())

    # -- asking ------------------------------------------------------------------------------------

    def _gather(self, kind: str, number: int = 0) -> dict[int, Reply]:
        """One answer of this kind and epoch from every member.

        Raises:
          RankFailed: if some have died, fall silent, fail or take too long.
        """
        answers: dict[int, Reply] = {}
        asked, heard = time.monotonic(), dict.fromkeys(self._members, time.monotonic())
        pinged: float = asked
        failed: set[int] = set()
        while missing := set(self._members) - set(answers) - failed:
            connections = {self._members[rank].connection: rank for rank in missing}
            for ready in wait(list(connections), self.options.silence_s / 4):
                rank = connections[ready]
                try:
                    reply = ready.recv()
                except (EOFError, OSError):
                    raise RankFailed([rank]) from None  # the others can't go on without it
                heard[rank] = time.monotonic()
                self._members[rank].compiles = reply.compiles
                if reply.kind == "pong":
                    continue
                if reply.epoch != self._epoch or (reply.number != number and kind == "done"):
                    self.dropped += 1
                elif reply.kind == kind:
                    answers[rank] = reply
                elif reply.kind == "failed" and kind != "aborted":
                    failed.add(rank)
                else:
                    self.dropped += 1
            now = time.monotonic()
            silent = [rank for rank in missing if now - heard[rank] > self.options.silence_s]
            if silent or now - asked > self.options.deadline_s:
                raise RankFailed(silent or missing - set(answers))
            if failed:
                break
            if now - pinged > self.options.silence_s / 4:
                pinged = now
                for rank in missing:
                    self._members[rank].send(Ping(self._epoch, next(self._pings)))
        if failed:
            raise RankFailed(self._who_died(failed))
        return answers

    def _who_died(self, failed: set[int]) -> set[int]:
        """A collective has failed on ``failed``: because of a peer that is dying, as a rule."""
        until = time.monotonic() + self.options.silence_s
        while time.monotonic() < until:
            gone = {rank for rank, member in self._members.items() if not member.alive}
            if gone:
                return gone
            time.sleep(0.002)
        return set()

    # -- steps: what Engine asks of a Runner -------------------------------------------------------

    def pack(self, works: list[list[Work]]) -> list[Batch] | None:
        """The ranks' batches; None if there is nothing to do."""
        return self._packing.pack(works)

    def run(self, works: list[list[Work]], batches: list[Batch]) -> list[list[Outcome]] | Change:
        """A step's outcomes; or, if it could not be computed, how the membership has changed: then nothing has happened."""
        rows = len(batches[0].rows)
        if self._refusal is not None:
            raise CoverageLost(self._refusal)
        began = time.perf_counter()
        self._number += 1
        for rank, member in self._members.items():
            asks = asks_of(works[rank])
            inputs = sampling.prepare([asks], rows, self.config.vocab_size)
            member.send(Step(self._epoch, self._number, batches[rank], inputs))
        try:
            replies = self._gather("done", self._number)
        except RankFailed as error:
            return self._recover(error.ranks)
        self._tries, self.computing_s = 0, time.perf_counter() - began
        load = sum(np.asarray(reply.value.load, np.int64) for reply in replies.values())
        self.load = load + (self.load if self.load.size else 0)
        return [
            outcomes_of(mine, replies[rank].value.sampled, 0) if rank in replies else []
            for rank, mine in enumerate(works)
        ]

    def warm_up(self, size: int) -> set[tuple]:
        """Compiles a step of ``size`` tokens for every number of ranks, each once; then runs an empty one."""
        least = -(-self._placement.experts // self._placement.slots_per_rank)
        numbers = tuple(range(least, self.ranks + 1))
        members = list(self._members.values())
        for i, member in enumerate(members):
            member.send(Compile(self._epoch, size, numbers[i :: len(members)]))
        self._gather("compiled")
        idle = [[] for _ in range(self.ranks)]
        self.run(idle, self._packing.idle(size))
        return {("step", size, number) for number in numbers}

    def restore(self) -> bool:
        """Nothing to restore: ranks keep their own caches."""
        return False


def _fills(moves: Iterable[Any], per_rank: int) -> dict[int, tuple[Fill, ...]]:
    fills: dict[int, tuple[Fill, ...]] = {}
    for move in moves:
        fill = Fill(move.slot - move.rank * per_rank, move.expert, "host")
        fills[move.rank] = (*fills.get(move.rank, ()), fill)
    return fills
