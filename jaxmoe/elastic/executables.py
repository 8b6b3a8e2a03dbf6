"""Compiled programs that outlive a change of devices: compiled once for a number of ranks, loaded for any of them.

XLA compiles an SPMD program for n partitions; which devices these are is said when it is loaded. JAX's public
``serialize_executable`` only loads onto the devices that it was compiled for; this module, the only one that uses the private
parts, maps the device ids on the way. Where that fails, on a JAX that has changed, the program is compiled and counted as
such: recovery is slower then, not wrong.
"""

import contextlib
import dataclasses
import io
import logging
import os
import pathlib
import pickle
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Portable:
    """A compiled program as bytes.

    Attributes:
      payload: JAX's own serialisation.
      devices: ids of the devices it was compiled for, in mesh order.
      arguments, results: trees of placeholders, from which the structures are read: those cannot be pickled.
    """

    payload: bytes
    devices: tuple[int, ...]
    arguments: Any
    results: Any


def export(compiled: jax.stages.Compiled, devices: Sequence[jax.Device]) -> Portable:
    """A compiled program as bytes; ``devices`` in the order of its mesh."""
    payload, arguments, results = serialize_executable.serialize(compiled)

    def skeleton(structure: Any) -> Any:
        return jax.tree.unflatten(structure, range(structure.num_leaves))

    ids = tuple(device.id for device in devices)
    return Portable(payload, ids, skeleton(arguments), skeleton(results))


class _Unpickler(pickle.Unpickler):
    def __init__(self, payload: bytes, old: Sequence[int], new: Sequence[jax.Device]):
        super().__init__(io.BytesIO(payload))
        self._new = tuple(new)
        self._by_id = dict(zip(old, self._new, strict=True))
        self._client = new[0].client

    def persistent_load(self, pid: tuple) -> Any:
        if pid[0] == "device":
            return self._by_id[pid[1]]
        if pid[0] == "client":
            return self._client
        if pid[0] == "exec":
            from jax._src.lib import xla_client  # here, so that its absence is a fallback too

            return self._client.deserialize_executable(
                pid[1],
                executable_devices=xla_client.DeviceList(self._new),
                compile_options=_options([device.id for device in self._new]),
            )
        raise pickle.UnpicklingError(f"unknown reference {pid[0]!r}")


def _options(ids: list[int]) -> Any:
    from jax._src.lib import xla_client

    options = xla_client.CompileOptions()
    build = options.executable_build_options
    options.num_replicas = build.num_replicas = 1
    options.num_partitions = build.num_partitions = len(ids)
    build.use_spmd_partitioning = True
    build.device_assignment = xla_client.DeviceAssignment.create(np.array([ids]))
    return options


def load(portable: Portable, devices: Sequence[jax.Device]) -> jax.stages.Compiled:
    """The program for ``devices``, in mesh order, of which there must be as many as it was compiled for. Milliseconds.

    Raises:
      ValueError: for another number of devices.
    """
    if len(devices) != len(portable.devices):
        raise ValueError(
            f"a program for {len(portable.devices)} devices cannot be loaded onto {len(devices)}; compile it for so many."
        )
    program, info, no_kwargs = _Unpickler(portable.payload, portable.devices, devices).load()
    arguments = jax.tree.structure(portable.arguments).unflatten(info)
    results = jax.tree.structure(portable.results)
    return jax.stages.Compiled(program.load(), [], arguments, results, no_kwargs=no_kwargs)


_cache_lock = threading.Lock()


@contextlib.contextmanager
def compilation_cache_off() -> Iterator[None]:
    """Compiles in truth: what XLA's CPU client wrote, read, and is asked to write again lacks its functions.

    The switch is the process's: what other threads compile meanwhile isn't kept either.
    """
    if jax.config.jax_compilation_cache_dir is None:
        yield
        return
    with _cache_lock:
        if not jax.config.jax_enable_compilation_cache:
            yield
            return
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # whether there is one is looked up once
        try:
            yield
        finally:
            jax.config.update("jax_enable_compilation_cache", True)
            compilation_cache.reset_cache()


