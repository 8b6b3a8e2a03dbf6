"""``jaxmoe fed deploy``: an experiment on Flower, as real processes, compared with its simulation."""

import dataclasses
import pathlib
import sys
import time
from typing import Annotated, Any

import numpy as np
import rich.console
import tyro

from fed.deployment import Deployed, DeployOptions, Kill, deploy, killed_mid_round
from fed.experiment import Experiment
from fed.history import History
from jaxmoe.report import make_report, write_report

_TOLERANCE = 1e-5
_COMPARED = ("large_accuracy", "small_accuracy", "loss", "reverse_loss", "forward_loss")


def run(
    experiment: Annotated[Experiment, tyro.conf.arg(name="")] = Experiment(),
    kill: str | None = None,
    tls: bool = True,
    concurrency: int | None = None,
    timeout_s: float = 1500.0,
    compare: bool = True,
    output: pathlib.Path = pathlib.Path("runs/fed_deploy"),
    json: pathlib.Path | None = None,
) -> None:
    """Runs KOALA on Flower on this machine: a SuperLink and a SuperNode per client, as processes of their own, over TLS.

    Then runs the same experiment in this process: models and metrics must be the same up to 1e-5, else the exit status is 1. Needs Flower:
    pip install 'jaxmoe[flower]', in an environment of its own.

    Args:
      experiment: Data, models and training.
      kill: Kill a node while it works, CLIENT@ROUND (from zero), and start it again: a second deployment, whose round must
        complete with everybody.
      tls: Encrypt; certificates are made for the run.
      concurrency: Clients that work at the same time; 0: all; default: one per core, as every message starts a process.
      timeout_s: Of a deployment, all in all.
      compare: Also simulate.
      output: Directory of logs and results.
      json: Also write a JSON report.

    Raises:
      ValueError: for a kill that is not CLIENT@ROUND of this experiment.
      DeploymentFailed: if a process ends that should run, or nothing is there in time.
      ImportError: without Flower.
    """
    console = rich.console.Console(soft_wrap=True, highlight=False, markup=False)
    fault = None if kill is None else Kill.parse(kill)
    report = _Report()
    runs: dict[str, Deployed] = {}
    options = _options(tls, concurrency, timeout_s)
    for name, how in _deployments(options, fault).items():
        console.print(f"{name}: {experiment.clients} nodes, {'TLS' if tls else 'no TLS'}")
        runs[name] = deploy(experiment, output / name, how)
        report.rows += _rows(name, runs[name])
        for line in runs[name].privacy:
            console.print(f"{name}: {line}")
    if compare:
        _compare(experiment, runs, report)
    if fault is not None:
        _judge_fault(runs["killed"], fault, report)
    _finish(experiment, runs, report, console, json)


@dataclasses.dataclass
class _Report:
    """What is shown at the end: rows, figures by name, and what should not be."""

    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    ratios: dict[str, float] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)


def _compare(experiment: Experiment, runs: dict[str, Deployed], report: _Report) -> None:
    """Adds the simulation and how far deployments are from it."""
    began = time.perf_counter()
    history = experiment.simulate(alone=True)
    report.rows.append({"name": "simulation", "value": time.perf_counter() - began, "unit": "s"})
    for name, found in runs.items():
        differences = _differences(found, history)
        report.ratios |= {f"{name}_{key}_difference": value for key, value in differences.items()}
        report.problems += [
            f"{name}: {key} differs from the simulation by {value:.3g}"
            for key, value in differences.items()
            if not value <= _TOLERANCE
        ]


def _judge_fault(killed: Deployed, fault: Kill, report: _Report) -> None:
    """Adds whether the node was killed at work, and its round completed with everybody."""
    record, in_time = killed.rounds[fault.round], killed_mid_round(killed, fault)
    report.ratios["killed_mid_round"] = float(in_time)
    report.ratios["killed_round_missing"] = float(len(record["missing"]))
    if not in_time:
        report.problems.append("killed: the node had replied before it was killed")
    if record["missing"] or record["skipped"]:
        report.problems.append(f"killed: round {fault.round} lacks clients {record['missing']}")


