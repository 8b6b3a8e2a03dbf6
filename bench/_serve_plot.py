"""The picture of a run of ``bench.serve``."""

import pathlib

import numpy as np

from bench._load import Record, Run


def plot(run: Run, path: pathlib.Path, slo_ttft: float, slo_tpot: float) -> None:
    """Draws output over time, requests in flight, latency over arrival, and latency distributions."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    ok = sorted((r for r in run.records if r.outcome == "ok"), key=lambda r: r.began)
    figure, axes = plt.subplots(2, 2, figsize=(12, 7))
    _throughput(axes[0, 0], run, ok)
    _in_flight(axes[0, 1], run)
    _over_time(axes[1, 0], run, ok, slo_ttft)
    _distributions(axes[1, 1], ok, slo_ttft, slo_tpot)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _throughput(axis, run: Run, ok: list[Record]) -> None:
    times, tokens = [], []
    for record in ok:
        # Text that came together shares the request's tokens by its weight.
        total = sum(weight for _, weight in record.chunks) or 1
        times += [t - run.began for t, _ in record.chunks]
        tokens += [record.tokens * weight / total for _, weight in record.chunks]
    seconds = run.ended - run.began
    bins = int(np.clip(seconds / 0.25, 1, 100))
    heights, edges = np.histogram(times, bins, (0, seconds), weights=np.asarray(tokens))
    width = seconds / bins
    axis.step(edges[:-1], heights / width, where="post", color="tab:blue")
    axis.set(xlabel="s", ylabel="tokens/s", title="output", ylim=(0, None))


def _in_flight(axis, run: Run) -> None:
    changes = sorted([(r.began, 1) for r in run.records] + [(r.ended, -1) for r in run.records])
    times = [t - run.began for t, _ in changes]
    axis.step(times, np.cumsum([change for _, change in changes]), where="post", color="tab:blue")
    refused = [r.began - run.began for r in run.records if r.outcome != "ok"]
    if refused:
        axis.plot(refused, np.zeros(len(refused)), "x", color="tab:red", label="refused or failed")
        axis.legend()
    axis.set(xlabel="s", ylabel="requests", title="in flight", ylim=(0, None))


def _over_time(axis, run: Run, ok: list[Record], slo_ttft: float) -> None:
    arrivals = [r.began - run.began for r in ok]
    axis.plot(arrivals, [r.ttft_s for r in ok], ".", color="tab:orange", label="first token")
    axis.plot(arrivals, [r.total_s for r in ok], ".", color="tab:blue", label="end")
    axis.axhline(slo_ttft, color="tab:orange", linestyle=":", label="limit of the first token")
    axis.set(xlabel="sent at, s", ylabel="s", title="latency", ylim=(0, None))
    axis.legend()


def _distributions(axis, ok: list[Record], slo_ttft: float, slo_tpot: float) -> None:
    kinds = {
        "first token": ([r.ttft_s for r in ok], "tab:orange"),
        "per further token": ([r.tpot_s for r in ok if r.tpot_s is not None], "tab:green"),
        "end": ([r.total_s for r in ok], "tab:blue"),
    }
    for name, (values, color) in kinds.items():
        if values:
            axis.plot(
                np.sort(values),
                np.arange(1, len(values) + 1) / len(values),
                color=color,
                label=name,
            )
    for limit, color in ((slo_ttft, "tab:orange"), (slo_tpot, "tab:green")):
        axis.axvline(limit, color=color, linestyle=":")
    axis.set(xlabel="s (dotted: limits)", ylabel="share of requests", title="latency", xscale="log")
    axis.legend()