@dataclasses.dataclass
class Counters:
    """How programs came about: compiled here, loaded for new devices, found ready; and why loading had to be given up."""

    compiled: int = 0
    loaded: int = 0
    ready: int = 0
    fallbacks: list[str] = dataclasses.field(default_factory=list)


class Executables:
    """Programs by name and number of devices.

    Args:
      folder: where portable programs are kept, shared by the processes of one machine; None for memory only. Whoever can
        write there can run code in this process.
    """

    def __init__(self, folder: pathlib.Path | None = None):
        self._folder = folder
        self._portable: dict[tuple[Hashable, int], Portable] = {}
        self._ready: dict[tuple[Hashable, tuple[int, ...]], jax.stages.Compiled] = {}
        self.counters = Counters()
        self._lock = threading.Lock()

    def get(
        self,
        name: str,
        devices: Sequence[jax.Device],
        lower: Callable[[], jax.stages.Lowered],
    ) -> jax.stages.Compiled:
        """The program ``name`` for ``devices``.

        Args:
          name: of the program, and of everything that it was compiled from.
          devices: in mesh order.
          lower: called only if the program exists for no set of so many devices.
        """
        ids = tuple(device.id for device in devices)
        ready = self._ready.get((name, ids))
        if ready is None:
            with self._lock:  # whoever comes second finds it
                ready = self._ready.get((name, ids)) or self._make(name, ids, devices, lower)
        else:
            self.counters.ready += 1
        return ready

    def _make(
        self,
        name: str,
        ids: tuple[int, ...],
        devices: Sequence[jax.Device],
        lower: Callable[[], jax.stages.Lowered],
    ) -> jax.stages.Compiled:
        portable = self._find(name, len(devices))
        program = None
        if portable is not None:
            try:
                program = load(portable, devices)
                self.counters.loaded += 1
            except Exception as error:  # private API: whatever it raises, there is the public way
                self._fall_back(f"compiled {name} for want of loading it", error)
        if program is None:
            lowered = lower()
            with compilation_cache_off():
                program = lowered.compile()
            self.counters.compiled += 1
            if portable is None:
                try:
                    self._keep(name, export(program, devices))
                except jax.errors.JaxRuntimeError as error:
                    # XLA writes no sort that has run, and this process may have had the program already.
                    self._fall_back(f"{name} is for this process only", error)
        self._ready[name, ids] = program
        return program

    def _fall_back(self, what: str, error: Exception) -> None:
        self.counters.fallbacks.append(f"{what}: {type(error).__name__}: {error}")
        logger.warning("%s", self.counters.fallbacks[-1])

    def known(self, name: str, number: int) -> bool:
        """Whether a program for so many devices need not be compiled."""
        return self._find(name, number) is not None

    def forget(self, *keep: Sequence[jax.Device]) -> None:
        """Unloads programs for all but these sets of devices."""
        kept = [tuple(device.id for device in devices) for devices in keep]
        self._ready = {key: program for key, program in dict(self._ready).items() if key[1] in kept}

    def _path(self, name: str, number: int) -> pathlib.Path | None:
        return None if self._folder is None else self._folder / f"{name}.{number}"

    def _find(self, name: str, number: int) -> Portable | None:
        if (name, number) not in self._portable:
            path = self._path(name, number)
            if path is None or not path.exists():
                return None
            try:
                self._portable[name, number] = pickle.loads(path.read_bytes())
            except Exception as error:  # cut short, or of another time: it is compiled again
                self._fall_back(f"compiled {path.name} for want of reading it", error)
                return None
        return self._portable[name, number]

    def _keep(self, name: str, portable: Portable) -> None:
        number = len(portable.devices)
        self._portable[name, number] = portable
        path = self._path(name, number)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.{os.getpid()}-{id(portable)}.part")
            part.write_bytes(pickle.dumps(portable))
            part.replace(path)  # never half a file under the name
