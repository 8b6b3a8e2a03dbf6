"""Documents from files: text as bytes, or JSON Lines with texts or conversations."""

import json
import os
import pathlib
import sysconfig
from collections.abc import Iterator
from typing import Any, NamedTuple

# Not part of the language's own library, or data in Python's clothes.
_SKIPPED = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "lib2to3", "__pycache__",
}  # fmt: skip
# Generated when Python was built: they name that machine's compiler and paths.
_BUILD_PREFIXES = ("config-", "_sysconfigdata")


class Document(NamedTuple):
    """A document and where it is from.

    Attributes:
      label: its file, or file and line, for people.
      key: what decides whether it is held out: the file's name, or the line itself, so that what comes or goes
        beside it leaves it where it is, and copies of a line are on the same side.
      content: bytes of a text, or an object with "messages".
    """

    label: str
    key: bytes
    content: bytes | dict[str, Any]


def stdlib_files() -> tuple[pathlib.Path, list[pathlib.Path]]:
    """Root and sources of Python's standard library, without what differs between machines."""
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


def visible_files(root: pathlib.Path) -> list[pathlib.Path]:
    """The files below a directory of which no part of the name is hidden."""
    files = [p for p in root.rglob("*") if p.is_file()]
    return [p for p in files if not any(n.startswith(".") for n in p.relative_to(root).parts)]


def read(path: pathlib.Path) -> bytes:
    """The bytes of a file.

    Raises:
      ValueError: if it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); change its permissions, or move it out of --data."
        ) from error


def documents_of(name: str, data: bytes) -> Iterator[Document]:
    """The documents in a file: each line of a ``.jsonl``, or all of it.

    Raises:
      ValueError: for a line that is no object with "text" or "messages"; names file and line.
    """
    if not name.endswith(".jsonl"):
        yield Document(name, os.fsencode(name), data)
        return
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            label = f"{name}, line {number}"
            yield Document(label, line.strip(), _content(label, line))


def _content(label: str, line: bytes) -> bytes | dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{label} is not JSON ({error}); mend or remove it.") from None
    if not isinstance(value, dict) or ("text" in value) == ("messages" in value):
        raise ValueError(
            f'{label} must be an object with either "text" or "messages"; got {line[:60]!r}. Rename its field.'
        )
    if "messages" in value:
        return value
    text = value["text"]
    if not isinstance(text, str):
        raise ValueError(
            f'{label}: "text" must be a string; got {str(text)[:60]}. Put its text there.'
        )
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{label} cannot be encoded as UTF-8 ({error}); remove the lone surrogate."
        ) from None
