"""``jaxmoe plot``: pictures of runs from their metrics."""

import pathlib
from typing import Annotated

import rich.console
import tyro

from jaxmoe.train.plot import plot_run, plot_runs


def plot(
    runs: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional],
    output: pathlib.Path | None = None,
) -> None:
    """Draws runs again from their metrics.jsonl: each by itself, and the curves of all of them over each other.

    Args:
      runs: Directories of runs, finished or not.
      output: Picture of the curves; default: curves.png in the first run's directory.
    """
    if not runs:
        raise ValueError(
            "runs must name at least one directory; got none. Pass what --output of `jaxmoe train` named."
        )
    console = rich.console.Console(soft_wrap=True, highlight=False)
    for run in runs:
        console.print(f"plot: {plot_run(run)}")
    curves = runs[0] / "curves.png" if output is None else output
    curves.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"curves: {plot_runs(runs, curves)}")
