"""From one placement to another in small steps, none of which leaves an expert without a copy."""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from jaxmoe.elastic.placement import Placement

Write = tuple[int, int]  # slot, and the expert that it gets


def chunks(old: Placement, new: Placement, max_moves: int) -> Iterator[Placement]:
    """Placements on the way from ``old`` to ``new``, the last one equal to it; each to be adopted between two steps.

    Neighbours differ in at most ``max_moves`` slots, and each covers every expert. Most slots change once; experts that
    only trade places need more where a cycle is longer than a chunk.

    Args:
      old: the current placement.
      new: of the same experts, ranks and slots.
      max_moves: slots that may change at a time, all layers together.

    Raises:
      CoverageLost: if one of the two doesn't cover every expert.
      ValueError: if they don't fit, or ``max_moves`` is 1 and a layer without a redundant slot has experts that trade places.
    """
    if (old.experts, old.ranks, old.slot_expert.shape) != (
        new.experts,
        new.ranks,
        new.slot_expert.shape,
    ):
        raise ValueError(f"new must be a placement like {old!r}; got {new!r}.")
    if max_moves < 1:
        raise ValueError(f"max_moves must be >= 1; got {max_moves}.")
    old.check()
    new.check()
    groups = [
        (layer, group)
        for layer in range(old.layers)
        for group in _groups(layer, old.slot_expert[layer], new.slot_expert[layer], max_moves)
    ]
    return _packed(old, groups, max_moves)


def _packed(
    old: Placement, groups: list[tuple[int, list[Write]]], max_moves: int
) -> Iterator[Placement]:
    table, changed = old.slot_expert.copy(), 0
    for layer, group in groups:
        if changed + len(group) > max_moves:
            yield old.replace_slots(table)
            changed = 0
        for slot, expert in group:
            table[layer, slot] = expert
        changed += len(group)
    if changed:
        yield old.replace_slots(table)


def _groups(layer: int, old: np.ndarray, new: np.ndarray, limit: int) -> list[list[Write]]:
    """Writes of one layer, in groups of at most ``limit`` that belong together, in an order that keeps every expert covered."""
    return _Layer(layer, old.tolist(), new.tolist(), limit).run()


class _Layer:
    """The slots of one layer on their way."""

    def __init__(self, layer: int, now: list[int], goal: list[int], limit: int):
        self.layer, self.now, self.goal, self.limit = layer, now, goal, limit
        self.at: defaultdict[int, set[int]] = defaultdict(set)  # slots of each expert, now
        self.open: dict[int, None] = {}  # slots that are not as they should be, in a fixed order
        for slot, (expert, wanted) in enumerate(zip(now, goal, strict=True)):
            self.at[expert].add(slot)
            if expert != wanted:
                self.open[slot] = None
        self.groups: list[list[Write]] = []

    def run(self) -> list[list[Write]]:
        free = [slot for slot in self.open if self._redundant(slot)]
        while self.open:
            while free:
                slot = free.pop()
                # It may have been written meanwhile, or its expert's other copies replaced.
                if slot in self.open and self._redundant(slot):
                    wanted = self.goal[slot]
                    self._write([(slot, wanted)])
                    free.extend(sorted(s for s in self.at[wanted] if s in self.open))
            if self.open:
                free.extend(self._trade())
        return self.groups

    def _redundant(self, slot: int) -> bool:
        return self.now[slot] < 0 or len(self.at[self.now[slot]]) > 1

    def _write(self, group: list[Write]) -> None:
        for slot, expert in group:
            self.at[self.now[slot]].discard(slot)
            self.now[slot] = expert
            self.at[expert].add(slot)
            if expert == self.goal[slot]:
                self.open.pop(slot, None)
            else:
                self.open[slot] = None
        self.groups.append(group)

    def _trade(self) -> list[int]:
        """Every open slot holds an only copy: writes (part of) a cycle of slots that want each other's experts.

        Returns:
          Slots that can be written on their own afterwards.
        """
        wants = {self.goal[slot]: slot for slot in self.open}
        start = next(iter(self.open))
        path, seen = [start], {start: 0}
        # The slot that wants what the last one holds: there is one, since the goal covers it and its only copy is here.
        while (follower := wants[self.now[path[-1]]]) not in seen:
            seen[follower] = len(path)
            path.append(follower)
        cycle = path[seen[follower] :]
        if self.limit == 1:
            return self._make_room(cycle[0])
        part = cycle[: self.limit]
        held = [self.now[slot] for slot in part]
        # Each gets what the one before held; if the cycle is cut, the first keeps the last one's expert for now.
        self._write([(slot, held[i - 1]) for i, slot in enumerate(part)])
        return []

    def _make_room(self, slot: int) -> list[int]:
        """Copies the expert of ``slot`` to a redundant slot that is as it should be, for a while."""
        for spare in range(len(self.now)):
            if spare not in self.open and self._redundant(spare):
                self._write([(spare, self.now[slot])])
                return [slot]
        raise ValueError(
            f"max_moves must be at least 2, since experts of layer {self.layer} trade places and it has no redundant slot; got 1."
        )
