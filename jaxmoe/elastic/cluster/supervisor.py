"""The processes of the ranks: started, kept while they wait for their part, started again when they die on the way, ended."""

import contextlib
import dataclasses
import itertools
import logging
import os
import pathlib
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import (
    Connection,
    Listener,
    answer_challenge,
    deliver_challenge,
)
from typing import Any

from jaxmoe.elastic.cluster.messages import Fault
from jaxmoe.elastic.cluster.sockets import limit

logger = logging.getLogger(__name__)

MOST_STARTS = 3  # of a rank that dies each time before it is ready
_GREETING_S = 10.0  # for a caller to show that it knows the key, and to say who it is


@dataclasses.dataclass(eq=False)
class Member:
    """A rank's process as the controller sees it.

    Attributes:
      rank, incarnation: whose, and the how-manieth in the cluster.
      process: the process, a ``subprocess.Popen`` or something with its face; it may have ended.
      setup: the first message to it.
      starts: how often it has been tried in a row.
      connection: to talk to it; None until it has called.
      ready: what it has said when it was ready; None until then.
      answer: to what it was asked by ``Supervisor.ask``.
      compiles: programs that XLA has compiled in it, as it last said.
    """

    rank: int
    incarnation: int
    process: Any
    setup: Any
    starts: int = 1
    connection: Connection | None = None
    ready: Any = None
    answer: Any = None
    compiles: int = 0
    _sending: threading.Lock = dataclasses.field(default_factory=threading.Lock, repr=False)

    @property
    def alive(self) -> bool:
        """Whether the process has not ended."""
        return self.process.poll() is None

    def send(self, message: Any) -> bool:
        """Whether the message is out; False if the process is gone, or does not read it and so is killed. From any thread."""
        try:
            with self._sending:
                self.connection.send(message)
        except OSError:
            self.process.kill()  # what follows half a message would not be understood
            return False
        return True

    def end(self) -> None:
        """The process is dead afterwards, whatever it was doing: it is the fence against its return."""
        if self.alive:
            self.process.kill()
        self.process.wait()
        if self.connection is not None:
            self.connection.close()


