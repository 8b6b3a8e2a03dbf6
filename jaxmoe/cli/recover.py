"""``jaxmoe recover``: serve a model on rank processes, do faults to them under load, and report what happened."""

import logging
import pathlib
import shlex
import sys

import rich.console

from jaxmoe.elastic.cluster.processes import ClusterOptions
from jaxmoe.elastic.experiment import report as pages
from jaxmoe.elastic.experiment.draw import draw
from jaxmoe.elastic.experiment.experiment import Findings, Plan, conduct, shown, summarise
from jaxmoe.elastic.experiment.schedule import Schedule, parse_schedule, read_schedules
from jaxmoe.elastic.experiment.stand import Model
from jaxmoe.report import make_report, write_report
from jaxmoe.train.config import check_seed

_MOST_DELAY_S = 60.0  # after which schedules wait in vain for ranks


def _spare_ranks(ranks: int, experts: int, redundant: int | None) -> int:
    """How many ranks may be gone with every expert still having a slot on another."""
    slots = -(-(experts + (experts if redundant is None else redundant)) // ranks)
    return ranks - -(-experts // slots)


def _schedules(faults: str, repeat: int, seed: int, ranks: int, spare: int) -> list[Schedule]:
    if faults.startswith("random:"):
        number = faults.removeprefix("random:")
        if not number.isdecimal() or not int(number):
            raise ValueError(f"--faults random:N needs a number of schedules; got {faults!r}.")
        return [draw(seed + i, ranks, spare) for i in range(int(number))]
    if faults.endswith(".json") or pathlib.Path(faults).is_file():
        schedules = read_schedules(pathlib.Path(faults), seed)
    else:
        schedules = [parse_schedule(faults, seed)]
    checked = [schedule.checked(ranks, spare) for schedule in schedules]
    return [schedule.shifted(i, ranks) for schedule in checked for i in range(repeat)]


def _check(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"--{name} must be >= {least}; got {value}.")


def recover(
    model: str = "tiny",
    ranks: int = 4,
    faults: str = "kill:1@3",
    repeat: int = 1,
    seed: int = 0,
    redundant_experts: int | None = None,
    spares: int = 0,
    host_backup: bool = True,
    respawn_delay_s: float = 0.0,
    clients: int = 12,
    baselines: bool = True,
    steps: int = 1500,
    restarts: int = 2,
    programs: pathlib.Path | None = None,
    output: pathlib.Path = pathlib.Path("runs/recover"),
    json: pathlib.Path | None = None,
) -> None:
    """Serves a model on rank processes under load, does faults to them, brings them back, and reports what happened.

    Writes report.html, timeline.png and the controller's log.txt. Every token is compared with those of an undisturbed run on one
    device; the exit status is 1 if one differs, a request is lost, or anything else does not hold that must.

    Faults are written KIND:RANK@SECONDS, one after another with commas between: kill:1@3, kill:0+2@3 (two at once),
    kill:1@3/step (or /computed, /committed, /fetch, /install: at that point of its work), stop:1@3x0.5 (SIGSTOP, for so many
    seconds), slow:1@3x0.3, cut:1@3, mute:1@3x2, raise:1@3, nan:1@3, flip:1@3, flip_host:1@3, replay:1@3, kill_holders@3 (all who
    have the scarcest expert), kill_joiner:1 (the process that is to replace it), drain:1@3, resume:1@8, cancel:5@3 (clients'
    requests). Instead of seconds: @lost, @returning, @joined, @draining, and a delay: @lost+0.2.

    Args:
      model: Preset (tiny, small), with random weights, or a checkpoint's directory.
      ranks: Processes that share requests and experts.
      faults: A schedule as above, a JSON file of schedules (or an earlier report), or random:N for N drawn ones.
      repeat: Runs of every schedule, each time for other ranks; not for drawn ones.
      seed: Of the load and of the first drawn schedule, the next has seed + 1. A preset's weights are always the same.
      redundant_experts: Copies of experts beyond the first; default: one more of each.
      spares: Processes that wait ready to step in.
      host_backup: Keep experts in the hosts' memory too.
      respawn_delay_s: A rank that has died is started again after so many seconds. Where ranks share few processors, only so does
        the throughput of those that are left show without the work of starting another.
      clients: Of the closed loop.
      baselines: Also measure a full restart, and a build whose ranks and tables are constants.
      steps: Steps of each build, taking turns, in the comparison of the two.
      restarts: How often everything is restarted.
      programs: Folder of compiled programs to keep between experiments; default a new one.
      output: Directory of the report.
      json: Also write a JSON report.
    """
    check_seed(seed)
    for name, value, least in (
        ("ranks", ranks, 2),
        ("repeat", repeat, 1),
        ("clients", clients, 1),
        ("steps", steps, 1),
        ("restarts", restarts, 1),
        ("spares", spares, 0),
    ):
        _check(name, value, least)
    if not 0 <= respawn_delay_s <= _MOST_DELAY_S:
        raise ValueError(
            f"--respawn-delay-s must be from 0 to {_MOST_DELAY_S:g}; got {respawn_delay_s}."
        )
    named = Model.named(model)
    spare = _spare_ranks(ranks, named.config.n_routed_experts or 1, redundant_experts)
    cluster = ClusterOptions(
        ranks=ranks,
        redundant_experts=redundant_experts,
        spares=spares,
        host_backup=host_backup,
        respawn_delay_s=respawn_delay_s,
        deadline_s=10.0,
        programs=None if programs is None else str(programs),
    )
    plan = Plan(
        named,
        cluster,
        tuple(_schedules(faults, repeat, seed, ranks, spare)),
        clients,
        baselines,
        steps,
        restarts=restarts,
        seed=seed,
    )
    output.mkdir(parents=True, exist_ok=True)
    form = "%(asctime)s %(levelname)s %(name)s %(message)s"
    logging.basicConfig(filename=output / "log.txt", level=logging.INFO, format=form, force=True)
    console = rich.console.Console(soft_wrap=True, highlight=False, markup=False)
    found = conduct(plan, lambda text: console.print(text))
    _finish(plan, found, console, output, json)


def _finish(
    plan: Plan,
    found: Findings,
    console: rich.console.Console,
    output: pathlib.Path,
    json: pathlib.Path | None,
) -> None:
    rows, ratios = summarise(found)
    report = make_report("recover", rows, ratios)
    report["schedules"] = [schedule.to_dict() for schedule in plan.schedules]
    report["runs"] = [run.to_dict() for run in found.runs]
    pages.write(output, found, report)
    if json is not None:
        write_report(json, report)
    width = max(map(len, ratios))
    for name, value in ratios.items():
        console.print(f"{name:{width}}  {value:.4g}")
    console.print(f"report: {output / 'report.html'}")
    failed = [run for run in found.runs if run.problems]
    for run in failed:
        schedule = run.schedule
        again = shlex.join(["jaxmoe", "recover", *_again(plan, schedule)])
        console.print(f"FAILED seed {schedule.seed} [{schedule}]: {shown(run.problems)}")
        console.print(f"  again: {again}")
    if found.problems:
        sys.exit(1)


def _again(plan: Plan, schedule: Schedule) -> list[str]:
    """Options that give a schedule once more."""
    faults = str(schedule)
    options = plan.cluster
    spare = _spare_ranks(
        options.ranks, plan.model.config.n_routed_experts, options.redundant_experts
    )
    if spare >= 1 and draw(schedule.seed, options.ranks, spare) == schedule:
        faults = "random:1"
    words = ["--model", plan.model.name, "--ranks", options.ranks, "--clients", plan.clients]
    words += ["--faults", faults, "--seed", schedule.seed, "--no-baselines"]
    words += ["--spares", options.spares, "--respawn-delay-s", options.respawn_delay_s]
    if options.redundant_experts is not None:
        words += ["--redundant-experts", options.redundant_experts]
    words += [] if options.host_backup else ["--no-host-backup"]
    return [str(word) for word in words]
