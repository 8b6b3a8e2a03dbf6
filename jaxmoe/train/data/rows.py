"""Documents packed into rows, and the rows of a step.

Texts are concatenated and cut: row i holds the stream's tokens from i * seq_len on, two more than seq_len, so that every token is
the target of exactly one query per epoch, however long its document. What of a document lies in a row is its context; nothing
attends across documents. Conversations stay whole: the longest first, each goes to the row with the least room that is enough
(best fit decreasing). What is left of a row is padding.
"""

import dataclasses
import functools
import logging

import numpy as np

from jaxmoe.tokenizer import PAD
from jaxmoe.train.data.batch import Batch
from jaxmoe.train.data.corpus import Corpus
from jaxmoe.train.data.stream import Stream

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Parts of a stream, one per row, padded to one width.

    Attributes:
      stream: whose tokens they are.
      begins, ends: int64 [R], where each row's part lies.
      width: tokens per row.
    """

    stream: Stream
    begins: np.ndarray
    ends: np.ndarray
    width: int

    def __len__(self) -> int:
        return self.begins.size

    def take(self, rows: np.ndarray) -> Batch:
        """The given rows, int [B]."""
        stream, begins = self.stream, self.begins[rows][:, None]
        index = np.arange(self.width)[None]
        position = begins + index
        valid = position < self.ends[rows][:, None]
        position = np.where(valid, position, begins)
        document = np.searchsorted(stream.documents, position, side="right") - 1
        starts = np.where(valid, np.maximum(stream.documents[document] - begins, 0), index)
        weights = valid if stream.said is None else valid & stream.said[position]
        return Batch(
            np.where(valid, stream.ids[position], PAD).astype(np.int32),
            starts.astype(np.int32),
            weights.astype(np.float32),
        )

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        """UTF-8 bytes of text in each token of the given rows: int64 [B, W]."""
        position = self.begins[rows][:, None] + np.arange(self.width)[None]
        valid = position < self.ends[rows][:, None]
        return np.where(valid, self.stream.sizes[np.where(valid, position, 0)], 0).astype(np.int64)


def cut(stream: Stream, length: int) -> Rows:
    """Texts in rows of ``length`` queries, with a target for each and one more for multi-token prediction."""
    begins = np.arange(0, max(stream.size - 1, 1), length, dtype=np.int64)
    return Rows(stream, begins, np.minimum(begins + length + 2, stream.size), length + 2)


def _best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Items per row. Bit r of ``open_rooms`` says that there are rows with room for r more tokens."""
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    open_rooms = 0
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        enough = open_rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                open_rooms &= ~(1 << room)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        with_room.setdefault(room - length, []).append(row)
        open_rooms |= 1 << (room - length)
    return rows


def _shortened(stream: Stream, longest: int, *, truncate: bool) -> tuple[np.ndarray, np.ndarray]:
    """(documents that are used, their lengths).

    Raises:
      ValueError: for one that is too long, unless it may be cut; or if nothing said is left.
    """
    lengths = np.diff(stream.documents, append=stream.size)
    too_long = np.flatnonzero(lengths > longest)
    if too_long.size and not truncate:
        worst = too_long[np.argmax(lengths[too_long])]
        raise ValueError(
            f"{stream.labels[worst]} has {lengths[worst]} tokens, more than seq_len + 1 = {longest} ({too_long.size} of "
            f"{lengths.size} conversations are too long); raise --seq-len to {lengths[worst] - 1}, or pass --truncate to cut them."
        )
    lengths = np.minimum(lengths, longest)
    said = np.concatenate([np.zeros(1, np.int64), np.cumsum(stream.said)])
    used = np.flatnonzero(said[stream.documents + lengths] > said[stream.documents])
    if not used.size:
        raise ValueError(
            f"none of {lengths.size} conversations has assistant tokens among its first seq_len + 1 = {longest}; raise --seq-len."
        )
    if too_long.size:
        logger.warning(
            "truncated=%d conversations=%d longest=%d without_assistant_tokens=%d (left out)",
            too_long.size, lengths.size, longest, lengths.size - used.size,
        )  # fmt: skip
    return used, lengths[used]


def pack(stream: Stream, length: int, *, truncate: bool, width: int) -> Rows:
    """Conversations in rows of ``width``, of which ``length + 1`` tokens are used: the last one is only a target."""
    used, lengths = _shortened(stream, length + 1, truncate=truncate)
    rows = _best_fit(lengths, length + 1)
    order = np.asarray([item for row in rows for item in row])
    spans = [
        np.arange(begin, begin + n)
        for begin, n in zip(stream.documents[used[order]], lengths[order], strict=True)
    ]
    index = np.concatenate(spans)
    documents = np.cumsum(lengths[order]) - lengths[order]
    sizes = None if stream.sizes is None else stream.sizes[index]
    packed = Stream(stream.ids[index], documents, sizes, stream.said[index])
    ends = np.cumsum([lengths[row].sum() for row in rows])
    return Rows(packed, np.concatenate([[0], ends[:-1]]), ends, width)


class Loader:
    """Training batches: step -> Batch, so that a run that goes on needs the number of its step alone.

    In every epoch each row comes once, in an order of its own (grain's shuffle, which finds the row at a position
    without computing the others).

    Args:
      corpus: whose training part is read.
      seed: of the order.
      batch_size: rows per step.
      seq_len: queries per row.

    Raises:
      ValueError: for a conversation that is too long.
    """

    def __init__(self, corpus: Corpus, seed: int, batch_size: int, seq_len: int):
        self.batch_size = batch_size
        if corpus.is_chat:
            truncate = corpus.truncate
            self.rows = pack(corpus.train, seq_len, truncate=truncate, width=seq_len + 2)
        else:
            self.rows = cut(corpus.train, seq_len)
        self._seed = seed

    @functools.cached_property
    def _order(self):
        import grain  # half a second or more, and not needed to evaluate

        rows = grain.MapDataset.range(len(self.rows))
        return rows.seed(self._seed % 2**63).shuffle().repeat()

    def __call__(self, step: int, rows: slice = slice(None)) -> Batch:
        """The batch of a step (counted from 0), or only some of its rows: nothing of the others is read."""
        first = step * self.batch_size
        positions = range(first, first + self.batch_size)[rows]
        return self.rows.take(np.asarray([self._order[i] for i in positions], np.int64))
