"""What elasticity costs while nothing happens: two clusters under the same load, whose steps take turns.

Turns of seconds are of no use here: on a shared machine they differ by more than what is looked for. So the clusters alternate
step by step, and a step is compared with the next one of the other cluster, if that is of the same size.
"""

import threading
import time
from collections.abc import Mapping
from typing import Any

from jaxmoe.elastic.cluster.processes import Cluster
from jaxmoe.elastic.experiment.stand import Stand

_STEP_S = 60.0  # a cluster that computes nothing for so long has no work any more


class _Turns:
    """Whose turn it is."""

    def __init__(self, number: int):
        self._number, self._turn, self._over = number, 0, False
        self._changed = threading.Condition()

    def wait(self, index: int) -> None:
        """Until it is ``index``'s turn, or nobody takes turns any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._turn == index, _STEP_S)

    def done(self, index: int) -> None:
        """It is the next one's."""
        with self._changed:
            if self._turn == index:
                self._turn = (index + 1) % self._number
                self._changed.notify_all()

    def end(self) -> None:
        """All go on as they like."""
        with self._changed:
            self._over = True
            self._changed.notify_all()


class _Timed:
    """Has a cluster's engine take turns with others, and takes the time of its steps: from one look at the ranks to the next.

    Attributes:
      steps: (tokens of the compiled step, seconds) of every step.
    """

    def __init__(self, cluster: Cluster, index: int, turns: _Turns, enough: int):
        self._index, self._turns, self._enough = index, turns, enough
        self._poll, self._pack = cluster.poll, cluster.pack
        self._began, self._size = 0.0, 0
        self.steps: list[tuple[int, float]] = []
        self.done = threading.Event()
        # On the object: the engine asks it, and no other way leads between two of its steps.
        cluster.poll, cluster.pack = self.poll, self.pack

    def poll(self) -> Any:
        if self._size:
            self.steps.append((self._size, time.perf_counter() - self._began))
            self._size = 0
            if len(self.steps) >= self._enough:
                self.done.set()
        self._turns.done(self._index)
        self._turns.wait(self._index)
        self._began = time.perf_counter()
        return self._poll()

    def pack(self, works: list) -> Any:
        batches = self._pack(works)
        self._size = len(batches[0].tokens) if batches else 0
        return batches

    def remove(self, cluster: Cluster) -> None:
        """The cluster is as it was."""
        del cluster.poll, cluster.pack


def in_turns(
    stands: Mapping[str, Stand], steps: int, seed: int, skip: int = 100
) -> dict[str, list[float]]:
    """Seconds of the steps of several clusters that take turns, under the same load.

    Args:
      stands: by name.
      steps: of each.
      seed: of the load.
      skip: further ones before, which do not count.

    Returns:
      By name, as long as each other: the i-th of each is of the same size; steps that are not are left out. Empty if none are.
    """
    turns = _Turns(len(stands))
    timed = {
        name: _Timed(stand.cluster, i, turns, skip + steps)
        for i, (name, stand) in enumerate(stands.items())
    }
    loads = [stand.load(seed).start() for stand in stands.values()]
    for each in timed.values():
        each.done.wait(_STEP_S + skip + steps)
    turns.end()
    for load in loads:
        load.stop(_STEP_S)
    for name, stand in stands.items():
        timed[name].remove(stand.cluster)
    found: dict[str, list[float]] = {name: [] for name in stands}
    counted = (each.steps[skip : skip + steps] for each in timed.values())
    for row in zip(*counted, strict=False):  # one may have had a step less
        if len({size for size, _ in row}) == 1:
            for name, (_, seconds) in zip(found, row, strict=True):
                found[name].append(seconds)
    return found if all(found.values()) else {}
