"""Sizes of the Mosaic GPU kernels: heuristics here, measured ones in ``pallas_kernels/tuned/index_topk.json``."""

import dataclasses

from pallas_kernels import _tuned


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernels split their work.

    Attributes:
      queries: queries of a sequence that share a reading of its keys.
      together: of them, how many one product scores: 64 heads each.
      warpgroups: that score keys side by side, in a thread block.
      depth: key tiles that each of them has on the way.
      split: keys that a thread block scores, at most.
      chunk: keys of a row that the selection holds in registers at once.
      digit: bits of the threshold that a pass over a row finds.
      resident: the longest row that the selection copies to shared memory.
      scores: that exist at once.
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


def key_of(batch: int, tokens: int, keys: int) -> str:
    """The class of shapes that measured sizes are kept for: powers of two."""
    return f"{1 << (batch * tokens - 1).bit_length()} queries, {1 << (keys - 1).bit_length()} keys"


def chosen(batch: int, tokens: int, keys: int, multiprocessors: int) -> Config:
    """The measured sizes, or else the heuristic's."""
    config = heuristic(batch, tokens, keys, multiprocessors)
    measured = _tuned.lookup("index_topk", key_of(batch, tokens, keys))
    return dataclasses.replace(config, **measured) if measured else config


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
