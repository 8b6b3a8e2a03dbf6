"""A picture of a run: loss curves and expert load."""

import json
import os
import pathlib

import numpy as np


def read_metrics(path: str | os.PathLike[str]) -> list[dict]:
    """The records of a ``metrics.jsonl``.

    Raises:
      ValueError: if there is none, or it is empty.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"no metrics at {path}; train first.")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    if not records:
        raise ValueError(f"{path} is empty; train at least one step.")
    return records


def plot_run(
    directory: str | os.PathLike[str], target: str | os.PathLike[str] | None = None
) -> pathlib.Path:
    """Draws ``training.png`` from a run's metrics: loss, held-out bits per byte, load per layer, load per expert.

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
    records = read_metrics(directory / "metrics.jsonl")
    steps = np.asarray([r["step"] for r in records])
    has_load = "load" in records[0]
    figure, axes = plt.subplots(
        1, 3 if has_load else 1, figsize=(15 if has_load else 6, 4), squeeze=False
    )
    _plot_loss(axes[0, 0], steps, records)
    if has_load:
        _plot_balance(axes[0, 1], steps, records)
        _plot_load(axes[0, 2], figure, records)
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    kernel = np.ones(window) / window
    return np.convolve(values, kernel, mode="valid")


def _plot_loss(axis, steps: np.ndarray, records: list[dict]) -> None:
    bits = np.asarray([r["loss"] for r in records]) / np.log(2)
    window = max(1, min(25, len(bits) // 10))
    axis.plot(steps, bits, color="tab:blue", alpha=0.25, linewidth=0.8)
    axis.plot(steps[window - 1 :], _smooth(bits, window), color="tab:blue", label="training")
    held_out = [(r["step"], r["bits_per_byte"]) for r in records if "bits_per_byte" in r]
    if held_out:
        axis.plot(
            *zip(*held_out, strict=True),
            "o-",
            color="tab:orange",
            label="held out, sparse attention",
        )
    axis.set(
        xlabel="step", ylabel="bits per byte", title="loss", ylim=(0, min(8.5, bits.max() * 1.05))
    )
    axis.grid(alpha=0.3)
    axis.legend()


def _plot_balance(axis, steps: np.ndarray, records: list[dict]) -> None:
    ratio = np.asarray([r["load_max_over_mean"] for r in records])
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


def _plot_load(axis, figure, records: list[dict]) -> None:
    recent = np.asarray([r["load"] for r in records[-50:]], np.float64).mean(0)
    share = recent / recent.sum(1, keepdims=True) * recent.shape[1]
    image = axis.imshow(share, aspect="auto", vmin=0, vmax=2, cmap="RdBu_r")
    axis.set(xlabel="expert", ylabel="MoE layer", title="load / mean, last steps")
    axis.set_yticks(range(share.shape[0]), [str(i + 1) for i in range(share.shape[0])])
    figure.colorbar(image, ax=axis)
