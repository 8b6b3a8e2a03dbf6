"""Tokens that are kept from one start of a run to the next, because a tokenizer file takes its time.

A file is named by everything that its tokens depend on, so there is no stale one: the text, the tokenizer, the package that reads the
tokenizer, and the code that makes documents and streams (its files as they are at the first use; who edits them meanwhile must start
again). It appears whole, is not replaced unless it is damaged, and ends in the SHA-256 of all before it.

Format: magic, length of the header (uint64), header (JSON: each array's dtype, length and offset, and labels), arrays, digest;
the header and each array are padded to 64 bytes.
"""

import functools
import hashlib
import importlib.metadata
import json
import logging
import mmap
import os
import pathlib
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

import jaxmoe.chat
import jaxmoe.tokenizer
from jaxmoe.train.data.stream import Stream

logger = logging.getLogger(__name__)

_MAGIC = b"jaxmoe-tokens-1\n"
_ALIGNMENT = 64
_DIGEST = hashlib.sha256().digest_size
_PARTS, _ARRAYS = ("train", "validation"), ("ids", "documents", "sizes", "said")

Streams = tuple[Stream, Stream]


def _sources() -> tuple[pathlib.Path, ...]:
    """The code that turns files into tokens."""
    packages = (pathlib.Path(__file__).parent, pathlib.Path(jaxmoe.chat.__file__).parent)
    files = (path for package in packages for path in sorted(package.glob("*.py")))
    return (pathlib.Path(jaxmoe.tokenizer.__file__), *files)


@functools.lru_cache
def _code(files: tuple[pathlib.Path, ...]) -> str:
    """Digest of code."""
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


def _path_of(
    folder: str | os.PathLike[str], fingerprint: dict[str, Any], names: Iterable[str]
) -> pathlib.Path:
    """Where the tokens of a corpus are kept."""
    depends_on = {
        "corpus": {k: v for k, v in fingerprint.items() if k != "truncate"},  # rows are cut, not streams
        "names": [*names],
        "tokenizers": importlib.metadata.version("tokenizers"),
        "code": _code(_sources()),
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    return pathlib.Path(folder) / f"{key[:32]}.tokens"


def keep(
    folder: str | os.PathLike[str],
    fingerprint: dict[str, Any],
    names: Iterable[str],
    make: Callable[[], Streams],
) -> Streams:
    """The (training, held-out) streams of a corpus, memory-mapped; made and written if they are not there, or damaged.

    Args:
      folder: of kept tokens.
      fingerprint: the corpus's.
      names: of its files, which decide how they are read.
      make: makes the streams.
    """
    try:
        path = _path_of(folder, fingerprint, names)
    except OSError as error:  # of the sources
        _not_kept(folder, error)
        return make()
    found = _read(path)
    if found is not None:
        return found
    made = make()
    try:
        _write(path, made)
    except OSError as error:
        _not_kept(path, error)
        return made
    return _read(path) or made


def _not_kept(path: str | os.PathLike[str], error: OSError) -> None:
    logger.warning("tokens=%s kept=no reason=%r (made again at the next start)", path, error)


def _padding(size: int) -> bytes:
    return bytes(-size % _ALIGNMENT)


def _pieces(path: pathlib.Path, streams: Streams) -> Iterator[Any]:
    """The file's content up to its digest."""
    parts = dict(zip(_PARTS, streams, strict=True))
    arrays = {
        (part, name): np.ascontiguousarray(getattr(stream, name)).view(np.uint8)
        for part, stream in parts.items()
        for name in _ARRAYS
        if getattr(stream, name) is not None
    }
    table, offset = [], 0
    for (part, name), array in arrays.items():
        values = getattr(parts[part], name)
        table.append([part, name, values.dtype.str, values.size, offset])
        offset += array.size + len(_padding(array.size))
    labels = {part: stream.labels for part, stream in parts.items()}
    header = json.dumps({"name": path.name, "arrays": table, "labels": labels}).encode()
    start = _MAGIC + len(header).to_bytes(8, "little") + header
    yield start + _padding(len(start))
    for array in arrays.values():
        yield array
        yield _padding(array.size)


def _write(path: pathlib.Path, streams: Streams) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    # Of a name of its own: all processes of a run may write the same at once.
    ours = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.tmp")
    try:
        with ours.open("xb") as file:
            for piece in _pieces(path, streams):
                digest.update(piece)
                file.write(piece)
            file.write(digest.digest())
        try:
            os.link(ours, path)
        except OSError:  # there is one, which others may have mapped; or the disk has no links
            if _read(path) is None:
                os.replace(ours, path)
    finally:
        ours.unlink(missing_ok=True)


def _read(path: pathlib.Path) -> Streams | None:
    """What a file holds; None if it does not exist, cannot be read, or is not what was written."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        logger.warning("tokens=%s read=no reason=%r (made again)", path, error)
        return None
    content = memoryview(mapped)[:-_DIGEST]
    if hashlib.sha256(content).digest() != mapped[-_DIGEST:] or mapped[: len(_MAGIC)] != _MAGIC:
        logger.warning("tokens=%s damaged=yes (made again)", path)
        return None
    begin = len(_MAGIC) + 8
    end = begin + int.from_bytes(mapped[begin - 8 : begin], "little")
    header = json.loads(mapped[begin:end])
    if header["name"] != path.name:
        logger.warning("tokens=%s holds=%s (made again)", path, header["name"])
        return None
    first = end + len(_padding(end))
    arrays: dict[str, dict[str, np.ndarray]] = {part: {} for part in _PARTS}
    for part, name, dtype, size, offset in header["arrays"]:
        arrays[part][name] = np.frombuffer(mapped, dtype, size, first + offset)
    labels = {part: given and tuple(given) for part, given in header["labels"].items()}
    train, validation = (
        Stream(**{"sizes": None} | arrays[part], labels=labels[part]) for part in _PARTS
    )
    return train, validation
