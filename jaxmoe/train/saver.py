"""Checkpoints written while training goes on."""

import concurrent.futures
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxmoe import checkpoint
from jaxmoe.train.step import TrainState


def _host() -> jax.Device | None:
    """The CPU, as a device for copies; None where JAX was told to have none."""
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        return None


def _copy(x: jax.Array) -> jax.Array:
    """In host memory, for the next step takes the device's over. A JAX array, which Orbax writes in pieces."""
    return jax.device_put(np.array(x, copy=True), _host())


class Saver:
    """Calls ``write(state, topology)`` in a thread of its own, on a copy of the state; one call at a time.

    A step is saved once ``wait`` has returned, or the next ``save``; until then the checkpoint before it is the last one. What
    ``write`` raises, they raise. With several processes, whose writing needs all of them in the same order as their steps, ``save``
    waits itself.
    """

    def __init__(self, write: Callable[[TrainState, dict[str, Any]], None]):
        self._write = write
        self._threads = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._running: concurrent.futures.Future | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *exc: object) -> None:
        # What was being written is worth having, also if training failed.
        self._threads.shutdown(wait=True)
        if exc[0] is None:
            self.wait()

    def save(self, state: TrainState) -> None:
        """Begins to write ``state`` once what is being written is done."""
        self.wait()
        topology = checkpoint.topology_of(state.params)  # a copy does not tell it any more
        if jax.process_count() > 1:
            self._write(state, topology)
            return
        self._running = self._threads.submit(self._write, jax.tree.map(_copy, state), topology)

    def wait(self) -> None:
        """Returns when everything is written."""
        running, self._running = self._running, None
        if running is not None:
            running.result()
