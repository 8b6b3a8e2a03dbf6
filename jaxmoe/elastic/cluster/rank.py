"""A rank: one process, one device at a time, some experts, the cache pages of its own requests.

It does what the controller says (``messages``), one thing after another. It commits a step's rows at once: they lie beyond what
the controller counts as computed until all ranks have answered, and a step that is run again writes them again.
"""

import functools
import pathlib
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Listener
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmoe.cache import init_cache
from jaxmoe.elastic.cluster.faults import Faults
from jaxmoe.elastic.cluster.messages import (
    Compile,
    Fault,
    Fetch,
    FetchValue,
    Install,
    InstallValue,
    Prepare,
    ReadyValue,
    Setup,
    Step,
    StepValue,
    Verify,
    VerifyValue,
)
from jaxmoe.elastic.cluster.shard import AXIS, Shard, serve
from jaxmoe.elastic.cluster.worker import Worker, call_controller, with_others
from jaxmoe.elastic.executables import Executables
from jaxmoe.elastic.placement import Placement
from jaxmoe.engine import sampling
from jaxmoe.engine.runner import Packing
from jaxmoe.engine.step import Batch, StepResult, make_program
from jaxmoe.engine.stream import key_data
from jaxmoe.moe import ExpertTables
from jaxmoe.params import Params
from jaxmoe.sharding import make_mesh
from pallas_kernels import native

BY_RANK, BY_PAGE, EVERYWHERE = PartitionSpec(AXIS), PartitionSpec(None, AXIS), PartitionSpec()


def _global_shape(mesh: Mesh, spec: PartitionSpec, local: Any) -> tuple[int, ...]:
    shape = list(local.shape)
    if AXIS in spec:
        shape[spec.index(AXIS)] *= mesh.shape[AXIS]
    return tuple(shape)


def assemble(mesh: Mesh, spec: PartitionSpec, parts: Sequence[jax.Array]) -> jax.Array:
    """The mesh's array of which ``parts`` are those on this process's devices; nothing is copied."""
    shape = _global_shape(mesh, spec, parts[0])
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, spec), list(parts))


def devices_by_rank() -> dict[int, list[jax.Device]]:
    """Every process's devices, in the order of their ids."""
    found: dict[int, list[jax.Device]] = {}
    for device in sorted(jax.devices(), key=lambda d: d.id):
        found.setdefault(device.process_index, []).append(device)
    return found


