"""Held-out rows and what to compare with."""

import gzip

import numpy as np

from jaxmoe.tokenizer import ByteTokenizer
from jaxmoe.train.data.batch import Batch
from jaxmoe.train.data.corpus import Corpus
from jaxmoe.train.data.rows import Rows, pack


def _limited(sizes: np.ndarray, max_bytes: int) -> int:
    """How many tokens hold ``max_bytes`` bytes of text, or all."""
    return min(int(np.searchsorted(np.cumsum(sizes, dtype=np.int64), max_bytes)) + 1, sizes.size)


def _windows(corpus: Corpus, max_bytes: int, length: int) -> tuple[Rows, np.ndarray]:
    """Rows of texts, and the index in each from which on targets count."""
    stream = corpus.validation
    size = _limited(stream.sizes, max_bytes)
    stride = max(1, length // 2)
    begins = np.arange(0, max(size - 1 - (length - stride), 1), stride)
    first = np.where(begins == 0, 1, length - stride + 1)
    return Rows(stream, begins, np.minimum(begins + length + 1, size), length + 1), first


def evaluation_rows(
    corpus: Corpus, max_bytes: int, length: int, probe_bytes: int | None = None
) -> tuple[Batch, int]:
    """Rows over the first ``max_bytes`` bytes of held-out text, and how many bytes of text their targets are.

    Windows over texts overlap by half and only their second half counts (the first window counts whole), so that every target has
    half a window of context or its document's beginning, and each counts once. Conversations are packed as in training.
    With ``probe_bytes``, evenly spread rows that score about so many of them.

    Returns:
      (batch of width length + 1, bytes). Weights are 1 for what counts, also for tokens that end a document, which have no
      bytes: the model must say where a document ends.
    """
    if corpus.is_chat:
        rows = pack(corpus.validation, length, truncate=corpus.truncate, width=length + 1)
        first = np.ones(len(rows), np.int64)
        within = rows.begins <= rows.begins[0] + _limited(rows.stream.sizes, max_bytes) - 1
        chosen = np.flatnonzero(within)
    else:
        rows, first = _windows(corpus, max_bytes, length)
        chosen = np.arange(len(rows))
    batch = rows.take(chosen)
    index = np.arange(length + 1)[None]
    # A document's first token is no target: nothing comes before it.
    counts = (batch.weights > 0) & (index >= first[chosen, None]) & (batch.starts < index)
    sizes = np.where(counts, rows.sizes(chosen), 0)
    if probe_bytes is not None:
        count = min(len(chosen), max(1, round(probe_bytes * len(chosen) / max(sizes.sum(), 1))))
        some = np.linspace(0, len(chosen) - 1, count).round().astype(np.int64)
        batch, counts, sizes = Batch(*(x[some] for x in batch)), counts[some], sizes[some]
    return batch._replace(weights=counts.astype(np.float32)), int(sizes.sum())


def gzip_bits_per_byte(corpus: Corpus, max_bytes: int) -> float:
    """Bits per byte of gzip -9 over the same held-out text that an evaluation scores, as one stream.

    One stream is the stronger baseline: gzip may reuse what it saw in earlier documents.
    """
    stream = corpus.validation
    ids = stream.ids[: _limited(stream.sizes, max_bytes)]
    if isinstance(corpus.tokenizer, ByteTokenizer):
        data = ids[ids < 256].astype(np.uint8).tobytes()
    else:
        data = corpus.tokenizer.decode(ids.tolist()).encode()
    return 8 * len(gzip.compress(data, 9)) / len(data)
