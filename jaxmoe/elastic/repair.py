"""What to move where after ranks were lost or came back: pure plans, the same on every rank from the same arguments.

A plan is a new placement and the moves that make it true. Repair moves only experts that lost every copy; restoring the floor
of copies, filling a rank that returns, and rebalancing are plans of their own. All reads of a plan come before its writes: a
source slot may be the target of another move.
"""

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Shaped

from jaxmoe.elastic._slots import Slots
from jaxmoe.elastic.inventory import CHECKPOINT, HOST, IN_PLACE, PEER, Bandwidths, Inventory
from jaxmoe.elastic.membership import Membership
from jaxmoe.elastic.placement import (
    CoverageLost,
    Placement,
    active_mask,
    align_slots,
    check_slots,
    common_floor,
    describe,
)


class Move(NamedTuple):
    """An expert's weights on their way into a slot.

    Attributes:
      layer: of the expert.
      expert: to bring.
      slot: to bring it to.
      rank: that owns the slot.
      source: one of ``inventory.SOURCES``.
      source_rank: the rank, or for "host" the host, that has it; None for a checkpoint.
      source_slot: of a device that has it, else None. The slot itself if the weights are there already.
      size_bytes: to transfer; 0 if they are there already.
      canary: the checksum that must come out; None if none is known.
    """

    layer: int
    expert: int
    slot: int
    rank: int
    source: str
    source_rank: int | None
    source_slot: int | None
    size_bytes: int
    canary: int | None

    @property
    def link(self) -> "Link":
        """What it travels over."""
        return Link(self.source, self.source_rank, self.rank)


class Link(NamedTuple):
    """A way for weights: a kind of source, which one (None for a checkpoint), and the rank that receives."""

    source: str
    source_rank: int | None
    rank: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """A placement and the moves after which it holds.

    Attributes:
      epoch: of the membership that it was made for.
      placement: the new one.
      moves: ordered by layer and slot.
    """

    epoch: int
    placement: Placement
    moves: tuple[Move, ...]

    def batches(self) -> dict[Link, tuple[Move, ...]]:
        """The moves by link: one transfer each, all at the same time."""
        links: defaultdict[Link, list[Move]] = defaultdict(list)
        for move in self.moves:
            links[move.link].append(move)
        return {link: tuple(moves) for link, moves in sorted(links.items(), key=_link_order)}

    def bytes_by_source(self) -> dict[str, int]:
        """Bytes to transfer from each kind of source that is used."""
        total: defaultdict[str, int] = defaultdict(int)
        for move in self.moves:
            total[move.source] += move.size_bytes
        return dict(total)

    def seconds(self, bandwidths: Bandwidths) -> float:
        """How long the moves take if nothing else uses the links.

        A device, a host and a receiver each handle one byte at a time, and transfers can be interleaved freely, so the busiest of
        them sets the time (an open shop with preemption).
        """
        ports = _Ports(bandwidths)
        for move in self.moves:
            ports.add(move.link, move.size_bytes)
        moved = any(move.size_bytes for move in self.moves)
        return ports.busiest + (bandwidths.latency_s if moved else 0.0)

    @property
    def digest(self) -> str:
        """A hash of the plan, for comparing it between ranks."""
        moves = "\n".join(map(repr, map(tuple, self.moves)))
        return hashlib.sha256(f"{self.epoch} {self.placement.digest}\n{moves}".encode()).hexdigest()


def _link_order(item: tuple[Link, object]) -> tuple[str, int, int]:
    link = item[0]
    return link.source, -1 if link.source_rank is None else link.source_rank, link.rank


