"""A cluster whose ranks are threads of this process, each with one of its devices: for unit tests and notebooks.

Controller, plans, messages and ranks are those of ``processes``; only the start of a rank, its death and the computation of a
step differ. A rank that is "killed" ends without a word, as a process does, but what it was computing cannot be hurt: evidence
for recovery is what happens to processes.
"""

import functools
import os
import pathlib
import socket
import subprocess
import threading
from collections.abc import Callable, Iterable
from multiprocessing.connection import Client, Connection
from typing import Any

import jax

from jaxmoe.config import ModelConfig
from jaxmoe.elastic.cluster.faults import Faults
from jaxmoe.elastic.cluster.messages import Fault, ReadyValue, Setup, Step, Weights
from jaxmoe.elastic.cluster.options import ClusterOptions
from jaxmoe.elastic.cluster.orders import Orders
from jaxmoe.elastic.cluster.processes import Cluster
from jaxmoe.elastic.cluster.rank import (
    BY_PAGE,
    BY_RANK,
    EVERYWHERE,
    Rank,
    RankWorker,
    assemble,
    loader,
)
from jaxmoe.elastic.cluster.shard import Leaves, Shard
from jaxmoe.elastic.cluster.startup import Startup
from jaxmoe.elastic.cluster.supervisor import Supervisor
from jaxmoe.elastic.cluster.worker import CollectiveFailed
from jaxmoe.engine.runner import Sizes
from jaxmoe.engine.step import StepResult


class _Hall:
    """Where ranks meet: to compute a step together, and to give each other weights."""

    def __init__(self):
        self._changed = threading.Condition()
        self._parts: dict[tuple[int, int], dict[int, tuple]] = {}
        self._results: dict[tuple[int, int], dict[int, StepResult] | Exception] = {}
        self._waiting: set[int] = set()
        self._cut: set[int] = set()
        self.give: dict[str, Callable[[int, int, int | None], Leaves | None]] = {}

    def compute(
        self,
        what: tuple[int, int],
        rank: int,
        ranks: Iterable[int],
        part: tuple,
        compute: Callable[[dict[int, tuple]], dict[int, StepResult]],
    ) -> StepResult:
        """A rank's result of what all of ``ranks`` compute from their parts; the last to come does the work.

        Args:
          what: epoch and step: what comes later is greater.
          rank, ranks: who comes, and all who must.
          part: the rank's.
          compute: does the work, by way of ``launch``.

        Raises:
          CollectiveFailed: if this rank was cut off meanwhile, or the work has failed.
        """
        with self._changed:
            parts = self._parts.setdefault(what, {})
            parts[rank] = part
            last = set(parts) == set(ranks)
            if not last:
                self._waiting.add(rank)
                # When later ones are done, nobody else comes to this one: a rank that has died may be late.
                self._changed.wait_for(
                    lambda: max(self._results, default=()) >= what or rank in self._cut
                )
                self._waiting.discard(rank)
                self._cut.discard(rank)
                result = self._results.get(what)
                if result is None:
                    del parts[rank]
        if last:  # without the lock: others may be cut off meanwhile
            result = self._outcome(compute, parts)
            with self._changed:
                # What is older has been given up; a rank that has died may itself be finishing something old.
                self._parts = {w: p for w, p in self._parts.items() if w > what}
                self._results = {w: r for w, r in self._results.items() if w > what}
                self._results[what] = result
                self._changed.notify_all()
        if not isinstance(result, dict):
            raise CollectiveFailed(f"the others did not come: {result}")
        return result[rank]

    @staticmethod
    def _outcome(
        compute: Callable[[dict[int, tuple]], dict[int, StepResult]], parts: dict[int, tuple]
    ) -> dict[int, StepResult] | Exception:
        try:
            return compute(parts)
        except Exception as error:
            return error

    def launch(
        self, parts: dict[int, tuple], ranks: Iterable[int], start: Callable[[], StepResult]
    ) -> StepResult:
        """What ``start`` begins to compute from the parts of ``ranks``.

        Raises:
          CollectiveFailed: if some were cut off before.
        """
        # Nobody leaves meanwhile: who does donates its part to what it does next, and XLA's CPU client ends the process if
        # one of several devices is launched with a donated array.
        with self._changed:
            if set(parts) != set(ranks):
                raise CollectiveFailed("some were cut off.")
            return start()

    def cut(self, rank: int) -> None:
        """Ends a rank's waiting."""
        with self._changed:
            if rank in self._waiting:
                self._cut.add(rank)
                self._changed.notify_all()


