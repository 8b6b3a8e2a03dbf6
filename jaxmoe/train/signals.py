"""Stopping between steps, of all processes of a run at the same one."""

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils


class Stopped(KeyboardInterrupt):
    """Ctrl-C that has ended all processes of a run together, after a step."""


class Stop(NamedTuple):
    """A signal that ends a run.

    Attributes:
      number: the signal's.
      process: that received it.
    """

    number: int
    process: int

    def __str__(self) -> str:
        return f"signal={signal.Signals(self.number).name} process={self.process}"


def agree(received: Sequence[int]) -> Stop | None:
    """The signal that ends the run, if any process has received one; all must ask, after the same step.

    It is one for all, whoever has received which, so that they end alike.
    """
    own = max(received, default=0)
    if jax.process_count() == 1:
        return Stop(own, 0) if own else None
    every = np.asarray(multihost_utils.process_allgather(np.asarray(own, np.int32)))
    process = int(every.argmax())
    return Stop(int(every[process]), process) if every[process] else None


@contextlib.contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying in the middle of a step; a second one takes its course.

    Signals can only be caught in the main thread; in others nothing changes. One that is ignored, as of a job in the background,
    stays so.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    previous = {n: handler for n, handler in handlers.items() if handler != signal.SIG_IGN}

    def remember(number: int, frame: Any) -> None:
        del frame
        received.append(number)
        signal.signal(number, previous[number])

    for number in previous:
        signal.signal(number, remember)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def take_course(number: int) -> None:
    """What a signal does where nobody defers it: SIGTERM ends the process, Ctrl-C raises KeyboardInterrupt (``Stopped``).

    Of several processes none is ended before all have come here, or 300 s have passed: JAX's coordination ends with process 0,
    and whoever still takes part in it then ends with an error.
    """
    if signal.getsignal(number) == signal.SIG_IGN:  # another process has received it: all end
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default)
    if jax.process_count() > 1 and signal.getsignal(number) == signal.SIG_DFL:
        jax.distributed.shutdown()
    try:
        signal.raise_signal(number)
    except KeyboardInterrupt as error:
        raise Stopped(*error.args) from None
