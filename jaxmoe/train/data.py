"""Byte-level corpora with deterministic batches.

A batch is a pure function of (seed, step): resuming needs the step number and nothing else.
"""

import dataclasses
import gzip
import hashlib
import os
import pathlib
import sysconfig
import zlib

import numpy as np

from jaxmoe.tokenizer import EOS

VALIDATION_SHARE = 20  # one file (or, in a single file, one byte) in so many is held out
# Not part of the language's own library, or data in Python's clothes.
_SKIPPED = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "lib2to3", "__pycache__",
}  # fmt: skip
# Generated when Python was built: they name that machine's compiler and paths.
_BUILD_PREFIXES = ("config-", "_sysconfigdata")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token streams: bytes, each document followed by the end-of-document token.

    Attributes:
      train: uint16 [N].
      validation: uint16 [M], from files (or a part of the file) that ``train`` does not contain.
      fingerprint: what it was made of, to recognise it again: files, bytes, SHA-256.
      name: for people.
    """

    train: np.ndarray
    validation: np.ndarray
    fingerprint: dict[str, int | str]
    name: str

    def __repr__(self) -> str:
        return f"Corpus({self.name}: {self.train.size:,} training and {self.validation.size:,} held-out tokens)"


def _stdlib_files() -> tuple[pathlib.Path, list[pathlib.Path]]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    parts = {p: p.relative_to(root).parts for p in root.rglob("*.py")}
    files = [
        p
        for p, names in parts.items()
        if not _SKIPPED & set(names) and not any(n.startswith(_BUILD_PREFIXES) for n in names)
    ]
    if not files:
        raise ValueError(
            f"no Python sources in {root}; pass --data with a file or directory of your own text."
        )
    return root, files


def _visible_files(root: pathlib.Path) -> list[pathlib.Path]:
    files = [p for p in root.rglob("*") if p.is_file()]
    return [p for p in files if not any(n.startswith(".") for n in p.relative_to(root).parts)]


def _read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); change its permissions, or move it out of --data."
        ) from error


def _tokens(documents: list[bytes]) -> np.ndarray:
    end = np.asarray([EOS], np.uint16)
    return np.concatenate(
        [part for d in documents for part in (np.frombuffer(d, np.uint8).astype(np.uint16), end)]
    )


def _split(contents: dict[str, bytes]) -> tuple[list[bytes], list[bytes]]:
    """(training documents, held-out documents)."""
    if len(contents) == 1:
        (data,) = contents.values()
        cut = len(data) - len(data) // VALIDATION_SHARE
        return [data[:cut]], [data[cut:]]
    # A hash of the name alone: files that come or go leave the others where they are.
    crc = {name: zlib.crc32(name.encode(errors="surrogateescape")) for name in contents}
    held_out = {name for name in contents if crc[name] % VALIDATION_SHARE == 0}
    held_out = held_out or set(list(contents)[-1:])
    if len(held_out) == len(contents):
        held_out = set(sorted(held_out)[1:])
    return (
        [data for name, data in contents.items() if name not in held_out],
        [data for name, data in contents.items() if name in held_out],
    )


def load_corpus(path: str | os.PathLike[str] | None = None) -> Corpus:
    """The user's text, or by default the sources of Python's standard library.

    A directory (hidden files are left out) is split by file: a file is held out if the CRC-32 of its relative path is divisible by 20 (if
    that picks none, the last file is). An only file's last twentieth is held out. Any bytes will do.

    Args:
      path: a file, a directory (all files below it), or None.

    Raises:
      ValueError: if there is no such path or too little text.
    """
    if path is None:
        root, files = _stdlib_files()
        name = "Python standard library"
    else:
        root = pathlib.Path(path)
        name = root.name
        if not root.exists():
            raise ValueError(f"--data {root} does not exist; pass a file or a directory of text.")
        files = [root] if root.is_file() else _visible_files(root)
    named = sorted((p.relative_to(root).as_posix(), p) for p in files)
    contents = {relative: _read(p) for relative, p in named}
    contents = {relative: data for relative, data in contents.items() if data}
    digest = hashlib.sha256()
    for relative, data in contents.items():
        digest.update(f"{relative}\0{len(data)}\0".encode(errors="surrogateescape") + data)
    total = sum(map(len, contents.values()))
    parts = _split(contents)
    if not total or not any(parts[0]) or not any(parts[1]):
        raise ValueError(
            f"{name} holds {total} bytes in {len(files)} files, too little to split; pass at least two files, or one of 20 bytes."
        )
    fingerprint = {"files": len(files), "bytes": total, "sha256": digest.hexdigest()}
    return Corpus(_tokens(parts[0]), _tokens(parts[1]), fingerprint, name)


def batch(corpus: Corpus, seed: int, step: int, batch_size: int, length: int) -> np.ndarray:
    """Random training windows, int32 [batch_size, length], the same for the same (seed, step).

    Raises:
      ValueError: if the corpus is shorter than one window.
    """
    last = corpus.train.size - length
    if last < 0:
        raise ValueError(
            f"the corpus has {corpus.train.size} training tokens, fewer than one window of {length}; shorten seq_len."
        )
    # The step is part of the key: as the counter it would give neighbouring steps overlapping streams. Raw words,
    # because Generator's methods may change between NumPy versions.
    words = np.random.Philox(key=[seed, step]).random_raw(batch_size)
    starts = (words % np.uint64(last + 1)).astype(np.int64)
    return corpus.train[starts[:, None] + np.arange(length)].astype(np.int32)


def evaluation_windows(
    corpus: Corpus, max_bytes: int, length: int, probe_bytes: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Windows over the first ``max_bytes`` held-out tokens, and which of their targets count.

    Windows overlap by half and only their second half counts (the first window counts whole), so that every
    scored byte has at least half a window of context, and each counts once. With ``probe_bytes``, evenly spread
    windows that score about so many of them.

    Returns:
      tokens int32 [N, length + 1] and mask bool [N, length] over the targets ``tokens[:, 1:]``.
    """
    stream = corpus.validation[: max_bytes + 1].astype(np.int32)
    stride = max(1, length // 2)
    starts = np.arange(0, max(stream.size - 1 - (length - stride), 1), stride)
    padded = np.pad(stream, (0, length + 1))
    windows = padded[starts[:, None] + np.arange(length + 1)]
    position = starts[:, None] + 1 + np.arange(length)
    first_new = np.where(starts == 0, 0, length - stride)
    mask = (position < stream.size) & (np.arange(length) >= first_new[:, None])
    if probe_bytes is not None:
        count = min(len(starts), max(1, probe_bytes // stride))
        chosen = np.linspace(0, len(starts) - 1, count).round().astype(np.int64)
        windows, mask = windows[chosen], mask[chosen]
    return windows, mask


def gzip_bits_per_byte(corpus: Corpus, max_bytes: int) -> float:
    """Bits per byte of gzip -9 over the same held-out bytes that an evaluation scores, as one stream.

    One stream is the stronger baseline: gzip may reuse what it saw in earlier files.
    """
    stream = corpus.validation[: max_bytes + 1]
    data = stream[stream < 256].astype(np.uint8).tobytes()
    return 8 * len(gzip.compress(data, 9)) / len(data)
