"""Runs side by side: tables, rows of a report, plots. Every saving is computed from the models that ran, none is quoted."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fed.clients import LocalOptions
from fed.costs import Cost, measure, savings
from fed.history import History
from fed.models import Model

_FIGURES = {
    "large_accuracy": "share",
    "small_accuracy": "share",
    "own_accuracy": "share",
    "own_worst": "share",
}


def pair_savings(large: Model, small: Sequence[Model], local: LocalOptions) -> dict[str, float]:
    """What a client saves by training ``small`` (the mean over architectures) instead of ``large``: storage, flops, peak_memory."""
    costs = [measure(model, local) for model in small]
    count = len(costs)
    mean = Cost(
        round(sum(c.storage_bytes for c in costs) / count),
        sum(c.step_flops for c in costs) / count,
        round(sum(c.peak_bytes for c in costs) / count),
    )
    return savings(mean, measure(large, local))


def summary(history: History, target: float | None = None) -> dict[str, Any]:
    """A run in a few figures.

    Args:
      history: of the run.
      target: accuracy for ``rounds_to``: of the large model, or of small ones where there is no large.
    """
    clients = history.costs["clients"]
    found: dict[str, Any] = {
        name: history.final[name] for name in _FIGURES if name in history.final
    }
    found |= {
        "bytes_up": history.total("bytes_up"),
        "bytes_down": history.total("bytes_down"),
        "client_flops": history.total("client_flops"),
        "client_storage_bytes": float(np.mean([c["storage_bytes"] for c in clients])),
        "client_peak_bytes": float(np.max([c["peak_bytes"] for c in clients])),
        "seconds_per_round": float(np.median(history.series("seconds"))),
        "simulated_seconds": history.total("simulated_seconds"),
        "skipped": int(history.series("skipped").sum()),
        "rejected": sorted({k for r in history.rounds for k in r["rejected"]}),
    }
    if target is not None:
        metric = "large_accuracy" if "large_accuracy" in history.final else "small_accuracy"
        found["rounds_to_target"] = history.rounds_to(target, metric)
    return found


_UNITS = _FIGURES | {
    "bytes_up": "B",
    "bytes_down": "B",
    "client_flops": "FLOP",
    "client_storage_bytes": "B",
    "client_peak_bytes": "B",
    "seconds_per_round": "s",
    "simulated_seconds": "s",
    "skipped": "rounds",
}


def report_rows(
    runs: Mapping[str, Sequence[History]], target: float | None = None
) -> list[dict[str, Any]]:
    """Rows of a report: each figure of each method, mean and standard deviation over its runs (seeds)."""
    rows: list[dict[str, Any]] = []
    for name, histories in runs.items():
        figures = [summary(h, target) for h in histories]
        for figure, unit in _UNITS.items():
            values = [f[figure] for f in figures if figure in f]
            if values:
                rows.append(
                    {
                        "name": f"{name}, {figure}",
                        "value": float(np.mean(values)),
                        "unit": unit,
                        "deviation": float(np.std(values)),
                        "values": [float(v) for v in values],
                    }
                )
        if target is not None:
            reached = [f["rounds_to_target"] for f in figures]
            hit = [r for r in reached if r is not None]
            rows.append(
                {
                    "name": f"{name}, rounds to {target:g}",
                    "value": float(np.mean(hit)) if hit else None,
                    "unit": "rounds",
                    "values": reached,
                }
            )
    return rows


def table(runs: Mapping[str, Sequence[History]], title: str) -> Any:
    """A rich table of the methods, means over seeds, deviations where there are several."""
    import rich.box
    import rich.table

    out = rich.table.Table(
        title=title, box=rich.box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    for column in (
        "method",
        "large",
        "small",
        "own mix",
        "worst 10%",
        "MB up",
        "MB down",
        "GFLOP",
        "peak MB",
    ):
        out.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for name, histories in runs.items():
        figures = [summary(h) for h in histories]
        cells = [_cell([f.get(k) for f in figures]) for k in _FIGURES]
        for key, scale in (
            ("bytes_up", 1e6),
            ("bytes_down", 1e6),
            ("client_flops", 1e9),
            ("client_peak_bytes", 1e6),
        ):
            cells.append(f"{np.mean([f[key] for f in figures]) / scale:.3g}")
        out.add_row(name, *cells)
    return out


def _cell(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "-"
    mean = f"{100 * np.mean(known):.1f}"
    return mean if len(known) < 2 else f"{mean} ±{100 * np.std(known):.1f}"


def plot(runs: Mapping[str, Sequence[History]], target: str | pathlib.Path) -> pathlib.Path:
    """Draws accuracy over rounds and over bytes sent, a curve per method (mean over seeds)."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    path = pathlib.Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), sharey=True)
    for name, histories in runs.items():
        for axis, metric in ((axes[0], "large_accuracy"), (axes[1], "small_accuracy")):
            curve = np.mean([h.series(metric) for h in histories], axis=0)
            seen = np.isfinite(curve)
            if seen.any():
                axis.plot(np.flatnonzero(seen) + 1, curve[seen], "o-", markersize=3, label=name)
        metric = "large_accuracy" if "large_accuracy" in histories[0].final else "small_accuracy"
        curve = np.mean([h.series(metric) for h in histories], axis=0)
        sent = np.cumsum(
            np.mean([h.series("bytes_up") + h.series("bytes_down") for h in histories], axis=0)
        )
        seen = np.isfinite(curve)
        if sent[-1] > 0:
            axes[2].plot(sent[seen] / 1e6, curve[seen], "o-", markersize=3, label=name)
    axes[0].set(xlabel="round", ylabel="test accuracy", title="the server's large model")
    axes[1].set(xlabel="round", title="the clients' models, mean")
    axes[2].set(xlabel="MB sent, all clients", title="best model over traffic", xscale="log")
    axes[1].legend(fontsize="small")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
