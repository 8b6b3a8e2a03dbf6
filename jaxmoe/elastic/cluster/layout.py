"""Which experts the ranks hold, and carrying out the plans that change it."""

import dataclasses
import itertools
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from jaxmoe.elastic._chunks import chunks
from jaxmoe.elastic.cluster.messages import Fetch, Fill, Install, Prepare, Verify
from jaxmoe.elastic.cluster.orders import Order, Orders, OrdersExhausted
from jaxmoe.elastic.cluster.status import Verification
from jaxmoe.elastic.cluster.supervisor import Member
from jaxmoe.elastic.cluster.team import RankFailed, Team
from jaxmoe.elastic.inventory import HOST, IN_PLACE, PEER, Bandwidths, Inventory
from jaxmoe.elastic.placement import CoverageLost, Placement, rebalance
from jaxmoe.elastic.repair import Move, Plan, plan_join, plan_moves, plan_repair, restore_floor

logger = logging.getLogger(__name__)

_MOVES = (IN_PLACE, PEER)  # between devices; the other kinds are loads


class Phases:
    """Seconds of a change by what they were spent on."""

    def __init__(self):
        self.at = time.monotonic()
        self.seconds: dict[str, float] = defaultdict(float)
        self._began = self._last = time.perf_counter()

    def mark(self, phase: str) -> None:
        """What has passed since the last mark was for this."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now

    def of_which(self, phase: str, other: str, seconds: float) -> None:
        """So much of what was marked for ``phase`` was for another."""
        seconds = min(seconds, self.seconds[phase])
        self.seconds[phase] -= seconds
        self.seconds[other] += seconds

    @property
    def total(self) -> float:
        """Until the last mark."""
        return self._last - self._began


@dataclasses.dataclass(frozen=True)
class Memory:
    """What lies where, besides the devices.

    Attributes:
      backup: [ranks, layers, experts] bool, what each rank's host keeps when it starts.
      canaries: [layers, experts] int64 checksums.
      expert_bytes: of one expert.
    """

    backup: np.ndarray
    canaries: np.ndarray
    expert_bytes: int


class Layout:
    """The placement that the ranks have adopted, and the way to another one.

    Args:
      team: the ranks.
      placement: the first.
      memory: what lies where.
      orders: of the mesh.
      deadline_s: how long ranks may take for a part of it.
    """

    def __init__(
        self, team: Team, placement: Placement, memory: Memory, orders: Orders, deadline_s: float
    ):
        self.placement = placement
        self.refusal: str | None = None  # why nothing can be computed at present
        self.load: np.ndarray | None = None  # [layers, experts], to even out
        self.sizes: tuple[int, ...] = ()  # of steps whose programs an epoch begins with
        self.likely: tuple[int, ...] = ()  # of those that are made ready for epochs to come
        self._team, self._memory, self._deadline_s = team, memory, deadline_s
        self._backup = memory.backup.copy()
        self._links = Bandwidths.uniform(placement.ranks)
        self._orders = orders
        self._order: Order = ()
        self._reserved: dict[frozenset[int], Order] = {}  # of meshes that may come
        self._doubtful: set[tuple[int, int]] = set()  # (layer, slot) that may not hold what is said
        self._goal: Iterator[Placement] = iter(())
        self._next: Placement | None = None

    # -- what there is -----------------------------------------------------------------------------

    @property
    def order(self) -> tuple[int, ...]:
        """The ranks of the present mesh, in its order."""
        return tuple(rank for rank, _ in self._order)

    def _inventory(self) -> Inventory:
        found = Inventory.of(
            self.placement,
            self._memory.expert_bytes,
            host=self._backup,
            checkpoint=True,
            canaries=self._memory.canaries,
        )
        held = found.held.copy()
        for at in self._doubtful:
            held[at] = -1
        return dataclasses.replace(found, held=held)

    def prepare(self) -> None:
        """Has programs loaded for the meshes with one rank less, whichever it is."""
        whole = frozenset(self._team.members)
        for ranks in (whole - {rank} for rank in whole):
            if len(ranks) * self.placement.slots_per_rank < self.placement.experts:
                continue
            message = self._preparation(ranks)
            for rank in ranks if message else ():
                self._team.members[rank].send(message)

    def prepare_for(self, rank: int) -> Prepare | None:
        """Has programs loaded for the mesh with one rank more; what that rank itself has to be told."""
        message = self._preparation({rank, *self._team.members})
        if message is not None:
            self._team.tell(message)
        return message

    def _preparation(self, ranks: Iterable[int]) -> Prepare | None:
        """None if there is no mesh left: that is of no concern before it is needed."""
        ranks = frozenset(ranks)
        try:
            if ranks not in self._reserved:
                self._reserved[ranks] = self._orders.fresh(ranks)
        except OrdersExhausted:
            return None
        return Prepare(self._team.epoch, self._reserved[ranks], self.likely)

    def _new_order(self) -> Order:
        """One never used for the members."""
        ranks = frozenset(self._team.members)
        return self._reserved.pop(ranks, None) or self._orders.fresh(ranks)

    def began(self, rank: int) -> None:
        """A process of a rank has started anew."""
        self._orders.restarted(rank)
        self._backup[rank] = self._memory.backup[rank]

    def verify(self) -> dict[int, Verification]:
        """Every rank's tables, and its slots whose weights are not what they should be."""
        by_rank = self._by_rank()
        for rank, member in self._team.members.items():
            held = by_rank[:, rank]
            expected = np.take_along_axis(self._memory.canaries, np.maximum(held, 0), -1)
            member.send(Verify(self._team.epoch, np.where(held >= 0, expected, -1)))
        replies = self._team.gather("verified", self._deadline_s)
        return {
            rank: Verification(reply.value.digest, reply.value.wrong)
            for rank, reply in replies.items()
        }

    def _by_rank(self) -> np.ndarray:
        """[layers, ranks, slots]."""
        placement = self.placement
        return placement.slot_expert.reshape(placement.layers, placement.ranks, -1)

    # -- changes -----------------------------------------------------------------------------------

    def begin(self, phases: Phases) -> None:
        """The first epoch, of weights that lie there already."""
        self._install(self.placement, (), phases)

    def repair(
        self,
        phases: Phases,
        lost: Iterable[int] = (),
        wrong: Sequence[tuple[int, int, int]] = (),
        leaving: Mapping[int, Member] = MappingProxyType({}),
    ) -> None:
        """Covers all experts again and begins an epoch; if that can't be, says so in ``refusal``.

        Args:
          phases: to note times in.
          lost: ranks whose memory is gone.
          wrong: (rank, layer, slot) whose weights are damaged.
          leaving: those that are no longer members but can still be read.
        """
        lost, per_rank = sorted(set(lost)), self.placement.slots_per_rank
        self._doubtful |= {(layer, rank * per_rank + slot) for rank, layer, slot in wrong}
        inventory = self._inventory().without(lost, per_rank)

        def plan(inventory: Inventory) -> Plan:
            return plan_repair(
                self.placement,
                self._team.membership,
                inventory,
                self._links,
                leaving=leaving,
                load=self.load,
            )

        self._rest()
        try:
            done = self._fetched(plan, inventory, phases, leaving)
        except CoverageLost as error:
            gone = [*lost, *leaving]
            self.placement, self.refusal = self.placement.without(gone), str(error)
            logger.error("cannot serve: %s", error)
            phases.mark("plan")
            return
        # Whose connections are whole can go on with them.
        order = None if lost or leaving or not wrong else self._order
        self._install(done.placement, done.moves, phases, order)
        self.refusal = None

    def join_plan(self, rank: int) -> Plan:
        """What a rank that returns shall hold, before it is a member."""
        return plan_join(
            self.placement,
            self._team.membership,
            rank,
            self._inventory(),
            self._links,
            load=self.load,
        )

    def fills_for(self, plan: Plan, rank: int) -> tuple[Fill, ...]:
        """What a rank has to get for a plan."""
        sources = self._team.members
        return tuple(self._fill(m, sources) for m in plan.moves if m.rank == rank and m.size_bytes)

    def join(self, plan: Plan, phases: Phases) -> None:
        """Takes in a rank that has fetched its part of ``plan``; the others only adopt new tables."""
        self._rest()
        self._install(plan.placement, plan.moves, phases)

    def settle(self, floor: int, max_moves: int, *, anew: bool) -> None:
        """From now on ``tidy`` has something to do: the floor of copies, then, with ``anew``, an even load."""
        if self.refusal is not None:
            return
        membership, old = self._team.membership, self.placement
        plan = restore_floor(
            old, membership, self._inventory(), self._links, floor=floor, load=self.load
        )
        ways = [chunks(old, plan.placement, max_moves)]
        if anew:
            load = np.ones(old.copies.shape) if self.load is None else self.load
            new = rebalance(load, membership, old.slots_per_rank, floor=floor, near=plan.placement)
            ways.append(chunks(plan.placement, new, max_moves))
        self._goal = itertools.chain(*ways)
        self._next = next(self._goal, None)

    def _rest(self) -> None:
        self._goal, self._next = iter(()), None

    @property
    def restless(self) -> bool:
        """Whether ``tidy`` has something to do."""
        return self._next is not None

    def tidy(self, phases: Phases) -> None:
        """One small part of what ``settle`` has begun, on the same mesh.

        Raises:
          CoverageLost: if an expert that has to move cannot be had whole from anywhere.
        """
        new, self._next = self._next, next(self._goal, None)
        self._team.commit(self._team.membership.renewed())

        def plan(inventory: Inventory) -> Plan:
            return plan_moves(self.placement, new, self._team.membership, inventory, self._links)

        done = self._fetched(plan, self._inventory(), phases)
        self._install(done.placement, done.moves, phases, self._order)

    # -- carrying out ------------------------------------------------------------------------------

    def _fill(self, move: Move, sources: Mapping[int, Member]) -> Fill:
        per_rank, source = self.placement.slots_per_rank, move.source_rank
        far = source is not None and source != move.rank
        return Fill(
            move.layer,
            move.expert,
            move.slot - move.rank * per_rank,
            move.source,
            sources[source].ready.address if far else None,
            move.source_slot % per_rank if move.source_slot is not None else None,
            move.canary,
        )

    def _fetched(
        self,
        plan_with: Callable[[Inventory], Plan],
        inventory: Inventory,
        phases: Phases,
        leaving: Mapping[int, Member] = MappingProxyType({}),
    ) -> Plan:
        """A plan whose weights all ranks have got; sources that turn out to be damaged or gone are crossed out."""
        sources = {**self._team.members, **leaving}
        while True:
            plan = plan_with(inventory)
            phases.mark("plan")
            moves: defaultdict[int, list[Move]] = defaultdict(list)
            for move in plan.moves:
                if move.size_bytes:
                    moves[move.rank].append(move)
            for rank, mine in moves.items():
                fills = tuple(self._fill(move, sources) for move in mine)
                self._team.members[rank].send(Fetch(self._team.epoch, fills))
            values = {
                rank: reply.value
                for rank, reply in self._team.gather("fetched", self._deadline_s, of=moves).items()
            }
            spent = [v.seconds for v in values.values()]
            loads = [sum(t for kind, t in s.items() if kind not in _MOVES) for s in spent]
            phases.mark("move")
            phases.of_which("move", "load", max(loads, default=0.0))
            failed = [moves[rank][i] for rank, value in values.items() for i in value.failed]
            if not failed:
                return plan
            for move in failed:
                inventory = self._without_source(inventory, move)

    def _without_source(self, inventory: Inventory, move: Move) -> Inventory:
        """The same without a copy that could not be had whole."""
        logger.warning("source crossed out: %s", move)
        if move.source == HOST:
            self._backup[move.source_rank, move.layer, move.expert] = False
        return inventory.without_source(move)

    def _install(
        self,
        placement: Placement,
        moves: Iterable[Move],
        phases: Phases,
        order: Order | None = None,
    ) -> None:
        """Has all ranks adopt a placement whose weights they have, on a mesh in this order or in one never used."""
        members = self._team.members
        self._order = order or self._new_order()
        self.placement = placement  # whoever does not adopt it is out
        experts = self._by_rank()[:, list(self.order)].reshape(placement.layers, -1)
        digest = Placement(experts, placement.experts, len(self._order)).digest
        fills: defaultdict[int, list[Fill]] = defaultdict(list)
        for move in moves:
            if move.size_bytes:
                self._doubtful.add((move.layer, move.slot))  # until all have answered
                fills[move.rank].append(self._fill(move._replace(source_rank=None), {}))
        for rank, member in members.items():
            mine = tuple(fills[rank])
            member.send(Install(self._team.epoch, self._order, experts, mine, self.sizes))
        replies = self._team.gather("installed", self._deadline_s)
        others = {rank for rank, reply in replies.items() if reply.value.digest != digest}
        if others:
            raise RankFailed(others)
        self._doubtful.clear()
        phases.mark("agree")
        longest = max(reply.value.seconds["executable"] for reply in replies.values())
        phases.of_which("agree", "executable", longest)
