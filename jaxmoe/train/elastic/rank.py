"""A rank of a training run: one process, one device, a part of the state on it, and copies of parts in host memory.

It does what the controller says, one thing after another; other threads listen, give parts of the state to other processes, and
fetch the neighbour's while training goes on.
"""

import contextlib
import functools
import logging
import os
import pathlib
import signal
import threading
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmoe.elastic.cluster.faults import Faults
from jaxmoe.elastic.cluster.rank import devices_by_rank
from jaxmoe.elastic.cluster.worker import CollectiveFailed, Worker, call_controller, with_others
from jaxmoe.elastic.executables import Executables
from jaxmoe.sharding import make_mesh
from jaxmoe.train.data import Batch, Loader, load_corpus
from jaxmoe.train.elastic import parts, peers
from jaxmoe.train.elastic.messages import (
    Compile,
    Install,
    InstallValue,
    Prepare,
    Setup,
    Snapshot,
    Step,
    StepValue,
    name_of,
)
from jaxmoe.train.loop import evaluate, scored_nats
from jaxmoe.train.step import (
    TrainState,
    abstract_state,
    batch_sharding,
    padded_rows,
    read_batch,
    state_shardings,
    train_step,
)
from pallas_kernels import native

logger = logging.getLogger(__name__)

_BEHIND = 19  # the lowest priority