class _Thread:
    """A rank's thread, with the face of a ``subprocess.Popen``."""

    def __init__(self, target: Callable[["_Thread"], None]):
        self._ended = threading.Event()
        self.connection: Connection | None = None
        self.pid = os.getpid()
        threading.Thread(target=self._run, args=(target,), daemon=True).start()

    def _run(self, target: Callable[["_Thread"], None]) -> None:
        try:
            target(self)
        except (OSError, EOFError):
            pass  # killed while starting
        finally:
            self.kill()

    def poll(self) -> int | None:
        """None while it lives."""
        return -9 if self._ended.is_set() else None

    def wait(self, timeout_s: float | None = None) -> int:
        """Until it is dead.

        Raises:
          subprocess.TimeoutExpired: if it lives longer.
        """
        if not self._ended.wait(timeout_s):
            raise subprocess.TimeoutExpired("a rank", timeout_s)
        return -9

    def kill(self) -> None:
        """It says and hears nothing any more."""
        self._ended.set()
        if self.connection is not None and not self.connection.closed:
            # Closing alone would not wake who reads from it.
            with socket.socket(fileno=os.dup(self.connection.fileno())) as copy:
                try:
                    copy.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # the other end was first


class _Shard(Shard):
    hall: _Hall

    def _ask(self, address: str, asked: list[tuple[int, int, int | None]]) -> list[Leaves | None]:
        give = self.hall.give.get(address)
        if give is None:
            raise ConnectionRefusedError(f"rank {address} is dead.")
        return [give(*each) for each in asked]


class _Rank(Rank):
    def __init__(self, setup: Setup, number: int, faults: Faults, hall: _Hall):
        self._hall = hall
        super().__init__(setup, number, b"", faults)

    def _devices_of_all(self) -> dict[int, list[jax.Device]]:
        return {rank: [jax.devices()[rank]] for rank in range(self.setup.capacity)}

    def _shard(self, key: bytes) -> Shard:
        device = self._devices[self.number][0]
        load = loader(self.setup, self._programs, device)
        shard = _Shard(self.setup, self.number, load, self._programs, device, key)
        shard.hall = self._hall
        return shard

    def _globalise(self, mesh: Any, spec: Any, local: Any) -> jax.Array:
        return jax.device_put(local, self._home)  # the parts meet in the hall

    def _compute(self, message: Step) -> StepResult:
        order = [self._devices_of[d] for d in self._mesh.devices.flat]
        part = self._operands(self._mesh, message.batch)

        def compute(parts: dict[int, tuple]) -> dict[int, StepResult]:
            kinds = self._operands(self._mesh, message.batch, abstract=True)
            program = self._program(len(message.batch.tokens), self._mesh, kinds)

            def start() -> StepResult:
                return program(*self._together([parts[rank] for rank in order]))

            result = jax.block_until_ready(self._hall.launch(parts, order, start))
            return {rank: _part_of(result, self._devices[rank][0]) for rank in order}

        what = (message.epoch, message.number)
        return self._hall.compute(what, self.number, order, part, compute)

    @property
    def _devices_of(self) -> dict[jax.Device, int]:
        return {device: rank for rank, (device,) in self._devices.items()}

    def _together(self, parts: list[tuple]) -> tuple:
        """The operands of all ranks, in the order of the mesh, as arrays of the mesh."""

        def whole(spec: Any, *shards: jax.Array) -> jax.Array:
            return assemble(self._mesh, spec, shards)

        params, *others = zip(*parts, strict=True)
        kinds = (BY_PAGE, BY_RANK, EVERYWHERE)
        return jax.tree.map(whole, self.shard.specs, *params), *(
            jax.tree.map(functools.partial(whole, kind), *trees)
            for kind, trees in zip(kinds, others, strict=False)  # frozen tables are no operand
        )


