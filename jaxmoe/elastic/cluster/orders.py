"""Meshes that have never been: on CPU one whose connections were shut down, or whose members have changed, cannot be used again.

Gloo remembers its connections by the mesh's devices in their order, and has no way to forget them. So every epoch gets an order
of its own; when the orders of a set of ranks are used up, one of them goes on, on another of its process's devices.
"""

import itertools
from collections.abc import Iterable, Iterator

from jaxmoe.errors import JaxMoeError

Order = tuple[tuple[int, int], ...]
"""(rank, which of its devices), in the order of the mesh."""


class OrdersExhausted(JaxMoeError):
    """These ranks have been in every possible mesh; their processes have to be started again."""


class Orders:
    """Orders that are left.

    Args:
      devices: of each rank.
      reusable: whether a mesh can be used again: where nothing is remembered.
    """

    def __init__(self, devices: int, *, reusable: bool = False):
        self._devices, self._reusable = devices, reusable
        self._used: set[Order] = set()
        self._home: dict[int, int] = {}

    def fresh(self, ranks: Iterable[int]) -> Order:
        """An order of the ranks that has not been used, with as few of them as possible on other devices than last.

        Raises:
          OrdersExhausted: if there is none.
        """
        ranks = tuple(sorted(ranks))
        for homes in self._homes(ranks):
            for order in itertools.permutations(zip(ranks, homes, strict=True)):
                if (
                    self._reusable or order not in self._used or len(order) == 1
                ):  # alone: no connections
                    self._used.add(order)
                    self._home.update(order)
                    return order
        raise OrdersExhausted(f"ranks {list(ranks)} have been in every mesh that is possible.")

    def _homes(self, ranks: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """Devices of the ranks, those with the fewest changes first."""
        last = [self._home.get(rank, 0) for rank in ranks]
        for changes in range(len(ranks) + 1):
            for moved in itertools.combinations(range(len(ranks)), changes):
                choices = [
                    [d for d in range(self._devices) if d != last[i]] if i in moved else [last[i]]
                    for i in range(len(ranks))
                ]
                yield from itertools.product(*choices)

    def restarted(self, rank: int) -> None:
        """A new process of a rank begins on its first device."""
        self._home.pop(rank, None)