class Rank:
    """The state of the process and what it does with each message.

    Args:
      setup: the model and the shapes.
      number: the rank's.
      key: proves to other ranks that this is one.
      faults: what shall go wrong.
    """

    def __init__(self, setup: Setup, number: int, key: bytes, faults: Faults):
        self.setup, self.number = setup, number
        self._devices = self._devices_of_all()
        self._packing = Packing(setup.sizes, 1)
        native.available()  # registers the kernels, which a program that is loaded calls by name
        self._programs = Executables(pathlib.Path(setup.programs))
        self.shard = self._shard(key)
        sizes = setup.sizes
        dtype = sizes.cache_dtype or self.shard.local["embed"]["weight"].dtype
        self._entries = init_cache(setup.config, sizes.pages, sizes.page_size, dtype).entries
        self._first = self._home = self._devices[number][0]
        self._entries = jax.device_put(self._entries, self._home)
        self._faults, self._digest = faults, ""
        self._mesh: Mesh | None = None  # until the first epoch
        self._constants: ExpertTables | None = None
        faults.damage = self._damage

    def _devices_of_all(self) -> dict[int, list[jax.Device]]:
        return devices_by_rank()

    def _shard(self, key: bytes) -> Shard:
        device = self._devices[self.number][0]
        load = loader(self.setup, self._programs, device)
        return Shard(self.setup, self.number, load, self._programs, device, key)

    # -- epochs ------------------------------------------------------------------------------------

    def fetch(self, message: Fetch) -> FetchValue:
        """Gets experts' weights ready for ``install``."""
        self._faults.at("fetch")
        value = self.shard.fetch(message.fills)
        if message.prepare is not None:
            self.prepare(message.prepare)
        return value

    def install(self, message: Install) -> InstallValue:
        """Fills slots, then puts the arrays together over the new mesh; nothing is copied for that."""
        self._faults.at("install")
        self._go_to(dict(message.order)[self.number])
        self.shard.fill(message.fills)
        self._mesh = self._mesh_of(message.order)
        self._assemble()
        placement = Placement(
            message.experts, self.setup.config.n_routed_experts, len(message.order)
        )
        self._tables, self._digest = self._tables_of(placement), placement.digest
        written = time.perf_counter()
        self._programs.forget([self._first], [self._home], list(self._mesh.devices.flat))
        self._ready(message.sizes, self._mesh)
        return InstallValue(self._digest, {"executable": time.perf_counter() - written})

    def prepare(self, message: Prepare) -> None:
        """Loads programs for a mesh that may come; on a thread of its own."""
        known = [n for n in message.sizes if self._programs.known(f"step-{n}", len(message.order))]
        self._ready(known, self._mesh_of(message.order))

    def _ready(self, sizes: Sequence[int], mesh: Mesh) -> None:
        for size in sizes:
            (batch,) = self._packing.idle(size)
            self._program(size, mesh, self._operands(mesh, batch, abstract=True))

    def _assemble(self) -> None:
        """The mesh's arrays of parameters, of which the shard's are this rank's parts."""
        self._params = jax.tree.map(
            functools.partial(self._globalise, self._mesh), self.shard.specs, self.shard.local
        )

    def _damage(self, fault: Fault) -> None:
        if fault.action == "flip_host":
            self.shard.damage_backup(fault.index)
            return
        self.shard.damage(fault.index, nan=fault.action == "nan")
        if self._mesh is not None:
            self._assemble()

    def _go_to(self, index: int) -> None:
        """Moves to another device of the process."""
        home = self._devices[self.number][index]
        if home != self._home:
            self.shard.move(home)
            self._entries, self._home = jax.device_put(self._entries, home), home

    def _mesh_of(self, order: tuple[tuple[int, int], ...]) -> Mesh:
        devices = [self._devices[rank][index] for rank, index in order]
        return make_mesh(expert=len(order), devices=devices)

    def _tables_of(self, placement: Placement) -> ExpertTables:
        # A rank holds an expert once: so many ranks, so many copies at most.
        tables = ExpertTables(placement.expert_slots(self.setup.capacity), placement.copies)
        if self.setup.frozen:
            self._freeze(tables)
        return jax.tree.map(functools.partial(self._globalise, self._mesh, EVERYWHERE), tables)

    def _freeze(self, tables: ExpertTables) -> None:
        if self._constants is not None:
            raise RuntimeError("a frozen build has one epoch; start everything again.")
        self._constants = tables

    def verify(self, message: Verify) -> VerifyValue:
        """Compares all slots' weights with their checksums."""
        return VerifyValue(self._digest, self.shard.wrong(message.canaries))

    # -- arrays ------------------------------------------------------------------------------------

    def _globalise(self, mesh: Mesh, spec: PartitionSpec, local: Any) -> jax.Array:
        """The mesh's array of which ``local`` is this rank's part."""
        if not isinstance(local, jax.Array):
            local = jax.device_put(local, self._home)
        return assemble(mesh, spec, [local])

    def _operands(self, mesh: Mesh, batch: Batch, *, abstract: bool = False) -> tuple:
        def place(spec: PartitionSpec, local: Any) -> Any:
            if not abstract:
                return self._globalise(mesh, spec, local)
            shape = _global_shape(mesh, spec, local)
            return jax.ShapeDtypeStruct(shape, local.dtype, sharding=NamedSharding(mesh, spec))

        def over(tree: Any, spec: PartitionSpec) -> Any:
            return jax.tree.map(functools.partial(place, spec), tree)

        entries, rows = over(self._entries, BY_PAGE), over(batch, BY_RANK)
        if not abstract:
            given = self._params, entries, rows
            return given if self.setup.frozen else (*given, self._tables)
        params = jax.tree.map(place, self.shard.specs, self.shard.local)
        if self.setup.frozen:
            return params, entries, rows
        layers, number = self.shard.canaries.shape
        slots = np.zeros((layers, number, self.setup.capacity), np.int32)
        tables = ExpertTables(slots, np.zeros((layers, number), np.int32))
        return params, entries, rows, over(tables, EVERYWHERE)

    # -- programs ----------------------------------------------------------------------------------

    def _program(self, size: int, mesh: Mesh, operands: tuple) -> Any:
        compute, name = make_program(self.setup.config, mesh).compute, f"step-{size}"
        if self.setup.frozen:
            tables, elastic, name = self._constants, compute, f"{name}-{self._digest}"
            compute = jax.jit(lambda *operands: elastic(*operands, tables))
        return self._programs.get(name, list(mesh.devices.flat), lambda: compute.lower(*operands))

    def _choose(self, logits: jax.Array, *operands: Any, kind: sampling.Kind) -> sampling.Sampled:
        """``sampling.choose`` from a program that every rank can load: JAX's own cache knows it by the device."""
        name = f"choose-{kind.name.lower()}-{len(logits)}"

        def lower() -> jax.stages.Lowered:
            return sampling.choose.lower(logits, *operands, kind=kind)

        return self._programs.get(name, [self._first], lower)(logits, *operands)

    def _commit(self, new: dict[str, jax.Array], batch: Batch) -> None:
        program = make_program(self.setup.config, None)
        size = len(batch.tokens)
        operands = self._entries, new, batch
        commit = self._programs.get(
            f"commit-{size}", [self._home], lambda: program.commit.lower(*operands)
        )
        self._entries = commit(*operands)

    def compile(self, message: Compile) -> None:
        """Has everything ready for steps of a size, for as many ranks as it is told."""
        others = [r for r in sorted(self._devices) if r != self.number]
        (batch,) = self._packing.idle(message.size)
        for number in message.numbers:
            mesh = self._mesh_of(tuple((r, 0) for r in (self.number, *others[: number - 1])))
            self._program(message.size, mesh, self._operands(mesh, batch, abstract=True))
        if not message.local:
            return
        # On the device by decree, as a step's are: JAX compiles anew for arrays that could as well be elsewhere.
        rows, vocab = self.setup.sizes.rows(message.size), self.setup.config.vocab_size
        logits = jax.device_put(np.zeros((rows, vocab), np.float32), self._first)
        sampling.warm_up(logits, self._choose)
        nothing = {
            name: np.zeros((len(rows), message.size, 1, rows.shape[-1]), rows.dtype)
            for name, rows in self._entries.items()
        }
        self._commit(jax.device_put(nothing, self._home), batch)
        self.shard.warm_up()

    def warm_up(self) -> None:
        """Everything but the programs of steps, which the others have left behind."""
        for size in self._packing.buckets:
            self.compile(Compile(-1, size, (), True))

    # -- steps -------------------------------------------------------------------------------------

    def step(self, message: Step) -> StepValue:
        """Computes, samples this rank's rows, commits its cache rows."""
        self._faults.at("step")
        result = self._compute(message)
        self._faults.at("computed")
        logits = result.logits
        if self._home != self._first:
            logits = jax.device_put(logits, self._first)
        sampled = sampling.finish(logits, result.best, message.inputs, self._choose)
        valid = message.batch.positions >= 0
        finite = bool(np.isfinite(np.asarray(result.hidden)[valid]).all())
        if finite or message.trust:
            self._commit(result.entries, message.batch)
        self._faults.at("committed")
        return StepValue(sampled, np.asarray(result.load), finite)

    def _compute(self, message: Step) -> StepResult:
        """This rank's part of what all of them compute together."""
        operands = self._operands(self._mesh, message.batch)
        program = self._program(len(message.batch.tokens), self._mesh, operands)
        result = with_others(self._mesh, lambda: jax.block_until_ready(program(*operands)))
        return jax.tree.map(lambda x: x.addressable_shards[0].data, result)


