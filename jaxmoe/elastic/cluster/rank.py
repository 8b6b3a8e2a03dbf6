"""A rank: one process, one device, some experts, the cache pages of its own requests.

It does what the controller says (``messages``), one thing after another; a second thread listens meanwhile, so that it can be
asked whether it lives and be told to give up. It commits a step's rows at once: they lie beyond what the controller counts as
computed until all ranks have answered, and a step that is run again writes them again.
"""

import logging
import os
import pathlib
import queue
import sys
import threading
from multiprocessing.connection import Client, Connection
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmoe.cache import init_cache
from jaxmoe.elastic import distributed
from jaxmoe.elastic.cluster.messages import (
    Abort,
    Compile,
    Fill,
    Install,
    Ping,
    Reply,
    Setup,
    Step,
    StepValue,
    Stop,
)
from jaxmoe.elastic.executables import Executables
from jaxmoe.engine import sampling
from jaxmoe.engine.runner import Packing
from jaxmoe.engine.step import Batch, make_program
from jaxmoe.moe import ExpertTables
from jaxmoe.sharding import make_mesh, specs
from pallas_kernels import native

logger = logging.getLogger(__name__)

AXIS = "expert"
_ABORT_AGAIN_S = 0.01


class Shard:
    """This rank's part of the model: every parameter as an array on its device, of the experts those in its slots."""

    def __init__(self, setup: Setup, full: Any):
        self.specs = specs(setup.config)
        self._full = jax.tree.map(np.asarray, full)  # the host's copy: any expert can be had again
        empty = [0] * setup.slots
        self.local = jax.tree.map(
            lambda leaf, spec: jax.device_put(self._take(leaf, spec, empty)), self._full, self.specs
        )
        self._put = jax.jit(_put, static_argnums=3, donate_argnums=0)
        self.fill([Fill(0, 0, "host")])  # compiles the writing of a slot

    @staticmethod
    def _take(leaf: np.ndarray, spec: PartitionSpec, experts: list[int]) -> np.ndarray:
        return np.take(leaf, experts, spec.index(AXIS)) if AXIS in spec else leaf

    def fill(self, fills: list[Fill]) -> None:
        """Puts experts into slots."""
        for fill in fills:

            def put(local: jax.Array, full: np.ndarray, spec: PartitionSpec, fill: Fill = fill):
                if AXIS not in spec:
                    return local
                axis = spec.index(AXIS)
                rows = np.take(full, [fill.expert], axis)
                return self._put(local, rows, np.int32(fill.slot), axis)

            self.local = jax.tree.map(put, self.local, self._full, self.specs)


def _put(local: jax.Array, rows: jax.Array, slot: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(local, rows.astype(local.dtype), slot, axis)


def _global_shape(mesh: Mesh, spec: PartitionSpec, local: Any) -> tuple[int, ...]:
    shape = list(local.shape)
    if AXIS in spec:
        shape[spec.index(AXIS)] *= mesh.shape[AXIS]
    return tuple(shape)


def _globalise(mesh: Mesh, spec: PartitionSpec, local: Any) -> jax.Array:
    """The mesh's array of which ``local`` is this rank's part."""
    if not isinstance(local, jax.Array):
        local = jax.device_put(local)
    shape = _global_shape(mesh, spec, local)
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, spec), [local])


def _own(array: jax.Array) -> jax.Array:
    return array.addressable_shards[0].data


BY_RANK, BY_PAGE, EVERYWHERE = PartitionSpec(AXIS), PartitionSpec(None, AXIS), PartitionSpec()


