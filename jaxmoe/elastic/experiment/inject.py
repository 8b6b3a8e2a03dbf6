"""Does to a cluster what a schedule says."""

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np

from jaxmoe.elastic.cluster.messages import Fault
from jaxmoe.elastic.experiment.load import Load
from jaxmoe.elastic.experiment.schedule import Injection
from jaxmoe.elastic.experiment.stand import Stand

WAIT_S = 120.0  # for what an injection waits for; if it does not come, the schedule does not fit the cluster
_ACTIONS = {"slow": "sleep"}  # what faults are called there
_ARMED = ("fetch", "install")  # points at which a process that is yet to come can be met


class Injector:
    """Carries out injections one after another, and notes when.

    Args:
      stand: the cluster.
      load: its clients.
      began: the load's first token, by ``time.monotonic()``.

    Attributes:
      done: (when, injection, ranks) of what has been done.
      missed: what could not be done, and why.
    """

    def __init__(self, stand: Stand, load: Load, began: float):
        self._stand, self._cluster, self._load = stand, stand.cluster, load
        self._began, self._last = began, began
        self.done: list[tuple[float, Injection, tuple[int, ...]]] = []
        self.missed: list[str] = []
        self._drains: list[Future[Any]] = []

    def do(self, injection: Injection) -> None:
        """Waits for the injection's time and does it."""
        if injection.after is None:
            self._sleep_until(self._began + injection.at_s)
        elif self._wait(lambda: self._has_happened(injection)):
            self._sleep_until(time.monotonic() + injection.at_s)
        else:
            self.missed.append(f"{injection}: nothing was {injection.after} in {WAIT_S:g} s")
            return
        if not self._wait(lambda: self._can_be_done(injection)):
            self.missed.append(f"{injection}: its ranks were away for {WAIT_S:g} s")
            return
        ranks = injection.ranks
        if injection.kind == "kill_holders":
            ranks = self._holders()
        self._last = time.monotonic()  # conditions of later ones count from here
        if injection.kind == "cancel":
            self._load.cancel(injection.number)
        for rank in ranks:
            self._do_to(rank, injection)
        self.done.append((self._last, injection, ranks))

    # -- when --------------------------------------------------------------------------------------

    def _sleep_until(self, moment: float) -> None:
        self._wait(lambda: time.monotonic() >= moment)

    def _wait(self, condition: Callable[[], bool]) -> bool:
        end = time.monotonic() + WAIT_S
        while not condition():
            self._stand.note_pids()
            if time.monotonic() > end:
                return False
            time.sleep(0.002)
        return True

    def _has_happened(self, injection: Injection) -> bool:
        wanted, after = set(injection.ranks), injection.after
        events = [event for event in list(self._cluster.events) if event.at >= self._last]
        # A moment that has passed meanwhile has come too.
        if after == "returning":
            joined = any(event.type == "joined" for event in events)
            return joined or bool(self._cluster.starting_pids)
        if after == "draining":
            states = {rank.state for rank in self._cluster.status().ranks}
            return "draining" in states or any(drain.done() for drain in self._drains)
        if after == "joined":
            return any(e.type == "joined" and wanted & set(e.ranks) for e in events)
        # What was done last may have met a rank that was just being lost for something else.
        hit = set(self.done[-1][2]) if self.done else set()
        return not hit <= set(self._cluster.active) or any(e.type == "lost" for e in events)

    def _can_be_done(self, injection: Injection) -> bool:
        """Whether those that it is about are there; who has left as planned is called back for it."""
        if injection.point in _ARMED or injection.kind == "resume":
            return True
        for rank in self._cluster.status().ranks:
            if rank.rank in injection.ranks and rank.state == "drained":
                self._cluster.resume(rank.rank).exception()  # refused: it is on its way by now
        return set(injection.ranks) <= set(self._pids(injection.kind))

    def _pids(self, kind: str) -> dict[int, int]:
        """Processes that a kind of injection may be about; a joiner may have joined by now."""
        joining = self._cluster.starting_pids if kind == "kill_joiner" else {}
        return self._cluster.pids | joining

    # -- what --------------------------------------------------------------------------------------

    def _holders(self) -> tuple[int, ...]:
        """Ranks that have the expert, of the first layer with experts, of which there are fewest."""
        having: dict[int, set[int]] = {}
        for rank, experts in enumerate(self._cluster.rank_experts):
            for expert in experts:
                having.setdefault(expert, set()).add(rank)
        return tuple(sorted(min(having.values(), key=len)))

    def _do_to(self, rank: int, injection: Injection) -> None:
        kind, point = injection.kind, injection.point
        if kind == "drain":
            self._drains.append(self._cluster.drain(rank))
        elif kind == "resume":
            self._cluster.resume(rank)
        elif kind == "kill_joiner":
            _signal(self._pids(kind).get(rank), signal.SIGKILL)
        elif kind in ("kill", "kill_holders") and point == "now":
            _signal(self._cluster.pids.get(rank), signal.SIGKILL)
        elif kind == "stop" and point == "now":
            pid = self._cluster.pids.get(rank)
            _signal(pid, signal.SIGSTOP)
            if injection.seconds:
                threading.Timer(injection.seconds, _signal, (pid, signal.SIGCONT)).start()
        else:
            seconds = injection.seconds
            if point == "step" and not seconds:  # anywhere in a step of some milliseconds
                rng = np.random.default_rng(int(injection.at_s * 1000) + rank)
                seconds = float(rng.uniform(0, 0.01))
            self._cluster.inject(rank, Fault(point, _ACTIONS.get(kind, kind), seconds))


def _signal(pid: int | None, number: int) -> None:
    try:
        if pid is not None:
            os.kill(pid, number)
    except ProcessLookupError:
        pass  # it has just ended