def _part_of(result: StepResult, device: jax.Device) -> StepResult:
    def part(array: jax.Array) -> jax.Array:
        return next(s.data for s in array.addressable_shards if s.device == device)

    return jax.tree.map(part, result)


class _Worker(RankWorker):
    def __init__(self, thread: _Thread, number: int, incarnation: int, hall: _Hall):
        self._thread, self._hall = thread, hall
        super().__init__(thread.connection, number, incarnation)

    def exit(self) -> None:
        self._thread.kill()
        self._hall.cut(self._number)
        self._work.put(None)

    def _signal(self, number: int) -> None:
        self._thread.kill()

    def cut(self) -> None:
        self._hall.cut(self._number)

    def aborted(self) -> None:
        self._aborting = False


class _Supervisor(Supervisor):
    def __init__(
        self, folder: pathlib.Path, on_change: Callable[[], None], options: ClusterOptions
    ):
        self._hall = _Hall()
        super().__init__(folder, on_change, silence_s=options.silence_s, start_s=options.start_s)

    def _spawn(self, rank: int, incarnation: int) -> Any:
        return _Thread(lambda thread: self._run(thread, rank, incarnation))

    def _run(self, thread: _Thread, number: int, incarnation: int) -> None:
        thread.connection = Client(self._listener.address, authkey=self._key)
        thread.connection.send((number, incarnation))
        setup: Setup = thread.connection.recv()
        worker = _Worker(thread, number, incarnation, self._hall)
        threading.Thread(target=worker.listen, daemon=True).start()
        rank = _Rank(setup, number, worker.faults, self._hall)
        if setup.initial is None:
            rank.warm_up()
        address = f"{number}-{incarnation}"
        self._hall.give[address] = rank.shard.give
        value = ReadyValue(address, rank.shard.canaries, rank.shard.trunk)
        worker.reply("ready", -1, value=value)
        try:
            worker.serve(rank)
        finally:
            del self._hall.give[address]


class _Startup(Startup):
    def _serve(self) -> str:
        return "127.0.0.1:0"  # ranks need not find each other

    def _supervise(self, folder: pathlib.Path) -> Supervisor:
        return _Supervisor(folder, self.on_change, self._options)

    def orders(self) -> Orders:
        return Orders(1, reusable=True)


class VirtualCluster(Cluster):
    """``Cluster`` on the devices of this process, one for each rank.

    Args:
      weights: where the ranks load the model from.
      config: the model; its MTP module is left out.
      options: sizes and limits.

    Raises:
      ValueError: if there are fewer devices than ranks and spares.
    """

    def __init__(
        self, weights: Weights, config: ModelConfig, options: ClusterOptions = ClusterOptions()
    ):
        super().__init__(weights, config, options)
        if self.ranks > len(jax.devices()):
            raise ValueError(
                f"ranks and spares must be at most the {len(jax.devices())} devices of this process; got {self.ranks}. "
                f"Start Python with XLA_FLAGS=--xla_force_host_platform_device_count={self.ranks}, or use Cluster."
            )

    def _startup_of(self, sizes: Sizes) -> Startup:
        return _Startup(
            self.weights, self.config, self.options, sizes, self._slots, lambda: self.on_change()
        )

    def inject(self, rank: int, fault: Fault) -> None:
        """As ``Cluster.inject``; a thread can't be stopped."""
        if fault.action == "stop":
            raise ValueError("action must not be 'stop' here: a thread can't be stopped; use kill.")
        super().inject(rank, fault)
