"""The experiment: runs on one cluster, then the baselines, and the figures that are compared."""

import contextlib
import dataclasses
import itertools
import logging
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxmoe.elastic.cluster.processes import ClusterOptions
from jaxmoe.elastic.experiment import baselines, checks
from jaxmoe.elastic.experiment.metrics import PHASES, Pause, rate
from jaxmoe.elastic.experiment.run import Run, run_schedule
from jaxmoe.elastic.experiment.schedule import Schedule
from jaxmoe.elastic.experiment.stand import Model, Stand, Workload
from jaxmoe.elastic.experiment.steady import in_turns
from jaxmoe.report import median_row

logger = logging.getLogger(__name__)

RECOVERED_S = 3.0  # after a loss, throughput has to be that of healthy survivors
_WINDOW_S, _LEAST_WINDOW_S = 2.0, 1.0  # of load that is looked at then
_HEALTHY_S = 4.0  # of load on healthy survivors


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
      model: what is served.
      cluster: its options.
      schedules: one for each run.
      clients: of the closed loop.
      baselines: whether to compare with a restart and with a frozen build.
      steps: of each build, in the comparison with the frozen one.
      restarts: how often everything is restarted.
      seed: of the baselines' load.
    """

    model: Model
    cluster: ClusterOptions
    schedules: tuple[Schedule, ...]
    clients: int = 12
    baselines: bool = True
    steps: int = 1500
    restarts: int = 2
    seed: int = 0


@dataclasses.dataclass
class Findings:
    """What has been measured.

    Attributes:
      runs: one for each schedule.
      healthy: tokens per second with one rank out as planned.
      restarts: of everything.
      steady: seconds of steps by build, "elastic" and "frozen", that took turns.
      start_s: of the cluster, from nothing to its first request.
      orphans: processes that were still there after the end.
    """

    runs: list[Run] = dataclasses.field(default_factory=list)
    healthy: list[float] = dataclasses.field(default_factory=list)
    restarts: list[baselines.Restart] = dataclasses.field(default_factory=list)
    steady: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    start_s: float = 0.0
    orphans: list[int] = dataclasses.field(default_factory=list)

    @property
    def counts(self) -> checks.Counts:
        """Of all runs."""
        return sum((run.counts for run in self.runs), checks.Counts())

    @property
    def problems(self) -> list[str]:
        """Everything that is not as it must be."""
        found = [f"{problem} [{run.schedule}]" for run in self.runs for problem in run.problems]
        return found + [f"process {pid} is still there" for pid in self.orphans]

    def pauses(self, *types: str) -> list[Pause]:
        """Of these types, of all runs."""
        return [pause for run in self.runs for pause in run.pauses if pause.type in types]


def shown(problems: Sequence[str], most: int = 3) -> str:
    """The first few, and how many more there are."""
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


def conduct(plan: Plan, say: Callable[[str], None]) -> Findings:
    """Does it; ``say`` is told how far it is."""
    found = Findings()
    with _programs(plan) as options:
        say("computing what the requests give undisturbed, on one device")
        load = Workload.of(plan.model)
        stand = Stand(plan.model, load, options, clients=plan.clients)
        say(f"starting {options.ranks} ranks")
        with stand:
            found.start_s = stand.start_s
            say(f"ready after {stand.start_s:.1f} s")
            _runs(plan, stand, found, say)
            if plan.baselines:
                _baselines(plan, stand, found, say)
        found.orphans = stand.orphans
    return found


@contextlib.contextmanager
def _programs(plan: Plan) -> Iterator[ClusterOptions]:
    """The cluster's options, with a folder for compiled programs that all clusters of the experiment share."""
    if plan.cluster.programs is not None:
        yield plan.cluster
        return
    with tempfile.TemporaryDirectory(prefix="jaxmoe-programs-") as folder:
        yield dataclasses.replace(plan.cluster, programs=str(pathlib.Path(folder)))


