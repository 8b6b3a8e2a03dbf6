"""Tiles of the Hopper kernels, as measured or by heuristic."""

import dataclasses
import itertools
from collections.abc import Iterator

from pallas_kernels import _tuned
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


def key_of(groups: int, columns: int, rows: int, planes: int) -> str:
    """What measured tilings are kept for; arguments as of ``tiling``."""
    return f"{groups} groups x {columns}, {planes} planes, {rows} rows"


def tilings(
    groups: int, columns: int, rows: int, planes: int, multiprocessors: int
) -> Iterator[Tiling]:
    """Those worth timing; arguments as of ``tiling``. A block's ring is as long as it can be, or half that."""
    for warpgroups, at_a_time in itertools.product((1, 2, 4), (1, 2, 4)):
        if columns % (64 * warpgroups) or groups % at_a_time:
            continue
        blocks = columns // (64 * warpgroups)
        for splits in range(1, groups // at_a_time + 1):
            waves = blocks * splits / multiprocessors
            if (groups // at_a_time) % splits or not (splits == 1 or 0.5 <= waves <= 2):
                continue
            most = _stages(groups // splits, at_a_time, warpgroups, rows, planes)
            for stages in sorted({max(1, most // 2), most}):
                yield Tiling(warpgroups, splits, at_a_time, stages)


def _stages(steps: int, at_a_time: int, warpgroups: int, rows: int, planes: int) -> int:
    slot = at_a_time * (64 * warpgroups * (33 + 8 * planes) + 128 * rows)
    return max(1, min(_MOST_STAGES, _RING // slot, steps // at_a_time))


def tiling(groups: int, columns: int, rows: int, planes: int, multiprocessors: int) -> Tiling:
    """As measured, or else one wave of blocks that covers as many multiprocessors as it can, each with as much in flight as it has room for.

    Args:
      groups, columns, planes: of the weights; columns is a multiple of 64.
      rows: of x, padded to a multiple of eight.
      multiprocessors: of the GPU.
    """
    measured = _tuned.lookup("sefp", key_of(groups, columns, rows, planes))
    if measured is not None:
        return Tiling(**measured)
    warpgroups = next(w for w in (4, 2, 1) if columns % (64 * w) == 0)
    blocks = columns // (64 * warpgroups)
    splits = max(
        s
        for s in range(1, groups + 1)
        if groups % s == 0 and (s == 1 or blocks * s <= multiprocessors)
    )
    steps = groups // splits
    at_a_time = 2 if steps % 2 == 0 else 1
    stages = _stages(steps, at_a_time, warpgroups, rows, planes)
    return Tiling(warpgroups, splits, at_a_time, stages)
