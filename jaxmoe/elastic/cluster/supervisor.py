"""The processes of the ranks: started, taken in when they are ready, started again when they die on the way, ended."""

import dataclasses
import itertools
import logging
import os
import pathlib
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from typing import Any

from jaxmoe.elastic.cluster.messages import Setup

logger = logging.getLogger(__name__)

MOST_STARTS = 3  # of a rank that dies each time before it is ready


@dataclasses.dataclass
class Member:
    """A rank's process as the controller sees it.

    Attributes:
      rank, incarnation: whose, and the how-manieth in the cluster.
      process: the process; it may have ended.
      starts: how often it has been tried in a row.
      connection: to talk to it; None until it is ready.
      compiles: programs that XLA has compiled in it, as it last said.
    """

    rank: int
    incarnation: int
    process: subprocess.Popen
    starts: int = 1
    connection: Connection | None = None
    compiles: int = 0

    @property
    def alive(self) -> bool:
        """Whether the process has not ended."""
        return self.process.poll() is None

    def send(self, message: Any) -> bool:
        """Whether the message is out; False if the process is gone."""
        try:
            self.connection.send(message)
        except OSError:
            return False
        return True

    def end(self) -> None:
        """The process is dead afterwards, whatever it was doing: it is the fence against its return."""
        if self.alive:
            self.process.kill()
        self.process.wait()
        if self.connection is not None:
            self.connection.close()


def _environment() -> dict[str, str]:
    """This process's, without what splits its own CPU into several devices: a rank is one device."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    kept = [flag for flag in flags if "host_platform_device_count" not in flag]
    return {**os.environ, "XLA_FLAGS": " ".join(kept), "JAX_NUM_CPU_DEVICES": "1"}


class Supervisor:
    """Starts ranks and collects those that are ready. Safe to use from several threads.

    Args:
      folder: for the control socket.
      setup: the first message to every rank.
      on_change: called, on any thread, when a process has ended or is ready.
    """

    def __init__(self, folder: pathlib.Path, setup: Setup, on_change: Callable[[], None]):
        self._setup, self._on_change = setup, on_change
        self._key = secrets.token_bytes(32)
        self._listener = Listener(str(folder / "control"), authkey=self._key)
        self._lock = threading.Lock()
        self._incarnations = itertools.count()
        self._starting: list[Member] = []
        self._ready: list[Member] = []
        self.given_up: set[int] = set()  # ranks that have died too often while starting
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def launch(self, rank: int, starts: int = 1) -> None:
        """Starts a process for a rank; it is among ``ready`` once it has loaded the model."""
        incarnation = next(self._incarnations)
        command = [sys.executable, "-m", "jaxmoe.elastic.cluster.rank", self._listener.address]
        process = subprocess.Popen(
            [*command, str(rank), str(incarnation)], stdin=subprocess.PIPE, env=_environment()
        )
        member = Member(rank, incarnation, process, starts)
        with self._lock:
            self._starting.append(member)
        process.stdin.write(self._key)
        process.stdin.close()
        threading.Thread(target=self._watch, args=(member,), daemon=True).start()

    @property
    def ready(self) -> int:
        """How many processes wait to be taken."""
        return len(self._ready)

    def take(self) -> Member:
        """The first process that is ready; it is the caller's from now on."""
        with self._lock:
            return self._ready.pop(0)

    def close(self) -> None:
        """Ends the processes that nobody has taken, and takes in no more."""
        with self._lock:
            self._closed = True
            rest = [*self._starting, *self._ready]
        for member in rest:
            member.end()
        self._listener.close()

    def _watch(self, member: Member) -> None:
        """Tells of the process's end, though nothing may be being asked of it; starts it again if it was never ready."""
        member.process.wait()
        with self._lock:
            again = member in self._starting and not self._closed
            if again:
                self._starting.remove(member)
        if again and member.starts < MOST_STARTS:
            logger.warning("rank %d died while starting, starting it again", member.rank)
            self.launch(member.rank, member.starts + 1)
        elif again:
            logger.error(
                "rank %d died %d times while starting: given up", member.rank, member.starts
            )
        self._on_change()

    def _accept(self) -> None:
        """Takes in processes that have started, one thread for each until it is ready."""
        while not self._closed:
            try:
                connection = self._listener.accept()
            except (OSError, EOFError, AuthenticationError):
                continue  # closed, or one that did not know the key
            threading.Thread(target=self._welcome, args=(connection,), daemon=True).start()

    def _welcome(self, connection: Connection) -> None:
        try:
            rank, incarnation = connection.recv()
            connection.send(self._setup)
            connection.recv()  # it is ready
        except (EOFError, OSError):
            connection.close()
            return
        with self._lock:
            member = next(
                (m for m in self._starting if (m.rank, m.incarnation) == (rank, incarnation)), None
            )
            if member is not None:
                member.connection = connection
                self._starting.remove(member)
                self._ready.append(member)
        self._on_change()
