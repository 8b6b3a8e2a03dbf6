"""Sizes of the Mosaic GPU kernels: heuristics here, measured ones in ``pallas_kernels/tuned/index_topk.json``."""

import dataclasses
import math

from pallas_kernels import _tuned
from pallas_kernels._pallas import SHARED_MEMORY

ROWS = 64  # keys of a product: what a warpgroup multiplies
COLUMNS = 64  # of a product, or a multiple: its queries' heads
_RESERVED = 3 * 1024  # of a block's shared memory: 2 KB for sums across threads, and barriers


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernels split their work.

    Attributes:
      queries: queries of a sequence that share a reading of its keys.
      together: of them, how many one product scores; at most 8, as the heads of each are filled up to a multiple of 8.
      warpgroups: that score keys side by side, in a thread block.
      depth: key tiles that each of them has on the way.
      split: keys that a thread block scores, at most.
      chunk: keys of a row that the selection holds in registers at once.
      digit: bits of the threshold that a pass over a row finds.
      resident: the longest row that the selection copies to shared memory.
      scores: that exist at once.

    Raises:
      ValueError: if digits do not make up the 32 bits, or groups of ``together`` the queries, or such a group is above 8.
    """

    queries: int = 4
    together: int = 2
    warpgroups: int = 3
    depth: int = 2
    split: int = 8192
    chunk: int = 2048
    digit: int = 2
    resident: int = 2**14
    scores: int = 2**24

    def __post_init__(self) -> None:
        if 32 % self.digit:
            raise ValueError(f"Config: digit must divide 32; got {self.digit}.")
        if self.queries % self.together or self.together > 8:
            raise ValueError(
                f"Config: together must divide queries and be at most 8; got {self.together} and {self.queries}."
            )

    def padded(self, heads: int) -> int:
        """Heads of a query, with those that fill up products."""
        step = COLUMNS // math.gcd(COLUMNS, self.together)
        return -(-heads // step) * step

    def shared_bytes(self, heads: int, size: int) -> int:
        """Of a thread block that scores: its queries, their weights, and tiles of keys on the way."""
        columns, tiles = self.queries * self.padded(heads), self.warpgroups * self.depth
        weights = math.ceil(4 * columns / 1024) * 1024
        return 2 * size * (columns + tiles * ROWS) + weights + _RESERVED


def key_of(batch: int, tokens: int, keys: int) -> str:
    """The class of shapes that measured sizes are kept for: powers of two."""
    return f"{_tuned.size_class(batch * tokens)} queries, {_tuned.size_class(keys)} keys"


def chosen(shape: tuple[int, ...], keys: int, multiprocessors: int) -> Config:
    """The measured sizes, or else the heuristic's, made to fit, for queries of a shape [B, T, I, K]."""
    batch, tokens, heads, size = shape
    config = heuristic(batch, tokens, keys, multiprocessors)
    measured = _tuned.lookup("index_topk", key_of(batch, tokens, keys))
    return fitting(dataclasses.replace(config, **measured) if measured else config, heads, size)


def fitting(config: Config, heads: int, size: int) -> Config:
    """``config`` with fewer tiles on the way, and then fewer queries, as far as shared memory demands."""
    while config.shared_bytes(heads, size) > SHARED_MEMORY:
        if config.depth > 1:
            config = dataclasses.replace(config, depth=config.depth - 1)
        elif config.queries > 1:
            queries = config.queries // 2
            together = math.gcd(config.together, queries)
            config = dataclasses.replace(config, queries=queries, together=together)
        else:
            break
    return config


def heuristic(batch: int, tokens: int, keys: int, multiprocessors: int) -> Config:
    """For queries [batch, tokens] that each score up to ``keys`` keys.

    A long prefill shares keys among queries; a decode has one query to a sequence and needs the keys spread over the device.
    """
    queries = min(4, 1 << (tokens - 1).bit_length())
    blocks = batch * -(-tokens // queries)
    split = 8192
    while split > 512 and blocks * -(-keys // split) < 2 * multiprocessors:
        split //= 2
    return Config(queries=queries, together=min(2, queries), split=split)
