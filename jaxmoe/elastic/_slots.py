"""A placement being changed slot by slot, in all layers at once, with the loads that result."""

import numpy as np

from jaxmoe.elastic.placement import Placement


class Slots:
    """Working copy of what live slots really hold.

    Args:
      placement: to begin with. Slots of dead ranks, and those whose memory holds something else, count as empty.
      alive: [R] bool.
      held: [L, S] the expert whose weights lie in each slot.
      load: [L, E] of each expert, >= 0; None for even.
    """

    def __init__(
        self, placement: Placement, alive: np.ndarray, held: np.ndarray, load: np.ndarray | None
    ):
        shape = (placement.layers, placement.experts)
        self.load = np.ones(shape) if load is None else np.asarray(load, np.float64)
        if self.load.shape != shape or not (self.load >= 0).all():
            raise ValueError(
                f"load must be [layers, experts] = {shape} and >= 0; got {self.load.shape}, lowest {self.load.min()}."
            )
        self.size, self.held = placement.slots_per_rank, held
        self.rank = np.arange(placement.slots) // self.size
        self.usable = alive[self.rank]
        valid = self.usable & (held == placement.slot_expert)
        self.table = np.where(valid, placement.slot_expert, -1)
        start = placement.replace_slots(self.table)
        self.copies, self.holders = start.copies.copy(), start.holders.copy()
        self.spread = start.spread
        self.rank_load = start.rank_load(self.load)

    def assign(self, needed: np.ndarray, keep: int) -> None:
        """Gives experts ``needed`` [L, E] more slots each, as far as they can be had.

        A slot can be had if its rank doesn't hold the expert yet, and it is empty or its own expert stays on ``keep`` ranks
        without it. First choose those whose weights lie somewhere unlisted, before others overwrite them; then those on the
        fewest ranks; then those with the most load.
        """
        unlisted = np.zeros(self.load.shape, bool)
        layer, slot = np.nonzero(self.usable & (self.table < 0) & (self.held >= 0))
        unlisted[layer, self.held[layer, slot]] = True
        order = np.lexsort((-self.load, self.spread, ~unlisted), axis=-1)
        times = np.take_along_axis(needed, order, -1)
        queue = np.full((len(order), times.sum(-1).max(initial=0)), -1)
        for line, experts, repeats in zip(queue, order, times, strict=True):
            line[: repeats.sum()] = np.repeat(experts, repeats)
        for experts in queue.T:
            rows = np.flatnonzero(experts >= 0)
            self._assign_one(rows, experts[rows], keep)

    def _assign_one(self, rows: np.ndarray, expert: np.ndarray, keep: int) -> None:
        """One expert in each of ``rows``: unlisted copies first, then empty slots, then the lowest peak of load."""
        index, mine = rows[:, None], expert[:, None]
        table = self.table[rows]
        empty, other = table < 0, np.maximum(table, 0)
        copies = self.copies[index, other]
        alone = self.holders[index, self.rank, other] == 1
        spare = empty | (self.spread[index, other] - alone >= keep)
        allowed = self.usable & spare & (self.holders[index, self.rank, mine] == 0)
        kind = np.where(self.held[rows] == mine, 0, np.where(empty, 1, 2))
        kind = np.where(allowed, kind, 3)
        first = allowed & (kind == kind.min(-1, keepdims=True))
        peak = np.where(first, self._peaks(rows, expert, empty, other, copies), np.inf)
        lowest = peak.min(-1, keepdims=True)
        # Equal up to rounding: the expert with the most copies gives one up.
        ties = first & (peak <= lowest * (1 + 1e-9))
        slot = np.where(ties, np.where(empty, 0, copies), -1).argmax(-1)
        found = allowed.any(-1)
        self._put(rows[found], slot[found], expert[found])

    def _peaks(
        self,
        rows: np.ndarray,
        expert: np.ndarray,
        empty: np.ndarray,
        other: np.ndarray,
        copies: np.ndarray,
    ) -> np.ndarray:
        """[n, S] the load of the busiest rank that replacing a slot's expert concerns: its own, or one with another copy."""
        index = rows[:, None]
        on_rank = self.rank_load[rows][:, self.rank]
        gained = self.load[rows, expert] / (self.copies[rows, expert] + 1)
        load = self.load[index, other]
        share, later = load / np.maximum(copies, 1), load / np.maximum(copies - 1, 1)
        receiver = on_rank + gained[:, None] - np.where(empty, 0.0, share)
        busiest = np.full((len(rows), self.load.shape[1]), -np.inf)
        line, slot = np.nonzero(~empty)
        np.maximum.at(busiest, (line, other[line, slot]), on_rank[line, slot])
        holders = np.take_along_axis(busiest, other, -1) + later - share
        return np.where(empty, receiver, np.maximum(receiver, holders))

    def fill(self, rank: int, floor: int) -> None:
        """Fills the empty slots of a rank: what is on fewer than ``floor`` ranks first, then what has the most load per copy."""
        rows = np.arange(len(self.table))
        for slot in range(rank * self.size, (rank + 1) * self.size):
            here = self.holders[:, rank] > 0
            short = np.where(here, -1, np.maximum(floor - self.spread, 0))
            first = ~here & (short == short.max(-1, keepdims=True))
            share = self.load / np.maximum(self.copies, 1)
            expert = np.where(first, share, -1.0).argmax(-1)
            open_rows = rows[~here.all(-1) & (self.table[:, slot] < 0)]
            self._put(open_rows, np.full(len(open_rows), slot), expert[open_rows])

    def _put(self, rows: np.ndarray, slot: np.ndarray, expert: np.ndarray) -> None:
        other = self.table[rows, slot]
        replaced = other >= 0
        rank = self.rank[slot]
        self._count(rows[replaced], rank[replaced], other[replaced], -1)
        self._count(rows, rank, expert, 1)
        self.table[rows, slot] = expert

    def _count(self, rows: np.ndarray, rank: np.ndarray, expert: np.ndarray, step: int) -> None:
        """One copy more or less; the others share the load anew."""
        for sign in (-1, 1):
            share = self.load[rows, expert] / np.maximum(self.copies[rows, expert], 1)
            on = self.holders[rows, :, expert]
            self.rank_load[rows] += sign * on * share[:, None]
            if sign < 0:
                self.holders[rows, rank, expert] += step
                self.copies[rows, expert] += step
        self.spread[rows, expert] = np.count_nonzero(on, axis=-1)