def environment(devices: int = 1) -> dict[str, str]:
    """This process's environment, with so many CPU devices: flags that say otherwise are for this one."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    kept = [flag for flag in flags if "host_platform_device_count" not in flag]
    return {**os.environ, "XLA_FLAGS": " ".join(kept), "JAX_NUM_CPU_DEVICES": str(devices)}


class Supervisor:
    """Starts ranks and keeps those that are ready until they are taken. Safe to use from several threads.

    Args:
      folder: for the control socket.
      on_change: called, on any thread, when a process has ended, is ready, or has answered.
      silence_s: a process that stops in the middle of a message for so long is taken for dead.
      start_s: a process that is not ready after so long is killed, and so started again.
      module: that a rank runs, with an address, its number, its incarnation, and a key on standard input.
      devices: on CPU, of each process.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        on_change: Callable[[], None],
        *,
        silence_s: float,
        start_s: float,
        module: str = "jaxmoe.elastic.cluster.rank",
        devices: int = 1,
    ):
        self._on_change, self._module, self._devices = on_change, module, devices
        self._silence_s, self._start_s = silence_s, start_s
        self._key = secrets.token_bytes(32)
        # Without a key: who calls is asked for it on a thread of its own, so that nobody can hold up the others.
        self._listener = Listener(str(folder / "control"))
        self._lock = threading.RLock()
        self._incarnations = itertools.count()
        self._starting: list[Member] = []
        self._ready: list[Member] = []
        self._faults: dict[int, list[Fault]] = {}
        self.given_up: set[int] = set()  # ranks that have died too often while starting
        self._closed = False
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def launch(self, rank: int, setup: Any, starts: int = 1) -> None:
        """Starts a process for a rank, with ``setup`` as the first message to it; it is among ``ready`` once it says so.

        Does nothing if the rank has a process that nobody has taken.

        Raises:
          OSError: if the system has no room for one.
        """
        with self._lock:
            if self._closed or any(member.rank == rank for member in self.waiting):
                return
            incarnation = next(self._incarnations)
            process = self._spawn(rank, incarnation)
            member = Member(rank, incarnation, process, setup, starts)
            self._starting.append(member)
        threading.Thread(target=self._watch, args=(member,), daemon=True).start()

    def _spawn(self, rank: int, incarnation: int) -> Any:
        command = [sys.executable, "-m", self._module, self._listener.address]
        process = subprocess.Popen(
            [*command, str(rank), str(incarnation)],
            stdin=subprocess.PIPE,
            # Libraries print there, and what is on the controller's standard output is for others to read.
            stdout=2,
            env=environment(self._devices),
            process_group=0,  # Ctrl-C is for the controller
        )
        with contextlib.suppress(BrokenPipeError):  # it is dead already, which will be noticed
            process.stdin.write(self._key)
            process.stdin.close()
        return process

    @property
    def starting(self) -> list[Member]:
        """Processes that are not ready yet."""
        return list(self._starting)

    @property
    def ready(self) -> list[Member]:
        """Processes that wait to be taken, the first one first."""
        return list(self._ready)

    @property
    def waiting(self) -> list[Member]:
        """All that nobody has taken."""
        return [*self.starting, *self.ready]

    def take(self, member: Member) -> bool:
        """A process that is ready becomes the caller's; False if it has just died."""
        with self._lock:
            there = member in self._ready
            if there:
                self._ready.remove(member)
        return there

    def drop(self, rank: int) -> None:
        """Ends a rank's process that nobody has taken."""
        with self._lock:
            gone = [m for m in (*self._starting, *self._ready) if m.rank == rank]
            self._starting = [m for m in self._starting if m not in gone]
            self._ready = [m for m in self._ready if m not in gone]
        for member in gone:
            member.end()

    def ask(self, member: Member, message: Any, kind: str, timeout_s: float) -> None:
        """Sends a message to a process that is ready; ``answer`` holds its reply when it has come.

        Args:
          member: the process.
          message: with an epoch, to be answered with it.
          kind: of the answer, if it is not "failed"; others don't count.
          timeout_s: after this the process is killed, and so started again.
        """
        member.answer = None
        member.send(message)
        threading.Thread(
            target=self._hear, args=(member, message.epoch, kind, timeout_s), daemon=True
        ).start()

    def _hear(self, member: Member, epoch: int, kind: str, timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        try:
            while member.connection.poll(max(0.0, until - time.monotonic())):
                reply = member.connection.recv()
                member.compiles = reply.compiles
                if reply.kind in (kind, "failed") and reply.epoch == epoch:
                    member.answer = reply
                    self._on_change()
                    return
            logger.warning("rank %d has not answered for %g s", member.rank, timeout_s)
        except Exception as error:  # its end, half a message, or none that can be read
            logger.info("rank %d has not answered: %s", member.rank, error)
        member.process.kill()

    def inject(self, rank: int, fault: Fault) -> None:
        """A fault for a rank's next process."""
        with self._lock:
            waiting = next((m for m in self._ready if m.rank == rank), None)
            if waiting is None:
                self._faults.setdefault(rank, []).append(fault)
        if waiting is not None:
            waiting.send(fault)

    def close(self) -> None:
        """Ends the processes that nobody has taken, and takes in no more."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            rest = [*self._starting, *self._ready]
            self._starting, self._ready = [], []
        for member in rest:
            member.end()
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as caller:
            caller.connect(
                self._listener.address
            )  # wakes the thread that accepts; closing would not
        self._accepting.join(_GREETING_S)
        self._listener.close()

    def _watch(self, member: Member) -> None:
        """Tells of the process's end, though nothing may be being asked of it; starts it again if nobody has taken it."""
        try:
            member.process.wait(self._start_s)
        except subprocess.TimeoutExpired:
            with self._lock:
                late = member in self._starting
            if late:
                logger.warning("rank %d has not been ready for %g s", member.rank, self._start_s)
                member.process.kill()
        member.process.wait()
        with self._lock:
            starting, waiting = member in self._starting, member in self._ready
            if starting:
                self._starting.remove(member)
            if waiting:
                self._ready.remove(member)
            if not self._closed and (starting or waiting):  # else somebody else has it
                self._again(member, member.starts + 1 if starting else 1)
        self._on_change()

    def _again(self, member: Member, starts: int) -> None:
        """Starts a rank anew whose process has died before it took part."""
        if member.connection is not None:
            member.connection.close()
        if starts > MOST_STARTS:
            self.given_up.add(member.rank)
            logger.error("rank %d died %d times while starting: given up", member.rank, MOST_STARTS)
            return
        logger.warning("rank %d died before it took part, starting it again", member.rank)
        try:
            self.launch(member.rank, member.setup, starts)
        except OSError as error:
            self.given_up.add(member.rank)
            logger.error("rank %d could not be started: %s", member.rank, error)

    def _accept(self) -> None:
        """Takes in processes that have started, one thread for each until it is ready."""
        while not self._closed:
            try:
                connection = self._listener.accept()
            except OSError:
                continue  # the caller has gone away already
            threading.Thread(target=self._welcome, args=(connection,), daemon=True).start()

    def _welcome(self, connection: Connection) -> None:
        try:
            limit(connection, _GREETING_S)
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            called = tuple(connection.recv())
            with self._lock:
                known = [m for m in self._starting if (m.rank, m.incarnation) == called]
            if not known:
                connection.close()
                return
            (member,) = known
            connection.send(member.setup)
            connection.poll(None)  # a model is loaded meanwhile
            limit(connection, self._silence_s)
            reply = connection.recv()
        except (EOFError, OSError, AuthenticationError):
            connection.close()
            return
        member.connection, member.ready, member.compiles = connection, reply.value, reply.compiles
        with self._lock:
            if member in self._starting:
                self._starting.remove(member)
                self._ready.append(member)
            faults = self._faults.pop(member.rank, [])
        for fault in faults:
            member.send(fault)
        self._on_change()
