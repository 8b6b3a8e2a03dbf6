"""Which expert each physical slot holds, per layer, and how copies are placed for even load and for safety.

A slot is one expert's place on one rank: rank r owns slots r * S to r * S + S - 1, whether it is alive or not, so that tables
keep their shape and ranks their numbers. Slots of lost ranks, and empty ones, hold -1.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy.optimize import linear_sum_assignment

from jaxmoe.elastic._eplb import spread
from jaxmoe.elastic.membership import Membership
from jaxmoe.errors import JaxMoeError
from jaxmoe.moe.tables import ExpertTables


class CoverageLost(JaxMoeError):
    """Some experts can have no copy on any active rank, so the model can't be computed.

    Attributes:
      missing: every (layer, expert) concerned.
      slots_missing: how many slots the active ranks lack in a layer; 0 if only the weights are nowhere to be had.
      ranks_needed: ranks one or more of which have to come back.
    """

    def __init__(
        self,
        message: str,
        missing: Sequence[tuple[int, int]] = (),
        slots_missing: int = 0,
        ranks_needed: Sequence[int] = (),
    ):
        super().__init__(message)
        self.missing, self.slots_missing = tuple(missing), slots_missing
        self.ranks_needed = tuple(ranks_needed)


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """The expert in each slot of each layer. Immutable; equal placements have equal digests.

    Attributes:
      slot_expert: int32 [layers, ranks * slots_per_rank], -1 for a slot that is empty or on a lost rank.
      experts: per layer.
      ranks: the capacity, lost ranks included.
    """

    slot_expert: Int[np.ndarray, "L S"]
    experts: int
    ranks: int

    def __post_init__(self):
        table = np.array(self.slot_expert, np.int32)
        if self.experts < 1 or self.ranks < 1 or not table.size:
            raise ValueError(
                f"a placement needs layers, slots, experts and ranks; got slot_expert {table.shape}, "
                f"{self.experts} experts, {self.ranks} ranks."
            )
        if table.shape[1] % self.ranks:
            raise ValueError(
                f"slot_expert must have as many slots on every rank: a multiple of {self.ranks} in all; "
                f"got {table.shape[1]}. Give every rank as many as the smallest can hold."
            )
        wrong = table[(table < -1) | (table >= self.experts)]
        if wrong.size:
            raise ValueError(
                f"slot_expert must hold -1 or experts below {self.experts}; got {wrong[0]}."
            )
        table.setflags(write=False)
        object.__setattr__(self, "slot_expert", table)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Placement) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return (
            f"Placement({self.layers} layers, {self.experts} experts, {self.ranks} ranks x {self.slots_per_rank} slots, "
            f"min copies {self.min_copies}, digest {self.digest[:8]})"
        )

    @property
    def layers(self) -> int:
        """How many layers have experts."""
        return self.slot_expert.shape[0]

    @property
    def slots(self) -> int:
        """Slots of a layer, on all ranks."""
        return self.slot_expert.shape[1]

    @property
    def slots_per_rank(self) -> int:
        """Slots of a layer on one rank."""
        return self.slots // self.ranks

    @functools.cached_property
    def copies(self) -> Int[np.ndarray, "L E"]:
        """Slots that hold each expert."""
        keys = self.slot_expert + np.arange(self.layers)[:, None] * self.experts
        held = keys[self.slot_expert >= 0]
        counts = np.bincount(held, minlength=self.layers * self.experts)
        return counts.reshape(self.layers, self.experts).astype(np.int32)

    @functools.cached_property
    def holders(self) -> Int[np.ndarray, "L R E"]:
        """Copies of each expert on each rank."""
        shape = (self.layers, self.ranks, self.experts)
        layer, slot = np.nonzero(self.slot_expert >= 0)
        keys = (layer * self.ranks + slot // self.slots_per_rank) * self.experts
        keys += self.slot_expert[layer, slot]
        return np.bincount(keys, minlength=np.prod(shape)).reshape(shape).astype(np.int32)

    @property
    def spread(self) -> Int[np.ndarray, "L E"]:
        """Ranks that hold each expert: how many losses it takes to lose it, if they are the wrong ones."""
        return np.count_nonzero(self.holders, axis=1).astype(np.int32)

    @property
    def min_copies(self) -> int:
        """The fewest copies that any expert has: 0 means that the model can't be computed."""
        return int(self.copies.min())

    @functools.cached_property
    def digest(self) -> str:
        """A hash of the whole placement, for comparing it between ranks."""
        header = f"{self.slot_expert.shape} {self.experts} {self.ranks} ".encode()
        data = self.slot_expert.astype("<i4").tobytes()
        return hashlib.sha256(header + data).hexdigest()

    def expert_slots(self, max_copies: int | None = None) -> Int[np.ndarray, "L E X"]:
        """The inverse: slots of each expert's copies, ascending, -1 after the last.

        Args:
          max_copies: width of the table; default the largest number of copies.

        Raises:
          ValueError: if an expert has more copies.
        """
        most = int(self.copies.max())
        width = max(most, 1) if max_copies is None else max_copies
        if most > width:
            raise ValueError(
                f"max_copies must be at least {most}, the copies of one expert; got {max_copies}."
            )
        layer, slot = np.nonzero(self.slot_expert >= 0)
        keys = layer * self.experts + self.slot_expert[layer, slot]
        order = np.argsort(keys, kind="stable")
        counts = self.copies.reshape(-1)
        number = np.arange(len(keys)) - np.repeat(np.cumsum(counts) - counts, counts)
        inverse = np.full((self.layers * self.experts, width), -1, np.int32)
        inverse[keys[order], number] = slot[order]
        return inverse.reshape(self.layers, self.experts, width)

    def tables(
        self, order: Sequence[int] | None = None, *, max_copies: int | None = None
    ) -> ExpertTables:
        """What a compiled step reads, with a leading axis of layers; ``jax.tree.map(lambda x: x[layer], tables)`` is one layer's.

        Args:
          order: the ranks in the order of the mesh, which numbers the slots; default all, lost ones included.
          max_copies: width of the tables, which is part of the executable's shape; default the most that is possible at all
            with this number of slots.

        Raises:
          CoverageLost: if an expert has no copy on these ranks.
          ValueError: if an expert has more copies than ``max_copies``, or a rank comes twice.
        """
        order = list(range(self.ranks)) if order is None else list(order)
        if len(set(order)) != len(order) or not set(order) <= set(range(self.ranks)):
            raise ValueError(f"order must name ranks below {self.ranks}, each once; got {order}.")
        blocks = self.slot_expert.reshape(self.layers, self.ranks, self.slots_per_rank)[:, order]
        there = Placement(
            blocks.reshape(self.layers, len(order) * self.slots_per_rank), self.experts, len(order)
        )
        there.check()
        width = there.slots - self.experts + 1 if max_copies is None else max_copies
        return ExpertTables(jnp.asarray(there.expert_slots(width)), jnp.asarray(there.copies))

    def rank_load(self, load: Float[np.ndarray, "L E"]) -> Float[np.ndarray, "L R"]:
        """Load of each rank when every expert's load is shared evenly by its copies."""
        share = load / np.maximum(self.copies, 1)
        return np.einsum("lre,le->lr", self.holders, share)

    def without(self, ranks: Sequence[int]) -> "Placement":
        """The same with the slots of ``ranks`` empty; experts may be left without a copy."""
        table = self.slot_expert.reshape(self.layers, self.ranks, -1).copy()
        table[:, list(ranks)] = -1
        return self.replace_slots(table.reshape(self.layers, -1))

    def replace_slots(self, slot_expert: Int[np.ndarray, "L S"]) -> "Placement":
        """Another table for the same experts and ranks."""
        return Placement(slot_expert, self.experts, self.ranks)

    def check(self, membership: Membership | None = None) -> None:
        """Checks that every expert has a copy and, given a membership, that lost ranks hold none.

        Raises:
          CoverageLost: if an expert has none; ``missing`` names all.
          ValueError: if a slot of an inactive rank holds an expert, or the capacities differ.
        """
        if membership is not None:
            dead = np.flatnonzero(~active_mask(self, membership))
            held = np.argwhere(self.holders[:, dead].any(-1))
            if held.size:
                raise ValueError(
                    f"slots of inactive ranks must be -1 in epoch {membership.epoch}; rank {dead[held[0, 1]]} holds experts of "
                    f"layer {held[0, 0]}. Repair the placement first."
                )
        missing = [(int(layer), int(expert)) for layer, expert in np.argwhere(self.copies == 0)]
        if missing:
            raise CoverageLost(
                f"every expert must have a copy; {describe(missing)} none. Repair the placement.",
                missing,
            )

    def to_dict(self) -> dict[str, Any]:
        """For messages and files (JSON types only)."""
        return {
            "experts": self.experts,
            "ranks": self.ranks,
            "slot_expert": self.slot_expert.tolist(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Placement":
        """The inverse of ``to_dict``."""
        table = np.asarray(values["slot_expert"], np.int32)
        return cls(table, int(values["experts"]), int(values["ranks"]))


def active_mask(placement: Placement, membership: Membership) -> Bool[np.ndarray, " R"]:
    """Which of the placement's ranks are active; checks that both have the same capacity."""
    if membership.capacity != placement.ranks:
        raise ValueError(
            f"membership must have the placement's capacity of {placement.ranks} ranks; got {membership.capacity}."
        )
    return np.asarray(membership.active)


def describe(missing: Sequence[tuple[int, int]]) -> str:
    """The subject of a sentence about experts that lack something: the first one by name, and how many more."""
    layer, expert = missing[0]
    first = f"(layer {layer}, expert {expert})"
    return f"{first} has" if len(missing) == 1 else f"{first} and {len(missing) - 1} more have"


def check_slots(
    membership: Membership, slots_per_rank: int, experts: int, missing: Sequence[tuple[int, int]]
) -> None:
    """Raises CoverageLost unless the active ranks have a slot for every expert."""
    short = experts - len(membership.ranks) * slots_per_rank
    if short <= 0:
        return
    holes = [rank for rank, on in enumerate(membership.active) if not on]
    needed = -(-short // slots_per_rank) if slots_per_rank else 0
    if needed and needed <= len(holes):
        advice = f"Bring back {needed} of ranks {', '.join(map(str, holes))}."
    else:
        advice = "Give each rank more slots (redundant experts)."
    whom = f"{describe(missing)} no copy and " if missing else ""
    raise CoverageLost(
        f"{whom}{short} slots are missing per layer: {len(membership.ranks)} active ranks have {slots_per_rank} each, "
        f"for {experts} experts. {advice}",
        missing,
        short,
        holes,
    )


def common_floor(floor: int, ranks: int, slots_per_rank: int, experts: int) -> int:
    """The floor of copies on distinct ranks, up to ``floor``, that every expert can have at once."""
    return max(1, min(floor, ranks, ranks * slots_per_rank // experts))


def rebalance(
    load: Shaped[np.ndarray, "L E"],
    membership: Membership,
    slots_per_rank: int,
    *,
    floor: int = 2,
    near: Placement | None = None,
) -> Placement:
    """Places everything anew on the active ranks: EPLB's global policy, a floor of copies, and copies apart.

    No rank holds an expert twice; every expert has at least ``floor`` copies if the slots are enough for all, else
    slots // experts. What is left follows the load. All active ranks have as many slots; a slot stays empty only if
    its rank holds every expert already.

    Args:
      load: [layers, experts], any non-negative numbers; a layer of zeros counts as even load.
      membership: whose active ranks to use.
      slots_per_rank: of a layer.
      floor: copies that every expert should have.
      near: a placement to stay near to: which rank and slot a set of experts goes to is free, and chosen so that as many slots
        as possible stay as they are.

    Raises:
      CoverageLost: if the active ranks have fewer slots than there are experts.
      ValueError: if a load is negative or not finite, or an argument doesn't fit.
    """
    load = np.asarray(load, np.float64)
    layers, experts = load.shape
    if not np.isfinite(load).all() or (load < 0).any():
        bad = load[~np.isfinite(load) | (load < 0)][0]
        raise ValueError(f"load must be finite and >= 0; got {bad}.")
    if slots_per_rank < 1 or floor < 1:
        raise ValueError(
            f"slots_per_rank and floor must be >= 1; got {slots_per_rank} and {floor}."
        )
    check_slots(membership, slots_per_rank, experts, ())
    load = np.where(load.sum(-1, keepdims=True) > 0, load, 1.0)
    ranks = list(membership.ranks)
    least = common_floor(floor, len(ranks), slots_per_rank, experts)
    blocks = spread(load, len(ranks), slots_per_rank, least)
    blocks = blocks.reshape(layers, len(ranks), slots_per_rank)
    if near is not None:
        expected = (layers, experts, membership.capacity, slots_per_rank)
        got = (near.layers, near.experts, near.ranks, near.slots_per_rank)
        if got != expected:
            raise ValueError(
                f"near must have {expected} layers, experts, ranks and slots per rank; got {got}."
            )
        before = near.slot_expert.reshape(layers, near.ranks, slots_per_rank)[:, ranks]
        blocks = align_slots(_align_ranks(blocks, before, experts), before)
    table = np.full((layers, membership.capacity, slots_per_rank), -1, np.int32)
    table[:, ranks] = blocks
    return Placement(table.reshape(layers, -1), experts, membership.capacity)


def _align_ranks(blocks: np.ndarray, before: np.ndarray, experts: int) -> np.ndarray:
    """Gives each rank the set of experts (of [L, R, S]) with which the ranks together keep the most: an assignment problem."""

    def members(table: np.ndarray) -> np.ndarray:
        marks = np.zeros((*table.shape[:2], experts + 1), np.float32)
        np.put_along_axis(marks, table, 1.0, -1)  # -1 marks the last column
        return marks[..., :experts]

    common = members(before) @ members(blocks).swapaxes(-1, -2)
    chosen = np.stack([linear_sum_assignment(layer, maximize=True)[1] for layer in common])
    return np.take_along_axis(blocks, chosen[..., None], 1)


def align_slots(blocks: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Orders each rank's experts so that those it had stay in their slots. A rank of ``blocks`` holds no expert twice."""
    same = (before[..., :, None] == blocks[..., None, :]) & (before >= 0)[..., None]
    same &= np.cumsum(same, axis=-2) == 1  # of several slots with the expert, the first
    kept, placed = same.any(-1), same.any(-2)
    result = np.where(kept, before, -1)
    # The k-th free slot takes the k-th expert that has none yet.
    slots = np.argsort(kept, axis=-1, kind="stable")
    items = np.argsort(placed, axis=-1, kind="stable")
    free = np.arange(kept.shape[-1]) < np.count_nonzero(~kept, axis=-1)[..., None]
    arranged = np.where(
        free, np.take_along_axis(blocks, items, -1), np.take_along_axis(result, slots, -1)
    )
    np.put_along_axis(result, slots, arranged, -1)
    return result.astype(np.int32)
