"""Parts of the state in host memory, and how processes give them to each other."""

import pathlib
import threading
from collections.abc import Iterable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener

from jaxmoe.train.elastic.parts import Part

_WAIT_S = 600.0  # for a part that is still to come; whoever waits in vain is told so when the other process ends


class Store:
    """Parts by step. Safe to use from several threads."""

    def __init__(self):
        self._parts: dict[int, Part] = {}
        self._changed = threading.Condition()

    def put(self, step: int, part: Part) -> None:
        """Adds to what is held of a step."""
        with self._changed:
            before = self._parts.get(step, Part(None, {}))
            common = before.common if part.common is None else part.common
            self._parts[step] = Part(common, before.experts | part.experts)
            self._changed.notify_all()

    def keep(self, *steps: int) -> None:
        """Drops all other steps."""
        with self._changed:
            self._parts = {step: part for step, part in self._parts.items() if step in steps}

    def get(self, step: int, wait_s: float = 0.0) -> Part | None:
        """What is held of a step; None if nothing is after ``wait_s``."""
        with self._changed:
            self._changed.wait_for(lambda: step in self._parts, wait_s)
            return self._parts.get(step)

    def inventory(self) -> dict[int, frozenset[int]]:
        """The experts held of each step."""
        with self._changed:
            return {step: frozenset(part.experts) for step, part in self._parts.items()}


def address(folder: str | pathlib.Path, name: str) -> str:
    """The socket of a process's parts."""
    return str(pathlib.Path(folder) / f"state-{name}")


def serve(store: Store, folder: str | pathlib.Path, name: str, key: bytes) -> Listener:
    """Gives parts to whoever asks and knows the key, until the listener that is returned is closed."""
    listener = Listener(address(folder, name), authkey=key)

    def accept() -> None:
        while True:
            try:
                connection = listener.accept()
            except (ConnectionError, EOFError, AuthenticationError):
                continue  # one that did not know the key, or has gone again
            except OSError:
                return  # closed
            threading.Thread(target=_answer, args=(connection, store), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listener


def _answer(connection: Connection, store: Store) -> None:
    with connection:
        try:
            step, experts, common = connection.recv()
            part = store.get(step, _WAIT_S)
            connection.send(None if part is None else part.only(experts, common=common))
        except (EOFError, OSError):
            return  # gone meanwhile


def fetch(
    folder: str | pathlib.Path,
    name: str,
    key: bytes,
    step: int,
    experts: Iterable[int],
    *,
    common: bool,
    timeout_s: float = _WAIT_S,
) -> Part:
    """A part of the state of a step from another process, which may only be about to have it.

    Raises:
      OSError: the process has gone, does not answer in time, or does not have all of it.
    """
    experts = tuple(experts)
    try:
        with Client(address(folder, name), authkey=key) as connection:
            connection.send((step, experts, common))
            if not connection.poll(timeout_s):
                raise TimeoutError(f"{name} has not sent its part of step {step} in {timeout_s} s.")
            part = connection.recv()
    except (EOFError, AuthenticationError) as error:
        raise ConnectionError(f"{name} has gone: {error}") from error
    if part is None or set(part.experts) != set(experts) or (common and part.common is None):
        raise ConnectionError(f"{name} does not have the asked part of step {step} any more.")
    return part
