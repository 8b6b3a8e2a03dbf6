"""Pipeline of the Hopper kernels: how much is in flight, as measured or by heuristic."""

import dataclasses

from pallas_kernels import _tuned
from pallas_kernels._pallas import SHARED_MEMORY

_RESERVED = 2048  # of a block's: barriers, and what is aligned
_BLOCKS = 2
# Bytes of a multiprocessor that its blocks share: 1 KB more than what one alone can have, and each of them takes 1 KB for itself.
_SHARED_MEMORY = SHARED_MEMORY - (_BLOCKS - 1) * 1024

# Bytes of rows that a block can hold. One that takes more than its share of a multiprocessor has it to itself.
MOST = _SHARED_MEMORY - _RESERVED

# Under this many bytes moved a launch costs as much as the movement, and XLA can fuse its gathers with what stands around them.
SMALL = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Config:
    """How many rows a block has in flight.

    Attributes:
      blocks: per multiprocessor, each a warpgroup.
      depth: rows of shared memory that loads go to.
      stores: how many tokens may have stores that still read shared memory.
      fuse: whether the kernel encodes rows; if not, XLA does, before.
    """

    blocks: int
    depth: int
    stores: int
    fuse: bool = True


def key_of(movement: str, row_bytes: int) -> str:
    """What measured pipelines are kept for; arguments as of ``of_rows``."""
    return f"{movement} {row_bytes}"


def of_rows(movement: str, row_bytes: int) -> Config:
    """For a "copy", "sum" or "encode" (what is stored are other rows than those loaded, no longer than them) of such rows.

    Latency times bandwidth is about 40 KB for each multiprocessor of an H200, so more than twice that gains little; two blocks
    hide each other's waits. The kernels refuse rows of which not even these few fit.
    """
    measured = _tuned.lookup("moe_dispatch", key_of(movement, row_bytes))
    if measured is not None:
        return Config(**measured)
    free = _SHARED_MEMORY // _BLOCKS - _RESERVED
    # One row more holds zeros, and other rows that are stored have two places.
    places = free // row_bytes - (1 if movement == "copy" else 3)
    depth = max(2, min(12, places))
    return Config(_BLOCKS, depth, depth // 2 if movement == "copy" else 2)
