"""Integrity of a checkpoint directory: a checksummed list of its files, sizes and CRC-32s.

CRC-32 because zlib computes it at memory speed wherever Python runs (SHA-256 is 3x slower) and
because it finds every single flipped bit and every burst of up to 32; it guards against accidents,
not against forgery.
"""

import concurrent.futures
import os
import pathlib
import zlib
from typing import NamedTuple

from jaxmoe.checkpoint._layout import summarise
from jaxmoe.errors import CheckpointCorrupt, CheckpointMismatch

NAME = "MANIFEST"
_HEADER = "jaxmoe-checkpoint-manifest"
_VERSION = 1
_CHUNK_BYTES = 4 << 20


class Entry(NamedTuple):
    """What a file was when it was written."""

    size: int
    crc32: int


Manifest = dict[str, Entry]


def _checksum(path: pathlib.Path) -> Entry:
    size = crc = 0
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            crc = zlib.crc32(buffer[:count], crc)
            size += count
    return Entry(size, crc)


def _threads() -> concurrent.futures.ThreadPoolExecutor:
    # zlib and file reads release the GIL.
    return concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1), "jaxmoe-checksum")


def fsync(path: pathlib.Path) -> None:
    """Makes a file's contents, or a directory's entries, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(directory: pathlib.Path) -> None:
    """Lists every file below ``directory`` in its MANIFEST and flushes that to disk."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p != directory / NAME)
    with _threads() as pool:
        entries = list(pool.map(_checksum, files))
    lines = [f"{_HEADER} {_VERSION}"]
    for path, entry in zip(files, entries, strict=True):
        lines.append(f"{entry.crc32:08x} {entry.size} {path.relative_to(directory).as_posix()}")
    body = "".join(line + "\n" for line in lines).encode()
    (directory / NAME).write_bytes(body + f"{zlib.crc32(body):08x} end\n".encode())
    fsync(directory / NAME)
    fsync(directory)


def read(directory: pathlib.Path) -> Manifest:
    """The manifest of a step directory.

    Raises:
      CheckpointCorrupt: it is missing or damaged.
      CheckpointMismatch: a newer version wrote it.
    """
    path = directory / NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointCorrupt(
            f"{path}: cannot be read ({error.strerror}); restore another step."
        ) from error
    body, last = data[:-13], data[-13:]  # "%08x end\n" has 13 bytes
    if last != f"{zlib.crc32(body):08x} end\n".encode():
        raise CheckpointCorrupt(f"{path}: does not match its own checksum; restore another step.")
    header, *lines = body.decode().splitlines()
    if header != f"{_HEADER} {_VERSION}":
        raise CheckpointMismatch(
            f"{path}: format {header!r}, this jaxmoe reads version {_VERSION}; upgrade jaxmoe."
        )
    manifest = {}
    for line in lines:
        crc, size, name = line.split(" ", 2)
        manifest[name] = Entry(int(size), int(crc, 16))
    return manifest


def _problem(path: pathlib.Path, expected: Entry, contents: bool) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected.size:
            return f"{path}: has {size} bytes, expected {expected.size}"
        if contents and _checksum(path) != expected:
            return f"{path}: contents do not match the checksum"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    return None


def verify(directory: pathlib.Path, manifest: Manifest, *, contents: bool = True) -> None:
    """Checks that every listed file is there with its size and, if ``contents``, its checksum.

    Raises:
      CheckpointCorrupt: naming all damaged files.
    """
    with _threads() as pool:
        found = pool.map(
            lambda item: _problem(directory / item[0], item[1], contents), manifest.items()
        )
        problems = [problem for problem in found if problem]
    if problems:
        raise CheckpointCorrupt(
            summarise(f"{directory} is damaged; restore another step", problems)
        )


def read_file(
    directory: pathlib.Path, manifest: Manifest, name: str, *, contents: bool = True
) -> bytes:
    """Reads one listed file, checked as it is read: each byte leaves the disk once.

    Raises:
      CheckpointCorrupt: it is missing, unlisted or damaged.
    """
    path = directory / name
    if name not in manifest:
        raise CheckpointCorrupt(f"{path}: not listed in {NAME}; restore another step.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointCorrupt(
            f"{path}: cannot be read ({error.strerror}); restore another step."
        ) from error
    if len(data) != manifest[name].size:
        raise CheckpointCorrupt(
            f"{path}: has {len(data)} bytes, expected {manifest[name].size}; restore another step."
        )
    if contents and zlib.crc32(data) != manifest[name].crc32:
        raise CheckpointCorrupt(
            f"{path}: contents do not match the checksum; restore another step."
        )
    return data
