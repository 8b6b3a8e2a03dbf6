"""``jaxmoe bench``: runs a bench of the source checkout by name."""

import importlib.util
import pathlib
import runpy
import sys
from typing import Annotated

import tyro


def _names() -> list[str]:
    """Benches that can be run; none outside a checkout."""
    try:
        ours = importlib.util.find_spec("bench._harness")
    except ModuleNotFoundError:
        ours = None
    if ours is None or ours.origin is None:
        return []
    files = pathlib.Path(ours.origin).parent.glob("[!_]*.py")
    return sorted(file.stem for file in files)


def bench(
    name: Annotated[str, tyro.conf.Positional],
    arguments: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
) -> None:
    """Runs a bench of the source checkout: `jaxmoe bench serve --help` shows its options.

    Args:
      name: serve, engine, decode, prefill or moe_layer, for example.
      arguments: Of that bench.
    """
    names = _names()
    if not names:
        raise ValueError(
            "bench needs a source checkout, which this installation is not; "
            "clone the repository and run pip install -e '.[dev]' in it."
        )
    if name not in names:
        raise ValueError(f"bench must be one of {', '.join(names)}; got {name!r}.")
    before, sys.argv = sys.argv, [name, *arguments]
    try:
        runpy.run_module(f"bench.{name}", run_name="__main__", alter_sys=True)
    finally:
        sys.argv = before
