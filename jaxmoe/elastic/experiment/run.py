"""One run: load, faults, return of all ranks, and what must hold afterwards."""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np

from jaxmoe.elastic.cluster.status import Event
from jaxmoe.elastic.experiment import checks
from jaxmoe.elastic.experiment.inject import Injector
from jaxmoe.elastic.experiment.metrics import Pause, pauses_of, token_times
from jaxmoe.elastic.experiment.schedule import Schedule
from jaxmoe.elastic.experiment.stand import Stand

logger = logging.getLogger(__name__)

SETTLE_S = 1.0  # of load with all ranks back
NOTICED_S = 1.0  # after ``silence_s``, whatever has been done must have been noticed
_END_S = 60.0  # for requests in flight to end, once no more are sent


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run has shown.

    Attributes:
      schedule: what was done.
      counts: what became of the requests.
      problems: one line for everything that is not as it must be.
      pauses: of serving.
      survivor_compiles: programs compiled by processes that were there all the time.
      times: when tokens came, from the load's first on, in seconds.
      marks: (seconds, what) of injections and of the cluster's events.
      events: the latter, as they are.
      loaded_s: how long clients sent requests.
      seconds: how long it took.
    """

    schedule: Schedule
    counts: checks.Counts
    problems: tuple[str, ...]
    pauses: tuple[Pause, ...]
    survivor_compiles: int
    times: np.ndarray
    marks: tuple[tuple[float, str], ...]
    events: tuple[Event, ...]
    loaded_s: float
    seconds: float

    @classmethod
    def failed(cls, schedule: Schedule, problem: str) -> "Run":
        """One of which nothing else is known."""
        return cls(schedule, checks.Counts(), (problem,), (), 0, np.zeros(0), (), (), 0.0, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """For reports."""
        return {
            "schedule": self.schedule.to_dict(),
            **self.counts._asdict(),
            "problems": list(self.problems),
            "survivor_compiles": self.survivor_compiles,
            "pauses": [pause.to_dict() for pause in self.pauses],
            "marks": [[round(at, 3), what] for at, what in self.marks],
            "events": [event.to_dict() for event in self.events],
            "tokens": len(self.times),
            "seconds": self.seconds,
        }


def run_schedule(stand: Stand, schedule: Schedule, *, settle_s: float = SETTLE_S) -> Run:
    """Does what a schedule says to a cluster under load, waits until all ranks are back, and checks everything.

    Args:
      stand: the cluster, with all its ranks.
      schedule: what to do.
      settle_s: for how long the load goes on with all ranks back.
    """
    started, cluster = time.monotonic(), stand.cluster
    _within(_END_S, cluster.verify)  # between steps: what has changed until now is done and told
    before, told = checks.compiles(cluster.status()), cluster.events
    load = stand.load(schedule.seed).start()
    problems = []
    if not load.first_token.wait(_END_S):
        problems.append(f"no token after {_END_S:g} s of load")
    began = time.monotonic()
    injector = Injector(stand, load, began)
    for injection in schedule.injections:
        injector.do(injection)
    problems += injector.missed
    time.sleep(stand.options.silence_s + NOTICED_S)  # until then the ranks may seem to be all there
    back = stand.wait_until_whole()
    time.sleep(settle_s)
    loaded_s = time.monotonic() - began
    records = load.stop(_END_S)
    if not (
        back and stand.wait_until_whole()
    ):  # once more: a late fault may only now have been noticed
        states = {rank.rank: rank.state for rank in cluster.status().ranks}
        problems.append(f"ranks do not come back: {states}")
    counts, wrong = checks.count(records, stand.workload.expected, schedule.refuses)
    events = cluster.events[len(told) :]
    # From the last change that was told: one that is just being made is told after it has an epoch.
    epoch = told[-1].epoch if told else 0
    problems += wrong + checks.of_events(events, epoch, schedule.refuses)
    problems += checks.of_ranks(_within(_END_S, cluster.verify)) + checks.of_engine(
        stand.engine.stats()
    )
    problems += checks.Resources.now().leaked(stand.baseline)
    compiled = checks.compiled_since(before, checks.compiles(cluster.status()))
    if compiled:
        problems.append(f"survivors have compiled {compiled} programs")
    faults = [(at, ranks) for at, _, ranks in injector.done]
    marks = [(at - began, str(injection)) for at, injection, _ in injector.done]
    marks += [(e.at - began, f"{e.type} {','.join(map(str, e.ranks))}") for e in events]
    return Run(
        schedule,
        counts,
        tuple(problems),
        tuple(pauses_of(events, records, faults, began)),
        compiled,
        token_times(records) - began,
        tuple(sorted(marks)),
        tuple(events),
        loaded_s,
        time.monotonic() - started,
    )


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """What ``work`` returns; TimeoutError, with the work left alone, if it takes longer."""
    future: Future[Any] = Future()

    def do() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=do, daemon=True).start()
    return future.result(seconds)
