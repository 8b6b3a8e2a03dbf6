"""How the Hopper kernel divides its work."""

import dataclasses
import math

BLOCK = 64  # rows of a step: the height of a wgmma tile, and what shared memory holds twice
HEADS = 64  # heads of a block of threads
MOST_COLUMNS = 2048  # indices that shared memory still holds beside queries and rows


@dataclasses.dataclass(frozen=True)
class Config:
    """Division of one call.

    Attributes:
      splits: parts of a query's rows, each a block of threads of its own; their results are merged.
      prefetch: whether the next step's rows are called into the L2 cache a step ahead.
      producer_registers: per thread, of the warpgroup that copies rows.
      consumer_registers: per thread, of the two that compute.
    """

    splits: int = 1
    prefetch: bool = True
    producer_registers: int = 72
    consumer_registers: int = 216


def of_call(blocks: int, columns: int, multiprocessors: int) -> Config:
    """As many splits as multiprocessors would else stand idle, of at least two steps each.

    Args:
      blocks: queries times blocks of heads.
      columns: K.
      multiprocessors: of the GPU.
    """
    needed = math.ceil(columns / MOST_COLUMNS)
    useful = max(1, columns // (2 * BLOCK))
    spare = max(1, multiprocessors // max(blocks, 1))
    return Config(splits=max(needed, min(useful, spare)))