class _Ports:
    """Seconds of transfers that each sender and receiver has been given so far."""

    def __init__(self, bandwidths: Bandwidths):
        self._bandwidths = bandwidths
        self._busy: defaultdict[tuple, float] = defaultdict(float)

    @property
    def busiest(self) -> float:
        return max(self._busy.values(), default=0.0)

    def finish(self, link: Link, size_bytes: int) -> tuple[float, float]:
        """When the later of the two ends would be done with one more transfer, and how busy the first end is now."""
        busy = [self._busy[port] for port in self._ends(link)]
        return max(busy) + size_bytes / self._bandwidths.of(*link), busy[0]

    def add(self, link: Link, size_bytes: int) -> None:
        if size_bytes:
            for port in self._ends(link):
                self._busy[port] += size_bytes / self._bandwidths.of(*link)

    @staticmethod
    def _ends(link: Link) -> tuple[tuple, ...]:
        if link.source == IN_PLACE:
            return (("within", link.rank),)
        if link.source == CHECKPOINT:
            return (("into", link.rank),)
        return ("from", link.source, link.source_rank), ("into", link.rank)


class _Sources:
    """Chooses where each weight comes from: the nearest kind that is alive, and there the link that is done first."""

    def __init__(
        self,
        placement: Placement,
        alive: Bool[np.ndarray, " R"],
        inventory: Inventory,
        bandwidths: Bandwidths,
    ):
        self.placement, self.alive = placement, alive
        self.inventory, self.bandwidths = inventory, bandwidths
        self.ports = _Ports(bandwidths)
        self.size = placement.slots_per_rank
        held = np.where(np.repeat(alive, self.size), inventory.held, -1)
        self.slots_with = placement.replace_slots(held).expert_slots()
        owner = np.asarray(inventory.host_owner, np.int64)
        self.live_hosts = (owner < 0) | alive[np.maximum(owner, 0)]

    def moves(self, wanted: Int[np.ndarray, "N 2"], table: Int[np.ndarray, "L S"]) -> list[Move]:
        """A move for each (layer, slot) of ``wanted``, to hold what ``table`` says."""
        items = []
        for layer, slot in wanted.tolist():
            expert = int(table[layer, slot])
            items.append((layer, slot, expert, self._candidates(layer, expert, slot)))
        lost = [(layer, expert) for layer, _, expert, found in items if not found]
        if lost:
            raise self._lost(sorted(set(lost)))
        # Those with the least choice first: the others can still go around them.
        items.sort(key=lambda item: (len(item[3]), item[0], item[1]))
        return sorted((self._choose(*item) for item in items), key=lambda m: (m.layer, m.slot))

    def _candidates(
        self, layer: int, expert: int, slot: int
    ) -> list[tuple[str, int | None, int | None]]:
        """(kind, rank or host, slot) of all sources of the first kind that has one."""
        rank = slot // self.size
        slots = [s for s in self.slots_with[layer, expert].tolist() if s >= 0]
        here = [s for s in slots if s // self.size == rank]
        if here:
            return [(IN_PLACE, rank, slot if slot in here else here[0])]
        first_slot = {s // self.size: s for s in reversed(slots)}
        peers = [
            (PEER, r, s) for r, s in sorted(first_slot.items()) if self.bandwidths.peer[r, rank]
        ]
        if peers:
            return peers
        with_it = np.flatnonzero(self.inventory.host[:, layer, expert] & self.live_hosts)
        hosts = [(HOST, int(h), None) for h in with_it if self.bandwidths.host[h, rank]]
        if hosts:
            return hosts
        if self.inventory.checkpoint[layer, expert] and self.bandwidths.checkpoint[rank]:
            return [(CHECKPOINT, None, None)]
        return []

    def _choose(self, layer: int, slot: int, expert: int, candidates: list[tuple]) -> Move:
        rank = slot // self.size
        there = candidates[0][2] == slot
        size = 0 if there else int(self.inventory.expert_bytes[layer])
        kind, source_rank, source_slot = min(
            candidates, key=lambda c: self.ports.finish(Link(c[0], c[1], rank), size)
        )
        self.ports.add(Link(kind, source_rank, rank), size)
        canaries = self.inventory.canaries
        canary = None if canaries is None else int(canaries[layer, expert])
        return Move(layer, expert, slot, rank, kind, source_rank, source_slot, size, canary)

    def _lost(self, lost: list[tuple[int, int]]) -> CoverageLost:
        needed: set[int] = set()
        for layer, expert in lost:
            needed.update(np.flatnonzero(self.placement.holders[layer, :, expert]).tolist())
            hosts = np.flatnonzero(self.inventory.host[:, layer, expert])
            needed.update(self.inventory.host_owner[h] for h in hosts)
        needed -= {rank for rank in needed if rank < 0 or self.alive[rank]}
        ranks = ", ".join(map(str, sorted(needed)))
        who = f" They were last on ranks {ranks}." if needed else ""
        return CoverageLost(
            f"{describe(lost)} no source: no active rank, live host copy or checkpoint that can be reached holds it."
            f"{who} Name a checkpoint that has them.",
            lost,
            0,
            sorted(needed),
        )


def plan_moves(
    old: Placement,
    new: Placement,
    membership: Membership,
    inventory: Inventory,
    bandwidths: Bandwidths,
) -> Plan:
    """The moves from one placement to another, each from the nearest kind of source that is alive.

    Args:
      old: what ranks have adopted.
      new: what they shall adopt.
      membership: who is alive; nobody else is a source.
      inventory: which memory holds what.
      bandwidths: to choose among sources of a kind, so that the busiest sender or receiver is done early.

    Raises:
      CoverageLost: if an expert that has to move has no live source.
    """
    return _plan(old, new, membership, active_mask(old, membership), inventory, bandwidths)


def _plan(
    old: Placement,
    new: Placement,
    membership: Membership,
    alive: Bool[np.ndarray, " R"],
    inventory: Inventory,
    bandwidths: Bandwidths,
) -> Plan:
    _check_fit(old, inventory, bandwidths)
    table = new.slot_expert
    wanted = np.argwhere((table >= 0) & ((table != old.slot_expert) | (table != inventory.held)))
    sources = _Sources(old, alive, inventory, bandwidths)
    return Plan(membership.epoch, new, tuple(sources.moves(wanted, table)))


def _check_fit(placement: Placement, inventory: Inventory, bandwidths: Bandwidths) -> None:
    """One line for tables that belong to different models or clusters."""
    expected = {
        "inventory.held": (inventory.held.shape, placement.slot_expert.shape),
        "inventory.checkpoint": (
            inventory.checkpoint.shape,
            (placement.layers, placement.experts),
        ),
        "bandwidths.peer": (bandwidths.peer.shape, (placement.ranks,) * 2),
        "bandwidths.host": (bandwidths.host.shape, (len(inventory.host), placement.ranks)),
    }
    for name, (got, wanted) in expected.items():
        if got != wanted:
            raise ValueError(f"{name} must be {list(wanted)} for {placement!r}; got {list(got)}.")


def plan_repair(
    placement: Placement,
    membership: Membership,
    inventory: Inventory,
    bandwidths: Bandwidths,
    *,
    leaving: Iterable[int] = (),
    load: Shaped[np.ndarray, "L E"] | None = None,
) -> Plan:
    """Covers every expert again on the active ranks, moving only those that have no live copy left.

    An orphaned expert goes to a slot that holds it unlisted, else to an empty slot, else to one whose expert has another live
    copy, and among those to where the busiest rank concerned stays least busy. A slot whose memory doesn't hold what the
    placement says (an interrupted move, a damaged copy) counts as empty, so a repair can be planned again at any point.

    Args:
      placement: the last one adopted, lost ranks' slots included: an error then can name who held what.
      membership: the new one.
      inventory: which memory holds what.
      bandwidths: of the links.
      leaving: inactive ranks that can still be read: they go on purpose.
      load: per layer and expert; default even.

    Raises:
      CoverageLost: if the active ranks have too few slots, or an orphan has no source.
    """
    alive = active_mask(placement, membership)
    _check_fit(placement, inventory, bandwidths)
    slots = Slots(placement, alive, inventory.held, load)
    orphans = slots.copies == 0
    named = [(int(layer), int(expert)) for layer, expert in np.argwhere(orphans)]
    check_slots(membership, placement.slots_per_rank, placement.experts, named)
    slots.assign(orphans.astype(np.int64), keep=1)
    new = placement.replace_slots(slots.table)
    readable = alive.copy()
    readable[list(leaving)] = True
    return _plan(placement, new, membership, readable, inventory, bandwidths)


def restore_floor(
    placement: Placement,
    membership: Membership,
    inventory: Inventory,
    bandwidths: Bandwidths,
    *,
    floor: int = 2,
    load: Shaped[np.ndarray, "L E"] | None = None,
) -> Plan:
    """Gives experts on fewer than ``floor`` ranks further copies, from slots whose expert can spare one.

    The second stage of a recovery, when serving goes on already. The floor is lowered to what the active ranks' slots allow for
    all experts, as in ``rebalance``: a floor for some would take the copies that even out the load. It stops where no slot is
    left whose expert stays at the floor without it; ``plan.placement.spread`` says who is still short.

    Args:
      placement: a valid one for the membership.
      membership: the current one.
      inventory: which memory holds what.
      bandwidths: of the links.
      floor: ranks that should hold each expert.
      load: per layer and expert; default even.

    Raises:
      CoverageLost: if the placement doesn't cover every expert: repair it first.
    """
    placement.check(membership)
    if floor < 1:
        raise ValueError(f"floor must be >= 1; got {floor}.")
    alive = active_mask(placement, membership)
    _check_fit(placement, inventory, bandwidths)
    target = common_floor(floor, int(alive.sum()), placement.slots_per_rank, placement.experts)
    slots = Slots(placement, alive, inventory.held, load)
    slots.assign(np.maximum(target - slots.spread, 0), keep=target)
    new = placement.replace_slots(slots.table)
    return _plan(placement, new, membership, alive, inventory, bandwidths)


def plan_join(
    placement: Placement,
    membership: Membership,
    rank: int,
    inventory: Inventory,
    bandwidths: Bandwidths,
    *,
    before: Placement | None = None,
    floor: int = 2,
    load: Shaped[np.ndarray, "L E"] | None = None,
) -> Plan:
    """Fills the slots of a rank that returns; no other slot changes, so survivors only adopt new tables.

    The rank can load its weights before it is admitted: the plan is valid for ``membership`` and for its
    ``with_joined(rank, ...)``, and void after any other change.

    Args:
      placement: the current one, in which the rank's slots are empty.
      membership: the current one, with or without the rank.
      rank: that joins.
      inventory: which memory holds what; ``Inventory.without`` has to have told that the rank's old process ended.
      bandwidths: of the links.
      before: a placement whose experts for this rank it gets back; default those that are short of the floor, then those
        with the most load per copy.
      floor: ranks that should hold each expert.
      load: per layer and expert; default even.

    Raises:
      CoverageLost: if one of its experts has no live source.
      ValueError: if its slots are not empty.
    """
    alive = active_mask(placement, membership).copy()
    _check_fit(placement, inventory, bandwidths)
    if not 0 <= rank < placement.ranks:
        raise ValueError(f"rank must be below {placement.ranks}; got {rank}.")
    mine = slice(rank * placement.slots_per_rank, (rank + 1) * placement.slots_per_rank)
    if (placement.slot_expert[:, mine] >= 0).any():
        raise ValueError(
            f"the slots of joining rank {rank} must be empty (-1); repair the placement after the rank was lost."
        )
    alive[rank] = True  # As a receiver; what its own memory holds already is "in place".
    table = placement.slot_expert.copy()
    if before is None:
        slots = Slots(placement, alive, inventory.held, load)
        slots.fill(
            rank, min(floor, int(alive.sum()))
        )  # only empty slots: nobody pays for the floor
        filled, held = slots.table[:, None, mine], inventory.held[:, None, mine]
        table[:, mine] = align_slots(filled, held)[:, 0]
    elif before.slot_expert.shape != table.shape or before.experts != placement.experts:
        raise ValueError(f"before must be a placement like {placement!r}; got {before!r}.")
    else:
        table[:, mine] = before.slot_expert[:, mine]
    new = placement.replace_slots(table)
    return _plan(placement, new, membership, alive, inventory, bandwidths)