class Rank:
    """The state of the process and what it does with each message."""

    def __init__(self, setup: Setup, number: int, name: str, faults: Faults):
        self.setup, self._number, self._faults = setup, number, faults
        native.available()  # registers the kernels, which a program that is loaded calls by name
        self._corpus = load_corpus(setup.data, setup.tokens)
        if self._corpus.fingerprint != setup.fingerprint:
            raise ValueError("the text has changed since the run began; restore it.")
        run = setup.train_config
        self._loader = Loader(self._corpus, run.seed, run.batch_size, run.seq_len)
        self._devices = devices_by_rank()
        self._programs = Executables(pathlib.Path(setup.programs))
        self._abstract = abstract_state(setup.config, setup.train_config)
        self._axes = parts.expert_axes(setup.config, setup.train_config)
        self._experts = setup.config.n_routed_experts
        self._store, self._pull = peers.Store(), threading.Thread()
        self._epoch = self._protected = -1
        self._lock = threading.Lock()  # over the two and the store
        self._state: Any = None
        peers.serve(self._store, setup.folder, name, setup.key)
        self._mesh: Mesh | None = None
        self._next: list[Mesh] = []
        self._load([self._mesh_of(order) for order in setup.prepare])

    # -- programs ----------------------------------------------------------------------------------

    def _mesh_of(self, order: tuple[tuple[int, int], ...]) -> Mesh:
        shape = parts.mesh_shape(len(order), self._experts)
        devices = [self._devices[rank][index] for rank, index in order]
        return make_mesh(*shape, devices=devices)

    def _step_program(self, mesh: Mesh) -> jax.stages.Compiled:
        config, run = self.setup.config, self.setup.train_config

        def lower() -> jax.stages.Lowered:
            rows = _rows(mesh, run.batch_size, run.seq_len + 2, run.accumulate)
            return train_step.lower(self._abstract_on(mesh), rows, config, run, mesh)

        return self._programs.get("train", list(mesh.devices.flat), lower)

    def _score_program(self, mesh: Mesh) -> jax.stages.Compiled:
        config, run = self.setup.config, self.setup.train_config

        def lower() -> jax.stages.Lowered:
            rows = _rows(mesh, run.batch_size, run.seq_len + 1)
            params, attention = self._abstract_on(mesh).params, run.held_out_attention
            return scored_nats.lower(params, rows, config, mesh, attention)

        return self._programs.get("score", list(mesh.devices.flat), lower)

    def _abstract_on(self, mesh: Mesh) -> TrainState:
        shardings = state_shardings(self.setup.config, self.setup.train_config, mesh)
        return jax.tree.map(lambda x, s: x.update(sharding=s), self._abstract, shardings)

    def compile(self, message: Compile) -> int:
        """Has the programs for some numbers of ranks ready; returns how many were compiled."""
        before = self._programs.counters.compiled
        others = [rank for rank in sorted(self._devices) if rank != self._number]
        for number in message.numbers:
            mesh = self._mesh_of(tuple((rank, 0) for rank in (self._number, *others[: number - 1])))
            self._step_program(mesh)
            self._score_program(mesh)
        return self._programs.counters.compiled - before

    def prepare(self, message: Prepare) -> None:
        """Loads the programs of meshes that may come next, in a thread that gives way to training."""
        meshes = [self._mesh_of(order) for order in message.orders]
        self._programs.forget(*(list(mesh.devices.flat) for mesh in (self._mesh, *meshes)))
        self._next = meshes

        def work() -> None:
            with contextlib.suppress(OSError):  # where a thread cannot be made to give way
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _BEHIND)
            self._load(meshes)

        threading.Thread(target=work, daemon=True).start()

    def _load(self, meshes: list[Mesh]) -> None:
        for mesh in meshes:
            for program in (self._step_program, self._score_program):
                if self._next and self._next is not meshes:
                    return  # others may come next now
                program(mesh)

    # -- epochs ------------------------------------------------------------------------------------

    def install(self, message: Install) -> InstallValue:
        """Gets what it lacks of a state, and puts its part of it on its device, in a new mesh."""
        self._faults.at("install")
        seconds, began = {}, time.perf_counter()
        self._state = None
        with (
            self._lock
        ):  # what a fetch that is under way brings belongs to another course of the run
            self._epoch, self._protected, self._pull = message.epoch, -1, threading.Thread()
            self._store.keep(message.step)
        # First, so that whoever holds an expert of a step holds these too.
        if message.sources.common is not None:
            self._fetch(message.sources.common, message.step, (), common=True)
        for source, experts in message.sources.experts.items():
            self._fetch(source, message.step, experts, common=False)
        seconds["move"] = time.perf_counter() - began
        self._mesh = self._mesh_of(message.order)
        self._place(message)
        seconds["load"] = time.perf_counter() - began - seconds["move"]
        compiled = self._programs.counters.compiled
        self._step_program(self._mesh), self._score_program(self._mesh)
        seconds["executable"] = time.perf_counter() - began - seconds["move"] - seconds["load"]
        self._protected = message.step
        return InstallValue(self._programs.counters.compiled - compiled, seconds)

    def _fetch(self, source: str, step: int, experts: tuple[int, ...], *, common: bool) -> None:
        try:
            part = peers.fetch(
                self.setup.folder, source, self.setup.key, step, experts, common=common
            )
        except OSError as error:  # the other's story: it dies, or has died
            raise CollectiveFailed(str(error)) from error
        self._store.put(step, part)

    def _place(self, message: Install) -> None:
        """The state on the mesh, from the parts in host memory."""
        ranks = [rank for rank, _ in message.order]
        position = ranks.index(self._number)
        shape = parts.mesh_shape(len(ranks), self._experts)
        self._own = parts.own_experts(position, shape, self._experts)
        beside = parts.neighbour(position, shape)
        self._beside = None
        if beside is not None:
            self._beside = message.names[beside], parts.own_experts(beside, shape, self._experts)
        device = self._mesh.devices.flat[position]
        local = parts.put_together(self._store.get(message.step), self._axes, self._own)
        whole, structure = jax.tree.flatten(self._abstract)

        def globalise(local: np.ndarray, whole: Any, axis: int | None) -> jax.Array:
            spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, parts.AXIS)
            sharding = NamedSharding(self._mesh, spec)
            arrays = [jax.device_put(local, device)]
            return jax.make_array_from_single_device_arrays(whole.shape, sharding, arrays)

        leaves = map(globalise, local, whole, self._axes)
        self._state = jax.tree.unflatten(structure, leaves)

    # -- steps -------------------------------------------------------------------------------------

    def step(self, message: Step) -> StepValue:
        """Takes a step, and scores held-out text if asked to."""
        self._faults.at("step")
        self._store.keep(*(s for s in self._store.inventory() if s >= message.safe))
        held_out = None
        run = self.setup.train_config
        rows = read_batch(
            self._mesh,
            functools.partial(self._loader, message.number),
            run.batch_size,
            run.accumulate,
        )
        program = self._step_program(self._mesh)
        state, self._state = self._state, None  # donated
        self._state, metrics = with_others(
            self._mesh,
            lambda: jax.block_until_ready(program(state, rows)),
        )
        self._faults.at("computed")
        began = time.perf_counter()
        if message.evaluate is not None:
            final = message.evaluate == "final"
            held_out = with_others(self._mesh, lambda: self._evaluate(final=final))
        scoring_s = time.perf_counter() - began
        return StepValue(jax.device_get(metrics), held_out, scoring_s, self._protected)

    def _evaluate(self, *, final: bool) -> dict[str, float]:
        run = self.setup.train_config
        return evaluate(
            self._state.params,
            self.setup.config,
            self._corpus,
            max_bytes=run.eval_bytes,
            seq_len=run.seq_len,
            batch_size=run.batch_size,
            probe_bytes=None if final else run.probe_bytes,
            mesh=self._mesh,
            score=self._score_program(self._mesh),
        )

    # -- snapshots ---------------------------------------------------------------------------------

    def snapshot(self, message: Snapshot) -> None:
        """Copies its part of the state to host memory; the neighbour's is fetched while training goes on."""
        if self._pull.is_alive():
            self._pull.join()  # one at a time bounds the memory to three snapshots
        leaves = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(self._state)]
        self._store.put(message.number, parts.take_apart(leaves, self._axes, self._own))
        self._faults.at("committed")
        if self._beside is None:
            self._protected = message.number
            return
        self._pull = threading.Thread(
            target=self._protect,
            args=(self._epoch, message.number, *self._beside),
            daemon=True,
        )
        self._pull.start()

    def _protect(self, epoch: int, step: int, name: str, experts: range) -> None:
        try:
            part = peers.fetch(self.setup.folder, name, self.setup.key, step, experts, common=False)
        except OSError as error:
            logger.info("no copy of the neighbour's part: %s", error)
            return
        with self._lock:
            if epoch == self._epoch:
                self._store.put(step, part)
                self._protected = step

    def inventory(self) -> dict[int, frozenset[int]]:
        """The experts it holds in host memory, by step."""
        return self._store.inventory()


