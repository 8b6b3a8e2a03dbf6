"""Step directories: which exist, and how one appears, is replaced and goes, each by a rename."""

import operator
import os
import pathlib
import re
import shutil
from typing import Any

from jaxmoe.checkpoint import _manifest

_TEMPORARY = ".tmp-"
_REPLACED = ".replaced-"
_DIRECTORY = re.compile(rf"(?:{re.escape(_REPLACED)})?(\d+)")


def check_step(step: Any) -> int:
    """``step`` as a non-negative int."""
    try:
        number = operator.index(step)
    except TypeError as error:
        raise TypeError(f"step must be an integer; got {step!r}.") from error
    if number < 0:
        raise ValueError(f"step must be >= 0; got {number}.")
    return number


def steps(root: pathlib.Path) -> list[int]:
    """Steps saved below ``root``, ascending; unfinished saves do not count."""
    if not root.is_dir():
        return []
    return sorted(
        {int(m[1]) for p in root.iterdir() if (m := _DIRECTORY.fullmatch(p.name)) and p.is_dir()}
    )


def find(root: pathlib.Path, step: int | None) -> tuple[int, pathlib.Path]:
    """(step, its directory); the latest if ``step`` is None.

    Raises:
      ValueError: no such step, with those there are.
    """
    known = steps(root)
    if step is None and known:
        step = known[-1]
    if step is None or check_step(step) not in known:
        what = "no checkpoint" if step is None else f"no step {step}"
        raise ValueError(
            f"{what} in {root}; it has steps {known}. Check the directory, or save first."
        )
    step = check_step(step)
    path = root / str(step)
    # A save that replaced this step was killed between its two renames: the old one is still whole.
    return step, path if path.is_dir() else root / f"{_REPLACED}{step}"


def temporary(root: pathlib.Path, step: int) -> pathlib.Path:
    """Where a step is written before it appears. The same on every process."""
    return root / f"{_TEMPORARY}{step}"


def sweep(root: pathlib.Path) -> None:
    """Removes what killed saves left behind. One writer per ``root`` at a time is assumed."""
    for path in root.iterdir():
        if path.name.startswith(_TEMPORARY):
            shutil.rmtree(path)
        elif path.name.startswith(_REPLACED):
            final = root / path.name.removeprefix(_REPLACED)
            if final.is_dir():
                shutil.rmtree(path)
            else:
                path.rename(final)


def commit(root: pathlib.Path, step: int) -> None:
    """Makes a complete temporary directory the step, replacing an older one of that number."""
    final, replaced = root / str(step), root / f"{_REPLACED}{step}"
    if final.exists():
        final.rename(replaced)
    os.rename(temporary(root, step), final)
    _manifest.fsync(root)
    shutil.rmtree(replaced, ignore_errors=True)


def drop_all_but(root: pathlib.Path, keep: int, saved: int) -> None:
    """Removes the oldest steps, never ``saved``; each is renamed away first, so goes at once."""
    for step in set(steps(root)[:-keep]) - {saved}:
        doomed = temporary(root, step)
        (root / str(step)).rename(doomed)
        shutil.rmtree(doomed)
