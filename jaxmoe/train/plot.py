"""Pictures of runs: loss curves and expert load of one, curves of several."""

import json
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from jaxmoe.train.dsa import stages_of


def read_metrics(path: str | os.PathLike[str]) -> list[dict]:
    """The records of a ``metrics.jsonl``.

    A line that is still being written, without its end, is no record yet.

    Raises:
      ValueError: if there is none, it is empty, or a line is damaged.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"no metrics at {path}; train first.")
    lines = path.read_text().split("\n")[:-1]
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number} is not JSON ({error}); resume the run, which mends it."
            ) from None
    if not records:
        raise ValueError(f"{path} is empty; train at least one step.")
    return records


def plot_run(
    directory: str | os.PathLike[str], target: str | os.PathLike[str] | None = None
) -> pathlib.Path:
    """Draws ``training.png`` from a run's metrics: loss, held-out bits per byte, indexer recall, load per layer, load per expert.

    A run that started from another's parameters (``--init-from``) follows it on one axis of steps.

    Args:
      directory: of the run.
      target: where to write; default ``directory/training.png``.

    Returns:
      The picture's path.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    directory = pathlib.Path(directory)
    target = pathlib.Path(target) if target is not None else directory / "training.png"
    stages = [read_metrics(stage / "metrics.jsonl") for stage in stages_of(directory)]
    ends = np.cumsum([0, *(records[-1]["step"] for records in stages)])
    records = [
        r | {"step": r["step"] + int(before)}
        for stage, before in zip(stages, ends, strict=False)
        for r in stage
    ]
    steps = np.asarray([r["step"] for r in records])
    panels = [_plot_loss]
    if any("index_recall_layers" in r for r in records):
        panels.append(_plot_recall)
    if "load" in records[0]:
        panels += [_plot_balance, _plot_load]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5 * len(panels) + (len(panels) == 1), 4), squeeze=False
    )
    for axis, draw in zip(axes.flat, panels, strict=True):
        draw(axis, steps, records)
        if draw is not _plot_load:
            for end in ends[1:-1]:
                axis.axvline(end, color="black", linewidth=0.8, linestyle="--")
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    kernel = np.ones(window) / window
    return np.convolve(values, kernel, mode="valid")


def _table(rows: list[list[float]]) -> np.ndarray:
    """[rows, layers], NaN where a stage had fewer layers than another."""
    table = np.full((len(rows), max(map(len, rows))), np.nan)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return table


def _plot_loss(axis, steps: np.ndarray, records: list[dict]) -> None:
    # In a skipped step the loss may be missing.
    bits = np.asarray([r["loss"] for r in records], np.float64) / np.log(2)
    window = max(1, min(25, len(bits) // 10))
    axis.plot(steps, bits, color="tab:blue", alpha=0.25, linewidth=0.8)
    axis.plot(steps[window - 1 :], _smooth(bits, window), color="tab:blue", label="training")
    held_out = [
        (r["step"], r["held_out_loss"] / np.log(2)) for r in records if "held_out_loss" in r
    ]
    if held_out:
        axis.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="held out")
    top = np.nanmax(bits) * 1.05 if np.isfinite(bits).any() else 1.0
    axis.set(xlabel="step", ylabel="bits per token", title="loss", ylim=(0, top))
    axis.grid(alpha=0.3)
    axis.legend()


def _plot_recall(axis, steps: np.ndarray, records: list[dict]) -> None:
    points = [(r["step"], r["index_recall_layers"]) for r in records if "index_recall_layers" in r]
    for layer, values in enumerate(_table([layers for _, layers in points]).T):
        axis.plot(
            [step for step, _ in points], values, "o-", markersize=3, label=f"indexer {layer + 1}"
        )
    axis.set(
        xlabel="step", ylabel="share of dense attention", title="indexer recall", ylim=(0, 1.02)
    )
    axis.set_xlim(0, steps[-1])
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def _plot_balance(axis, steps: np.ndarray, records: list[dict]) -> None:
    ratio = _table([r["load_max_over_mean"] for r in records])
    window = max(1, min(25, len(ratio) // 10))
    for layer in range(ratio.shape[1]):
        axis.plot(
            steps[window - 1 :], _smooth(ratio[:, layer], window), label=f"MoE layer {layer + 1}"
        )
    axis.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    axis.set(xlabel="step", ylabel="busiest expert / mean", title="expert balance")
    axis.grid(alpha=0.3)
    if ratio.shape[1] <= 10:
        axis.legend()


def _plot_load(axis, steps: np.ndarray, records: list[dict]) -> None:
    del steps
    last = np.shape(records[-1]["load"])
    recent = [r["load"] for r in records[-50:] if np.shape(r["load"]) == last]
    recent = np.asarray(recent, np.float64).mean(0)
    share = recent / recent.sum(1, keepdims=True) * recent.shape[1]
    image = axis.imshow(share, aspect="auto", vmin=0, vmax=2, cmap="RdBu_r")
    axis.set(xlabel="expert", ylabel="MoE layer", title="load / mean, last steps")
    axis.set_yticks(range(share.shape[0]), [str(i + 1) for i in range(share.shape[0])])
    axis.figure.colorbar(image, ax=axis)


# -- several runs ------------------------------------------------------------------------------------


def _mean_of(name: str) -> Callable[[dict], float | None]:
    """A field of a record, of a list the mean; None where it is missing."""

    def value(record: dict) -> float | None:
        found = record.get(name)
        return None if found is None else float(np.mean(found))

    return value


# Title, label, value, and whether it is smoothed.
_CURVES: tuple[tuple[str, str, str, bool], ...] = (
    ("training loss", "nats per token", "loss", True),
    ("held out", "bits per byte", "bits_per_byte", False),
    ("expert balance, mean of layers", "busiest expert / mean", "load_max_over_mean", True),
    ("indexer recall, mean of layers", "share of attention mass", "index_recall", False),
    ("learning rate", "", "learning_rate", False),
    ("speed", "tokens/s", "tokens_per_s", True),
)


def plot_runs(
    directories: Sequence[str | os.PathLike[str]], target: str | os.PathLike[str]
) -> pathlib.Path:
    """Draws the curves of several runs over each other: what any of their metrics has of ``_CURVES``.

    Args:
      directories: of the runs.
      target: where to write.

    Returns:
      The picture's path.

    Raises:
      ValueError: for a directory without metrics.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    runs = {str(d): read_metrics(pathlib.Path(d) / "metrics.jsonl") for d in directories}
    shown = [c for c in _CURVES if any(c[2] in r for records in runs.values() for r in records)]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.5 * rows), squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, (title, label, name, smooth) in zip(axes.flat, shown, strict=False):
        for run, records in runs.items():
            _plot_curve(axis, run, records, _mean_of(name), smooth=smooth)
        axis.set(xlabel="step", ylabel=label, title=title)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize="small")
    figure.tight_layout()
    target = pathlib.Path(target)
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target


def _plot_curve(axis, run: str, records: list[dict], value: Callable, *, smooth: bool) -> None:
    points = [(r["step"], v) for r in records if (v := value(r)) is not None]
    steps, values = np.asarray(points, np.float64).reshape(-1, 2).T
    window = max(1, min(25, len(values) // 10)) if smooth else 1
    style = "o-" if 0 < len(values) < len(records) else "-"
    smoothed = _smooth(values, window) if len(values) else values
    axis.plot(steps[window - 1 :], smoothed, style, markersize=3, label=run)
