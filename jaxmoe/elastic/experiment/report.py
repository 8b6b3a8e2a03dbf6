"""report.html, one file with everything in it, and timeline.png."""

import base64
import html
import io
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmoe.elastic.experiment.experiment import Findings, shown
from jaxmoe.elastic.experiment.metrics import PHASES
from jaxmoe.elastic.experiment.run import Run

_WINDOW_S = 0.2  # of the picture
_PROBLEMS = 20  # so many are listed one by one

# (system, pause after a loss, pause at a return, restart of everything, cost in steady state): as their authors have published
# them, on machines of their own, with GPUs and much larger models.
PUBLISHED = [
    ("EEP, 32 GPUs, DeepSeek-V3", "11 s", "8 s", "348 s", "4.4 % at most"),
    ("SGLang elastic EP, 32 GPUs, DeepSeek-V3.2", "6.2-6.8 s", "-", "2-3 min", "-"),
    ("Tarragon", "0.3-0.4 s", "-", "-", "-"),
]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.2rem }
table { border-collapse: collapse; margin: .7rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top }
th:first-child, td:first-child, td.text { text-align: left } tr.ours { font-weight: 600; background: #eef6ee }
.bad { color: #b00020; font-weight: 600 } .good { color: #1b6e20; font-weight: 600 }
img { max-width: 100%; border: 1px solid #ddd } code, pre { background: #f5f5f5; padding: .1rem .3rem }
pre { padding: .6rem; overflow-x: auto } .scroll { overflow-x: auto }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd } code, pre { background: #2a2a2a }
  th, td { border-color: #444 } tr.ours { background: #1d2f1d } .bad { color: #ff8a8a } .good { color: #8fd694 } }
"""


def write(folder: pathlib.Path, found: Findings, report: Mapping[str, Any]) -> None:
    """Writes both files.

    Args:
      folder: made if it is not there.
      found: what has been measured.
      report: the same as ``jaxmoe.report`` has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    image = timeline(found)
    if image is not None:
        (folder / "timeline.png").write_bytes(image)
    (folder / "report.html").write_text(page(found, report, image))


# -- the picture -------------------------------------------------------------------------------------


def _shown(runs: Sequence[Run]) -> Run | None:
    """The first run in which a rank is lost and returns, or the first of all."""
    for run in runs:
        if {"lost", "joined"} <= {pause.type for pause in run.pauses}:
            return run
    return runs[0] if runs else None


def timeline(found: Findings) -> bytes | None:
    """A PNG of one run's tokens per second, with what was done and what the cluster did; None without a run."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    run = _shown(found.runs)
    if run is None or not len(run.times):
        return None
    figure, axis = plt.subplots(figsize=(12, 4.5))
    _line(axis, run.times, "tab:blue", "recovery")
    if found.restarts and run.pauses:
        restart = found.restarts[0].times + run.marks[0][0]
        restart = restart[restart >= run.times[0]]
        _line(axis, restart, "tab:orange", "everything started again")
    top = axis.get_ylim()[1]
    for i, (at, text) in enumerate(run.marks):
        event = text.split()[0] in ("lost", "joined", "drained", "retried", "rebalanced")
        axis.axvline(at, color="tab:green" if event else "tab:red", linewidth=1, alpha=0.7)
        height = top * (0.98 - 0.07 * (i % 6))
        axis.text(at, height, f" {text}", fontsize=8, va="top", clip_on=True)
    axis.set(xlabel="s since the first token", ylabel=f"tokens/s, in {_WINDOW_S:g} s")
    axis.set_ylim(0, top)
    axis.set_title(f"{run.schedule} (red: done to it, green: what it did)", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    plt.close(figure)
    return buffer.getvalue()


def _line(axis, times: np.ndarray, color: str, label: str) -> None:
    edges = np.arange(0, times[-1] + _WINDOW_S, _WINDOW_S)
    heights, _ = np.histogram(times, edges)
    axis.step(edges[:-1], heights / _WINDOW_S, where="post", color=color, label=label, linewidth=1)


# -- the page ----------------------------------------------------------------------------------------


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"<td>{value:.3f}</td>"
    if value is None:
        return "<td>-</td>"
    kind = ' class="text"' if isinstance(value, str) and len(value) > 16 else ""
    return f"<td{kind}>{html.escape(str(value))}</td>"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], ours: int = -1) -> str:
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr{' class=ours' if i == ours else ''}>{''.join(map(_cell, row))}</tr>"
        for i, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def page(found: Findings, report: Mapping[str, Any], image: bytes | None) -> str:
    """The page."""
    parts = [
        _heading(found, report),
        _compared(report["ratios"]),
        _picture(image),
        _pauses(found),
        _checked(found, report["ratios"]),
        _runs(found),
        "<h2>All figures</h2>",
        _table(
            ["", "median", "least", "most", "of", "unit"],
            [
                [r["name"], r["value"], r.get("best"), r.get("worst"), r.get("rounds"), r["unit"]]
                for r in report["rows"]
            ],
        ),
        _again(report),
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>Recovery</title>'
        f"<style>{_STYLE}</style>{''.join(parts)}</html>\n"
    )


def _heading(found: Findings, report: Mapping[str, Any]) -> str:
    machine, counts = report["machine"], found.counts
    good = not found.problems
    verdict = "nothing was lost, and no token is wrong" if good else "not everything held"
    return (
        "<h1>Ranks lost and brought back</h1>"
        f"<p>{len(found.runs)} runs, {counts.completed} requests: "
        f'<span class="{"good" if good else "bad"}">{verdict}</span>.</p>'
        f"<p>{html.escape(report['date'])}, {html.escape(str(machine['cpu']))}, {machine['cores']} cores, "
        f"jax {html.escape(report['versions'].get('jax', '?'))}. "
        "All ranks and the controller are processes that share these cores.</p>"
    )


def _compared(ratios: Mapping[str, float]) -> str:
    def seconds(name: str) -> str:
        if f"{name}_s" not in ratios:
            return "-"
        worst = f" (worst {ratios[f'{name}_worst_s']:.2f})" if f"{name}_worst_s" in ratios else ""
        return f"{ratios[f'{name}_s']:.2f}{worst} s"

    steady = f"{ratios['steady_overhead']:.1%}" if "steady_overhead" in ratios else "-"
    ours = (
        "here",
        seconds("pause"),
        seconds("reintegration_pause"),
        seconds("restart_pause"),
        steady,
    )
    head = ["", "pause after a loss", "pause at a return", "full restart", "cost in steady state"]
    return (
        "<h2>Beside the others</h2>"
        + _table(head, [ours, *PUBLISHED], ours=0)
        + "<p>The other rows are their authors' published figures, on GPUs and models of their own, not measured here. Full "
        "restart and steady state here are measured in this run: the same kill with everything ended and started again from "
        "the programs on disk, and the same engine with tables and membership as constants of its programs.</p>"
    )


def _picture(image: bytes | None) -> str:
    if image is None:
        return ""
    data = base64.b64encode(image).decode()
    return f'<h2>Tokens over time</h2><img alt="tokens per second over time" src="data:image/png;base64,{data}">'


def _pauses(found: Findings) -> str:
    names = ("before", *PHASES, "refill")
    rows = []
    for run in found.runs:
        for pause in run.pauses:
            phases = [pause.phases.get(name) for name in names]
            who = ", ".join(map(str, pause.ranks))
            rows.append(
                [run.schedule.seed, pause.type, who, pause.seconds, *phases, pause.everyone_s]
            )
    for type_ in ("joined", "lost"):
        mine = [row for row in rows if row[1] == type_]
        if len(mine) > 1:
            columns = list(zip(*mine, strict=True))[3:]
            medians = [
                statistics.median(known)
                if (known := [x for x in column if x is not None])
                else None
                for column in columns
            ]
            rows.insert(0, ["median", type_, "", *medians])
    head = ["seed", "event", "ranks", "pause s", *names, "until all go on"]
    return (
        "<h2>Each pause, and what it consisted of</h2>"
        + _table(head, rows)
        + "<p>The pause is that of the whole instance: from the last token of any request before to the first one after. "
        "<i>before</i>: from that last token to the fault; <i>detect</i>: to its notice; then the controller's own phases; "
        "<i>refill</i>: from their end to the first token. <i>Until all go on</i>: from the notice until every request, those "
        "of the lost rank included, which are computed anew, has had a token.</p>"
    )


def _checked(found: Findings, ratios: Mapping[str, float]) -> str:
    counts = found.counts
    rows = [
        ["requests with exactly the tokens of an undisturbed run on one device", counts.completed],
        ["cancelled by their clients", counts.cancelled],
        ["ended with an error that says what is missing, where too many ranks were gone", counts.refused],
        ["lost", counts.lost],
        ["with repeated output", counts.duplicated],
        ["wrong tokens", counts.wrong_tokens],
        ["programs compiled by survivors", int(ratios["survivor_compiles"])],
        ["processes left over", len(found.orphans)],
    ]  # fmt: skip
    first = found.problems[:_PROBLEMS]
    if len(found.problems) > _PROBLEMS:
        first.append(f"and {len(found.problems) - _PROBLEMS} more: see the JSON report")
    problems = "".join(f'<li class="bad">{html.escape(p)}</li>' for p in first)
    return (
        "<h2>What held</h2>"
        + _table(["", "number"], rows)
        + "<p>After every run also: epochs only grew, every expert had a copy, all ranks had the same tables and weights "
        "with the right checksums, no page was held and no descriptor or thread had leaked.</p>"
        + (f"<ul>{problems}</ul>" if problems else "")
    )


def _runs(found: Findings) -> str:
    rows = [
        [
            run.schedule.seed,
            str(run.schedule),
            run.counts.completed,
            run.counts.refused,
            len(run.times),
            run.seconds,
            shown(run.problems) or "all held",
        ]
        for run in found.runs
    ]
    head = ["seed", "schedule", "requests", "refused", "tokens", "seconds", "checks"]
    return "<h2>Runs</h2>" + _table(head, rows)


def _again(report: Mapping[str, Any]) -> str:
    return (
        "<h2>Again</h2><p>All of it, on this machine or another:</p>"
        f"<pre>{html.escape(report['command'])}</pre>"
        "<p>One run of drawn faults by its seed, and the runs of a JSON report:</p>"
        "<pre>jaxmoe recover --faults random:1 --seed SEED\njaxmoe recover --faults report.json</pre>"
    )