class Rank:
    """The state of the process and what it does with each message."""

    def __init__(self, setup: Setup, number: int):
        self.setup, self.number = setup, number
        self._packing = Packing(setup.sizes, 1)
        native.available()  # registers the kernels, which a program that is loaded calls by name
        full = _load(setup)
        self._shard = Shard(setup, full)
        sizes = setup.sizes
        dtype = sizes.cache_dtype or full["embed"]["weight"].dtype
        self._entries = init_cache(setup.config, sizes.pages, sizes.page_size, dtype).entries
        self._programs = Executables(pathlib.Path(setup.programs))
        self._devices = {device.process_index: device for device in jax.devices()}
        self._commit = make_program(setup.config, None).commit

    # -- epochs ------------------------------------------------------------------------------------

    def install(self, message: Install) -> None:
        """Fills slots, then puts the arrays together over the new mesh; nothing is copied for that."""
        self._shard.fill(list(message.fills))
        self._mesh = self._mesh_of(message.order)
        self._params = jax.tree.map(
            lambda local, spec: _globalise(self._mesh, spec, local),
            self._shard.local,
            self._shard.specs,
        )
        self._tables = self._tables_of(message.experts)
        self._programs.forget(list(self._mesh.devices.flat))

    def _mesh_of(self, order: tuple[int, ...]) -> Mesh:
        return make_mesh(expert=len(order), devices=[self._devices[rank] for rank in order])

    def _tables_of(self, experts: np.ndarray) -> ExpertTables:
        tables = ExpertTables.from_slots(
            experts, self.setup.config.n_routed_experts, max_copies=self.setup.capacity
        )
        return jax.tree.map(lambda x: _globalise(self._mesh, EVERYWHERE, np.asarray(x)), tables)

    # -- steps -------------------------------------------------------------------------------------

    def _program(self, size: int, mesh: Mesh, operands: tuple) -> Any:
        program = make_program(self.setup.config, mesh)
        name = f"step-{size}"
        return self._programs.get(
            name, list(mesh.devices.flat), lambda: program.compute.lower(*operands)
        )

    def compile(self, message: Compile) -> None:
        """Has everything ready for steps of a size, for as many ranks as it is told."""
        sizes, others = self.setup.sizes, [r for r in sorted(self._devices) if r != self.number]
        (batch,) = self._packing.idle(message.size)
        for number in message.numbers:
            mesh = self._mesh_of((self.number, *others[: number - 1]))
            self._program(message.size, mesh, self._operands(mesh, batch, abstract=True))
        # On the device by decree, as a step's are: JAX compiles anew for arrays that could as well be elsewhere.
        device = self._devices[self.number]
        logits = np.zeros((sizes.rows(message.size), self.setup.config.vocab_size), np.float32)
        sampling.warm_up(jax.device_put(logits, device))
        nothing = {
            name: jax.device_put(
                np.zeros((len(rows), message.size, 1, rows.shape[-1]), rows.dtype), device
            )
            for name, rows in self._entries.items()
        }
        self._entries = self._commit(self._entries, nothing, batch)

    def warm_up(self) -> None:
        """Everything but the programs of steps, which the others have left behind."""
        for size in self._packing.buckets:
            self.compile(Compile(-1, size, ()))

    def _operands(self, mesh: Mesh, batch: Batch, *, abstract: bool = False) -> tuple:
        def over(tree: Any, spec: PartitionSpec) -> Any:
            return jax.tree.map(lambda x: place(x, spec), tree)

        def place(local: Any, spec: PartitionSpec) -> Any:
            if not abstract:
                return _globalise(mesh, spec, local)
            shape = _global_shape(mesh, spec, local)
            return jax.ShapeDtypeStruct(shape, local.dtype, sharding=NamedSharding(mesh, spec))

        if not abstract:
            return self._params, over(self._entries, BY_PAGE), over(batch, BY_RANK), self._tables
        params = jax.tree.map(place, self._shard.local, self._shard.specs)
        number = self.setup.config.n_routed_experts
        slots = np.zeros((number, self.setup.capacity), np.int32)
        tables = over(ExpertTables(slots, np.zeros(number, np.int32)), EVERYWHERE)
        return params, over(self._entries, BY_PAGE), over(batch, BY_RANK), tables

    def step(self, message: Step) -> StepValue:
        """Computes, samples this rank's rows, commits its cache rows."""
        operands = self._operands(self._mesh, message.batch)
        program = self._program(len(message.batch.tokens), self._mesh, operands)
        result = jax.block_until_ready(program(*operands))
        logits, best = _own(result.logits), _own(result.best)
        sampled = sampling.finish(logits, best, message.inputs)
        entries = {name: _own(rows) for name, rows in result.entries.items()}
        self._entries = self._commit(self._entries, entries, message.batch)
        return StepValue(sampled, np.asarray(_own(result.load)))


