"""The process of a rank: one thread does what the controller says, one thing after another; a second one listens meanwhile, so
that the process can be asked whether it lives, and be told to give up.
"""

import logging
import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Client, Connection
from typing import Any

import jax.monitoring
from jax.sharding import Mesh

from jaxmoe.elastic import distributed
from jaxmoe.elastic.cluster.faults import Faults
from jaxmoe.elastic.cluster.messages import (
    Abort,
    FailureValue,
    Fault,
    Ping,
    Prepare,
    Reply,
    Stop,
)

logger = logging.getLogger(__name__)

_ABORT_AGAIN_S = 0.01
_STUCK_S = 0.1
_ORPHANED_S = 1.0

_compiles = 0  # of this process


def _count(event: str, duration: float, **_: Any) -> None:
    global _compiles
    if event == "/jax/core/compile/backend_compile_duration":
        _compiles += 1


jax.monitoring.register_event_duration_secs_listener(_count)


class Overtaken(RuntimeError):
    """What was asked for belongs to an epoch that has been given up."""


class CollectiveFailed(RuntimeError):
    """A computation with other ranks has ended without a result."""


def with_others(mesh: Mesh, compute: Callable[[], Any]) -> Any:
    """What ``compute`` gives, in which all ranks of the mesh take part.

    Raises:
      CollectiveFailed: if it fails, unless it is this rank's own fault: out of memory, or alone in the mesh.
    """
    try:
        return compute()
    except Exception as error:
        if mesh.size == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise CollectiveFailed(f"{type(error).__name__}: {error}") from error


class Worker:
    """The two threads; what a message asks for is for a subclass to do.

    Args:
      connection: to the controller.
      number, incarnation: of the rank.
    """

    def __init__(self, connection: Connection, number: int, incarnation: int):
        self._connection, self._sending = connection, threading.Lock()
        self._number, self._incarnation = number, incarnation
        self._work: queue.SimpleQueue = queue.SimpleQueue()  # None is the end
        self._busy = threading.Event()
        self._given_up = -1  # what belongs to this epoch's predecessors is not begun
        self._aborting, self._abort_began = False, 0.0
        self._compiled_before = _compiles
        self._parent, self._folder = os.getppid(), None
        self._last: Reply | None = None
        self.prepare: Callable[[Prepare], None] = lambda message: None
        self.faults = Faults(self._signal, self.cut, self._replay)
        self.connections = distributed.Connections(set())

    def begin(self, setup: Any) -> None:
        """Joins the other processes of a ``setup`` (its coordinator, capacity and folder), and listens from now on."""
        self._folder = setup.folder
        threading.Thread(target=self.listen, daemon=True).start()  # the controller may die any time
        distributed.join(setup.coordinator, self._number, setup.capacity)
        self.connections = distributed.Connections({int(setup.coordinator.rsplit(":", 1)[1])})

    def reply(self, kind: str, epoch: int, number: int = 0, value: Any = None) -> None:
        """Answers the controller; a controller that is gone ends the process."""
        compiles = _compiles - self._compiled_before
        message = Reply(kind, self._number, self._incarnation, epoch, number, value, compiles)
        if kind != "pong":
            self._last = message
        if not self.faults.muted:
            self._send(message)

    def _send(self, message: Reply) -> None:
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:
            self.exit()

    def exit(self) -> None:
        """Ends the process at once."""
        os._exit(0)

    def _clear(self) -> None:
        """Removes the folder of a controller that could not do it itself, having been killed."""
        until = time.monotonic() + _ORPHANED_S
        while os.getppid() == self._parent and time.monotonic() < until:
            time.sleep(0.01)  # its connections close a little before it is gone
        if os.getppid() != self._parent and self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)  # other ranks do it too

    def _signal(self, number: int) -> None:
        os.kill(os.getpid(), number)

    def _replay(self) -> None:
        if self._last is not None:
            self._send(self._last)

    def cut(self) -> None:
        """Ends what this rank computes with others."""
        stuck = self._aborting and time.monotonic() - self._abort_began > _STUCK_S
        self.connections.abort(stuck=stuck)

    def aborted(self) -> None:
        """Nothing is being computed with others any more."""
        self._aborting = False
        self.connections.end()

    def listen(self) -> None:
        """The second thread; without it nobody would notice that the controller is gone."""
        try:
            self._listen()
        except Exception:
            logger.exception("failed rank=%d", self._number)
            self.exit()

    def _listen(self) -> None:
        while True:
            if self._aborting and self._busy.is_set():
                # Again and again: the step may be opening connections just now.
                self.cut()
                if not self._connection.poll(_ABORT_AGAIN_S):
                    continue
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                self._clear()
                return self.exit()  # the controller is gone; nobody else may give orders
            if isinstance(message, Stop):
                return self.exit()
            if isinstance(message, Ping):
                idle = self._work.empty() and not self._busy.is_set()
                self.reply("pong", message.epoch, message.number, idle)
                continue
            if isinstance(message, Fault):
                self.faults.add(message)
                continue
            if isinstance(message, Prepare):
                threading.Thread(target=self.prepare, args=(message,), daemon=True).start()
                continue
            if isinstance(message, Abort):
                self._abort_began = time.monotonic()
                self._given_up, self._aborting = message.epoch, True
            self._work.put(message)

    def serve(self, rank: Any) -> None:
        """The first thread."""
        self.prepare = rank.prepare
        while True:
            message = self._work.get()
            if message is None:
                return
            self._busy.set()
            try:
                kind, value = self._do(rank, message)
            except Exception as error:  # whatever it is, the controller decides
                own = not isinstance(error, CollectiveFailed | Overtaken)
                # What fails because a peer has died is its peer's story, and told by the controller.
                log = logger.exception if own else logger.info
                log("failed rank=%d message=%s", self._number, type(message).__name__)
                kind, value = "failed", FailureValue(f"{type(error).__name__}: {error}", own)
            self._busy.clear()
            self.reply(kind, message.epoch, getattr(message, "number", 0), value)

    def _do(self, rank: Any, message: Any) -> tuple[str, Any]:
        if isinstance(message, Abort):
            self.aborted()
            return "aborted", self._left(rank)
        if message.epoch < self._given_up:
            raise Overtaken(f"epoch {message.epoch} has been given up for {self._given_up}.")
        return self._answer(rank, message)

    def _left(self, rank: Any) -> Any:
        """What the controller has to know of a rank that has given up what it was doing."""
        return None

    def _answer(self, rank: Any, message: Any) -> tuple[str, Any]:
        """Does what a message asks for; the kind of the answer and its value."""
        raise NotImplementedError


def call_controller() -> tuple[Connection, bytes, int, int, Any]:
    """Calls whoever has started this process, as its arguments say: ADDRESS NUMBER INCARNATION, with the key on standard input.

    Returns:
      The connection, the key, the rank's number, its incarnation, and the first message, a setup.
    """
    address, number, incarnation = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    logging.basicConfig(level=logging.WARNING, format=f"rank {number}: %(message)s")
    key = sys.stdin.buffer.read()
    connection = Client(address, authkey=key)
    connection.send((number, incarnation))
    return connection, key, number, incarnation, connection.recv()
