"""Tiles of the Hopper kernels, by heuristic."""

import dataclasses

from pallas_kernels._pallas import SHARED_MEMORY

# Bytes of a block's ring of slots. The rest is for the pipeline's barriers and alignment, with room to spare.
_RING = SHARED_MEMORY - 27 * 1024
_MOST_STAGES = 16


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the product is cut.

    Attributes:
      warpgroups: that multiply in a block, 64 outputs each.
      splits: shares of the groups, one per block; their sums are added afterwards.
      groups: 64 weights along K of every output, that are copied at a time.
      stages: slots of such copies in shared memory.
    """

    warpgroups: int
    splits: int
    groups: int
    stages: int


def tiling(groups: int, columns: int, rows: int, planes: int, multiprocessors: int) -> Tiling:
    """One wave of blocks that covers as many multiprocessors as it can, each with as much in flight as it has room for.

    Args:
      groups, columns, planes: of the weights; columns is a multiple of 64.
      rows: of x, padded to a multiple of eight.
      multiprocessors: of the GPU.
    """
    warpgroups = next(w for w in (4, 2, 1) if columns % (64 * w) == 0)
    blocks = columns // (64 * warpgroups)
    splits = max(
        s
        for s in range(1, groups + 1)
        if groups % s == 0 and (s == 1 or blocks * s <= multiprocessors)
    )
    steps = groups // splits
    at_a_time = 2 if steps % 2 == 0 else 1
    slot = at_a_time * (64 * warpgroups * (33 + 8 * planes) + 128 * rows)
    return Tiling(
        warpgroups,
        splits,
        at_a_time,
        max(1, min(_MOST_STAGES, _RING // slot, steps // at_a_time)),
    )