def loader(setup: Setup, programs: Executables, device: jax.Device) -> Callable[[], Params]:
    """Reads the whole model; random weights are drawn on ``device``."""
    from jaxmoe import checkpoint
    from jaxmoe.params import init_params

    weights, dtype = setup.weights, jnp.dtype(setup.weights.dtype)

    def draw(key: jax.Array) -> Params:
        return init_params(setup.config, jax.random.wrap_key_data(key), dtype=dtype)

    def drawn() -> Params:
        key = jax.device_put(key_data(weights.seed), device)
        return programs.get("draw", [device], lambda: jax.jit(draw).lower(key))(key)

    if weights.path is None:
        return drawn
    return lambda: checkpoint.load(weights.path, dtype, mtp=False)[0]


class RankWorker(Worker):
    """The process of a ``Rank``."""

    def _answer(self, rank: Any, message: Any) -> tuple[str, Any]:
        """Does what a message asks for; the kind of the answer and its value."""
        if isinstance(message, Step):
            return "done", rank.step(message)
        if isinstance(message, Fetch):
            return "fetched", rank.fetch(message)
        if isinstance(message, Install):
            return "installed", rank.install(message)
        if isinstance(message, Verify):
            return "verified", rank.verify(message)
        return "compiled", rank.compile(message)


def _keep_compilations(folder: str) -> None:
    """What JAX compiles by itself, sampling above all, is compiled by the first rank and read by the others."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def main() -> None:
    """``python -m jaxmoe.elastic.cluster.rank``, with arguments as of ``call_controller``."""
    connection, key, number, incarnation, setup = call_controller()
    _keep_compilations(str(pathlib.Path(setup.programs) / "xla"))
    worker = RankWorker(connection, number, incarnation)
    worker.begin(setup)
    rank = Rank(setup, number, key, worker.faults)
    if setup.initial is None:
        rank.warm_up()  # alone: nobody waits for a rank that returns
    listener = Listener(f"{setup.folder}/weights-{number}-{incarnation}", authkey=key)
    threading.Thread(target=serve, args=(listener, rank.shard.give), daemon=True).start()
    worker.reply(
        "ready", -1, value=ReadyValue(listener.address, rank.shard.canaries, rank.shard.trunk)
    )
    worker.serve(rank)


if __name__ == "__main__":
    main()