def _load(setup: Setup) -> Any:
    from jaxmoe import checkpoint
    from jaxmoe.params import init_params

    weights = setup.weights
    if weights.path is None:
        return init_params(
            setup.config, jax.random.key(weights.seed), dtype=jnp.dtype(weights.dtype)
        )
    return checkpoint.load(weights.path, jnp.dtype(weights.dtype), mtp=False)[0]


class Process:
    """The two threads."""

    def __init__(self, connection: Connection, number: int, incarnation: int):
        self._connection, self._sending = connection, threading.Lock()
        self._number, self._incarnation = number, incarnation
        self._work: queue.SimpleQueue = queue.SimpleQueue()
        self._busy = threading.Event()
        self._aborting = False
        self._compiles = 0
        self.spare_ports: set[int] = set()
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self._compiles += 1

    def reply(self, kind: str, epoch: int, number: int = 0, value: Any = None) -> None:
        """Answers the controller; a controller that is gone ends the process."""
        message = Reply(kind, self._number, self._incarnation, epoch, number, value, self._compiles)
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:
            os._exit(0)

    def listen(self) -> None:
        """The second thread."""
        while True:
            if self._aborting and self._busy.is_set():
                # Again and again: the step may be opening connections just now.
                distributed.abort_collectives(self.spare_ports)
                if not self._connection.poll(_ABORT_AGAIN_S):
                    continue
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                os._exit(0)  # the controller is gone; nobody else may give orders
            if isinstance(message, Stop):
                os._exit(0)
            if isinstance(message, Ping):
                self.reply("pong", message.epoch, message.number)
                continue
            if isinstance(message, Abort):
                self._aborting = True
            self._work.put(message)

    def serve(self, rank: Rank) -> None:
        """The first thread."""
        while True:
            message = self._work.get()
            self._busy.set()
            kind, number, value = "failed", getattr(message, "number", 0), None
            try:
                if isinstance(message, Step):
                    kind, value = "done", rank.step(message)
                elif isinstance(message, Install):
                    rank.install(message)
                    kind = "installed"
                elif isinstance(message, Compile):
                    rank.compile(message)
                    kind = "compiled"
                elif isinstance(message, Abort):
                    self._aborting, kind = False, "aborted"
            except Exception as error:  # whatever it is, the controller decides
                logger.exception("failed rank=%d message=%s", self._number, type(message).__name__)
                kind, value = "failed", f"{type(error).__name__}: {error}"
            self._busy.clear()
            self.reply(kind, message.epoch, number, value)


def main() -> None:
    """``python -m jaxmoe.elastic.cluster.rank ADDRESS NUMBER INCARNATION``, with the key on standard input."""
    address, number, incarnation = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    logging.basicConfig(level=logging.WARNING, format=f"rank {number}: %(message)s")
    connection = Client(address, authkey=sys.stdin.buffer.read())
    connection.send((number, incarnation))
    setup: Setup = connection.recv()
    distributed.join(setup.coordinator, number, setup.capacity)
    process = Process(connection, number, incarnation)
    process.spare_ports = {int(setup.coordinator.rsplit(":", 1)[1])}
    threading.Thread(target=process.listen, daemon=True).start()
    rank = Rank(setup, number)
    if incarnation >= setup.capacity:
        rank.warm_up()  # alone: nobody waits for a rank that returns
    process.reply("ready", -1)
    process.serve(rank)


if __name__ == "__main__":
    main()
