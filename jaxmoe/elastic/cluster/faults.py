"""What goes wrong in a rank on purpose: experiments ask for it, nothing else does."""

import signal
import threading
import time
from collections.abc import Callable

from jaxmoe.elastic.cluster.messages import Fault

_OF_THE_WORKER = ("sleep", "raise", "nan", "flip")  # happen between what it does


class Injected(RuntimeError):
    """An error that was asked for."""


class Faults:
    """A rank's faults to come. Safe to use from its two threads.

    Args:
      send_signal: sends this process a signal.
      cut: ends the connections of this rank's collectives.
      replay: sends its last answer again.
    """

    def __init__(
        self,
        send_signal: Callable[[int], None],
        cut: Callable[[], None],
        replay: Callable[[], None],
    ):
        self._signal = send_signal
        self._cut, self._replay = cut, replay
        self._waiting: list[Fault] = []
        self._lock = threading.Lock()
        self._muted_until = 0.0
        self.damage: Callable[[Fault], None] = lambda fault: None

    @property
    def muted(self) -> bool:
        """Whether answers are being lost."""
        return time.monotonic() < self._muted_until

    def add(self, fault: Fault) -> None:
        """Has it happen now, or at its point."""
        if fault.point == "now" and fault.action not in _OF_THE_WORKER:
            self._happen(fault)
        else:
            with self._lock:
                self._waiting.append(fault)

    def at(self, point: str) -> None:
        """Here the process is; what was meant for this point happens."""
        # What shall happen now, but is for this thread to do, happens wherever it comes by first.
        with self._lock:
            due = [fault for fault in self._waiting if fault.point in (point, "now")]
            self._waiting = [fault for fault in self._waiting if fault.point not in (point, "now")]
        for fault in due:
            later = point == "step" and fault.action in ("kill", "stop", "cut")
            if later and fault.seconds:
                timer = threading.Timer(fault.seconds, self._happen, [fault])
                timer.daemon = True
                timer.start()
            else:
                self._happen(fault)

    def _happen(self, fault: Fault) -> None:
        match fault.action:
            case "kill":
                self._signal(signal.SIGKILL)
            case "stop":
                self._signal(signal.SIGSTOP)
            case "sleep":
                time.sleep(fault.seconds)
            case "raise":
                raise Injected("an error was asked for.")
            case "nan" | "flip" | "flip_host":
                self.damage(fault)
            case "cut":
                self._cut()
            case "mute":
                self._muted_until = time.monotonic() + fault.seconds
            case "replay":
                self._replay()