def _options(tls: bool, concurrency: int | None, timeout_s: float) -> DeployOptions:
    """Nothing takes longer than the whole may."""
    return DeployOptions(
        tls=tls,
        concurrency=concurrency,
        run_timeout_s=timeout_s,
        start_timeout_s=timeout_s,
        node_timeout_s=timeout_s,
        round_timeout_s=timeout_s,
    )


def _deployments(options: DeployOptions, fault: Kill | None) -> dict[str, DeployOptions]:
    found = {"clean": options}
    if fault is not None:
        found["killed"] = dataclasses.replace(options, kill=fault)
    return found


def _rows(name: str, found: Deployed) -> list[dict[str, Any]]:
    last = found.rounds[-1]
    begins = [e["time"] for e in found.events if e["event"] == "begin"]
    ends = [e["time"] for e in found.events if e["event"] == "end"]
    rows = [
        {"name": f"{name}: all processes", "value": found.seconds, "unit": "s"},
        {
            "name": f"{name}: a round",
            "value": (ends[0] - begins[0]) / len(found.rounds),
            "unit": "s",
            "rounds": len(found.rounds),
        },
        {"name": f"{name}: large model", "value": last["large_accuracy"], "unit": "accuracy"},
        {"name": f"{name}: small model", "value": last["small_accuracy"], "unit": "accuracy"},
        {
            "name": f"{name}: bytes up",
            "value": sum(r["bytes_up"] for r in found.rounds),
            "unit": "bytes",
        },
    ]
    again = [e for e in found.events if e["event"] in ("killed", "again", "restarted")]
    for event in again:
        offset = event["time"] - begins[0]
        rows.append(
            {
                "name": f"{name}: {event['event']} client {event['client']}",
                "value": offset,
                "unit": "s",
            }
        )
    return rows


def _differences(found: Deployed, history: History) -> dict[str, float]:
    """Largest differences: of parameters, and of the last round's metrics."""
    from fed.flower import named

    simulated = dict(named({"large": history.large, "small": history.small}))
    if set(simulated) != set(found.models):
        raise ValueError(
            "the deployment and the simulation have different parameters; one of them is of another version."
        )
    parameters = max(float(np.abs(found.models[k] - v).max()) for k, v in simulated.items())
    ours, theirs = history.rounds[-1], found.rounds[-1]
    metrics = max(abs(ours[key] - theirs[key]) for key in _COMPARED if key in ours)
    return {"parameter": parameters, "metric": float(metrics)}


def _finish(
    experiment: Experiment,
    runs: dict[str, Deployed],
    report: _Report,
    console: rich.console.Console,
    json: pathlib.Path | None,
) -> None:
    width = max(len(row["name"]) for row in report.rows)
    for row in report.rows:
        console.print(f"{row['name']:{width}}  {row['value']:.4g} {row['unit']}")
    for name, value in report.ratios.items():
        console.print(f"{name}: {value:.3g}")
    if json is not None:
        import importlib.metadata

        made = make_report("fed_deploy", report.rows, report.ratios)
        made["versions"]["flwr"] = importlib.metadata.version("flwr")
        events = {name: [_shown(e, found) for e in found.events] for name, found in runs.items()}
        rounds = {name: found.rounds for name, found in runs.items()}
        made |= {"experiment": dataclasses.asdict(experiment), "events": events, "rounds": rounds}
        made["privacy"] = {name: list(found.privacy) for name, found in runs.items()}
        write_report(json, made)
    for problem in report.problems:
        console.print(f"FAILED {problem}")
    if report.problems:
        sys.exit(1)


def _shown(event: dict[str, Any], found: Deployed) -> dict[str, Any]:
    """An event with its time from the first one's."""
    kept = {k: v for k, v in event.items() if k not in ("time", "node")}
    return kept | {"seconds": round(event["time"] - found.events[0]["time"], 3)}