def _runs(plan: Plan, stand: Stand, found: Findings, say: Callable[[str], None]) -> None:
    number = len(plan.schedules)
    measured = {0, number // 2, number - 1} if plan.baselines else set()
    for i, schedule in enumerate(plan.schedules):
        if i in measured:
            rank = (i + 1) % plan.cluster.ranks
            found.healthy.append(baselines.without(stand, rank, plan.seed, _HEALTHY_S))
            say(f"{plan.cluster.ranks - 1} healthy ranks: {found.healthy[-1]:.0f} tokens/s")
        run = _run(stand, schedule)
        found.runs.append(run)
        pauses = ", ".join(f"{p.type} {p.seconds:.2f} s" for p in run.pauses)
        say(
            f"{i + 1}/{number} seed {schedule.seed} [{schedule}] {run.seconds:.0f} s: {run.counts.completed} requests, "
            f"{pauses or 'no pause'}{'; ' if run.problems else ''}{shown(run.problems)}"
        )


def _run(stand: Stand, schedule: Schedule) -> Run:
    """One run; if it breaks the cluster, which is a failure of that run, the next one gets another."""
    try:
        run = run_schedule(stand, schedule)
    except Exception as error:  # whatever it is, the schedules after it are to be run too
        logger.exception("run failed schedule=%s", schedule)
        run = Run.failed(schedule, f"the run has ended with {type(error).__name__}: {error}")
    if not stand.wait_until_whole(0.0):
        stand.end()
        stand.start()
    return run


def _baselines(plan: Plan, stand: Stand, found: Findings, say: Callable[[str], None]) -> None:
    for i in range(plan.restarts):
        found.restarts.append(baselines.restart(stand, i % plan.cluster.ranks, plan.seed))
        say(f"restart of everything: no token for {found.restarts[-1].pause_s:.1f} s")
    frozen = dataclasses.replace(stand.options, frozen=True)
    with Stand(plan.model, stand.workload, frozen, clients=plan.clients) as other:
        both = {"elastic": stand, "frozen": other}
        found.steady = in_turns(both, plan.steps, plan.seed)
    found.orphans += other.orphans
    if found.steady:
        say(f"elastic over frozen: {steady_overhead(found.steady):.2%} slower")


# -- figures -----------------------------------------------------------------------------------------


def steady_overhead(steady: dict[str, list[float]]) -> float:
    """By how much the elastic build is slower: the median over steps, 0.01 for one percent."""
    pairs = zip(steady["elastic"], steady["frozen"], strict=True)
    return statistics.median(elastic / frozen - 1 for elastic, frozen in pairs)


def rates_after_loss(run: Run) -> list[float]:
    """Tokens per second from ``RECOVERED_S`` after the loss of one of all ranks on, until ranks change again."""
    rates, whole = [], max((pause.active for pause in run.pauses), default=0)
    changes = [pause for pause in run.pauses if pause.type in ("lost", "joined", "drained")]
    for pause, after in itertools.zip_longest(changes, changes[1:]):
        begin = pause.at_s + RECOVERED_S
        end = min(begin + _WINDOW_S, after.at_s if after else run.loaded_s)
        one_is_lost = pause.type == "lost" and pause.active == whole - 1
        if one_is_lost and end - begin >= _LEAST_WINDOW_S:
            rates.append(rate(run.times, begin, end))
    return rates


def summarise(found: Findings) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows and ratios of the report."""
    ratios: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for name, types in (("pause", ("lost",)), ("reintegration_pause", ("joined",))):
        pauses = found.pauses(*types)
        if not pauses:
            continue
        seconds = [pause.seconds for pause in pauses]
        ratios[f"{name}_s"], ratios[f"{name}_worst_s"] = statistics.median(seconds), max(seconds)
        rows.append(median_row(name, seconds, "s"))
        for phase in ("before", *PHASES, "refill"):
            values = [pause.phases[phase] for pause in pauses if phase in pause.phases]
            if values:
                rows.append(median_row(f"{name}: {phase}", values, "s"))
        everyone = [pause.everyone_s for pause in pauses if pause.everyone_s is not None]
        if everyone:
            rows.append(median_row(f"{name}: until every request goes on", everyone, "s"))
    after = [value for run in found.runs for value in rates_after_loss(run)]
    if after:
        rows.append(median_row("throughput after a loss", after, "tokens/s"))
    if found.healthy:
        rows.append(median_row("throughput of healthy survivors", found.healthy, "tokens/s"))
    if after and found.healthy:
        healthy = statistics.median(found.healthy)
        ratios["throughput_after_ratio"] = statistics.median(after) / healthy
    if found.restarts:
        rows.append(median_row("pause of a full restart", [r.pause_s for r in found.restarts], "s"))
        ratios["restart_pause_s"] = statistics.median(r.pause_s for r in found.restarts)
    if found.steady:
        rows += [median_row(f"step, {name}", values, "s") for name, values in found.steady.items()]
        ratios["steady_overhead"] = steady_overhead(found.steady)
    rows.append(median_row("start of the cluster", [found.start_s], "s"))
    counted = found.counts._asdict()
    rows += [{"name": name, "value": n, "unit": "requests"} for name, n in counted.items()]
    ratios |= {name: counted[name] for name in ("lost", "duplicated", "wrong_tokens")}
    ratios["survivor_compiles"] = sum(run.survivor_compiles for run in found.runs)
    ratios["problems"] = len(found.problems)
    return rows, ratios