def _rows(mesh: Mesh, rows: int, width: int, accumulate: int = 1) -> Batch:
    shape, sharding = (padded_rows(mesh, rows, accumulate), width), batch_sharding(mesh)
    dtypes = Batch(np.int32, np.int32, np.float32)
    return Batch(*(jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for dtype in dtypes))


class TrainWorker(Worker):
    """The two threads, with the messages of training."""

    def _left(self, rank: Rank) -> dict[int, frozenset[int]]:
        return rank.inventory()

    def _answer(self, rank: Rank, message: Any) -> tuple[str, Any]:
        if isinstance(message, Step):
            return "done", rank.step(message)
        if isinstance(message, Snapshot):
            return "copied", rank.snapshot(message)
        if isinstance(message, Install):
            return "installed", rank.install(message)
        if isinstance(message, Prepare):
            return "preparing", rank.prepare(message)
        return "compiled", rank.compile(message)


def main() -> None:
    """``python -m jaxmoe.train.elastic.rank``, with arguments as of ``cluster.worker.call_controller``."""
    # A terminal's Ctrl-C reaches all processes: the controller saves, and its end is the end of its ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # gloo writes about every connection
    connection, _, number, incarnation, setup = call_controller()
    worker = TrainWorker(connection, number, incarnation)
    worker.begin(setup)
    rank = Rank(setup, number, name_of(number, incarnation), worker.faults)
    worker.reply("ready", -1)
    worker.serve(rank)


if __name__ == "__main__":
    main()
