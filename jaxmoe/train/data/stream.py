"""A corpus's tokens, one document after another."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Stream:
    """Documents one after another, each between the tokens that begin and end it.

    Attributes:
      ids: uint16 or uint32 [N], as the vocabulary needs.
      documents: int64 [D], where each begins.
      sizes: uint32 [N], UTF-8 bytes of text in each token: 0 for special ones. None where nothing is scored.
      said: bool [N], what counts as a target, or None for everything.
      labels: where each document is from, if it must stay whole, or None.
    """

    ids: np.ndarray
    documents: np.ndarray
    sizes: np.ndarray | None
    said: np.ndarray | None = None
    labels: tuple[str, ...] | None = None

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.ids.size
