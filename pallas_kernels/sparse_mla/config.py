"""How the Hopper kernel divides its work."""

import dataclasses
import math

from pallas_kernels import _tuned

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
    prefetch: bool = False
    producer_registers: int = 72
    consumer_registers: int = 216


# As measured on an H200 (docs/kernels.md). Decoding 8-bit rows takes registers, and longer than their copy, which it can hide.
_OF_BFLOAT16, _OF_8_BIT = (
    Config(),
    Config(prefetch=True, producer_registers=104, consumer_registers=200),
)


def key_of(blocks: int, columns: int, eight_bit: bool) -> str:
    """The class of calls that measured settings are kept for: powers of two."""
    stored = "8-bit" if eight_bit else "bfloat16"
    return f"{_tuned.size_class(blocks)} blocks, {_tuned.size_class(columns)} {stored} rows"


def of_call(blocks: int, columns: int, multiprocessors: int, *, eight_bit: bool) -> Config:
    """As measured, or else the heuristic's.

    Args:
      blocks: queries times blocks of heads.
      columns: K.
      multiprocessors: of the GPU.
      eight_bit: whether rows are stored in 8 bits.
    """
    measured = _tuned.lookup("sparse_mla", key_of(blocks, columns, eight_bit))
    if measured is None:
        return heuristic(blocks, columns, multiprocessors, eight_bit=eight_bit)
    return Config(**{**measured, "splits": max(_needed(columns), measured["splits"])})


def _needed(columns: int) -> int:
    return math.ceil(columns / MOST_COLUMNS)


def heuristic(blocks: int, columns: int, multiprocessors: int, *, eight_bit: bool) -> Config:
    """As many splits as multiprocessors would else stand idle, of at least two steps each; arguments as of ``of_call``."""
    needed = _needed(columns)
    useful = max(1, columns // (2 * BLOCK))
    spare = max(1, multiprocessors // max(blocks, 1))
    config = _OF_8_BIT if eight_bit else _OF_BFLOAT16
    return dataclasses.replace(config, splits=max(needed, min(useful, spare)))
