"""Which devices a run trains on: the mesh's axes, and the processes that share it."""

import atexit
import contextlib
import dataclasses
import math
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from jaxmoe.sharding import make_mesh
from jaxmoe.train.processes import leave, status_of
from jaxmoe.train.signals import Stopped


@dataclasses.dataclass(frozen=True)
class DeviceOptions:
    """The mesh of a run, and the process's place among several."""

    data_parallel: int = 1
    """Devices over which sequences are split, with all weights each."""
    expert_parallel: int = 1
    """Devices over which experts are split, and sequences too."""
    tensor_parallel: int = 1
    """Devices over which heads, hidden units and the vocabulary are split."""
    coordinator_address: str | None = None
    """HOST:PORT of process 0, where several processes meet; "auto" finds it out from the cluster (Slurm, Kubernetes, TPU)."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which of them this is, from 0."""

    def __post_init__(self):
        for name in ("data_parallel", "expert_parallel", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1; got {getattr(self, name)}.")
        numbers, address = (self.num_processes, self.process_id), self.coordinator_address
        if address in (None, "auto") and numbers != (None, None):
            raise ValueError(
                f"num_processes and process_id ({numbers[0]}, {numbers[1]}) need coordinator_address as HOST:PORT; got {address}."
            )
        if address in (None, "auto"):
            return
        if None in numbers or not 0 <= numbers[1] < numbers[0]:
            raise ValueError(
                f"coordinator_address {address} needs num_processes and a process_id from 0 to one less; got {numbers[0]} and {numbers[1]}."
            )

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Inside, this process belongs to the run's, if there are several; enter before JAX's first computation.

        After an exception the process ends without waiting for the others, which may be waiting for it; after one that all
        processes get together (``signals.Stopped``) it waits.
        """
        # SIGTERM is ours (``signals``). JAX's service catches it too, and where nobody asks the service it is lost.
        jax.config.update("jax_enable_preemption_service", False)
        if self.coordinator_address == "auto":
            jax.distributed.initialize()
        elif self.coordinator_address is not None:
            jax.distributed.initialize(
                self.coordinator_address, self.num_processes, self.process_id
            )
        try:
            yield
        except Stopped:
            raise
        except BaseException as error:
            if jax.distributed.is_initialized():
                atexit.register(leave, status_of(error))  # runs before what JAX has registered
            raise

    def mesh(self) -> Mesh | None:
        """The mesh over the first devices, all of them with several processes; None for one device.

        Raises:
          ValueError: if there are too few devices, or with several processes other than all.
        """
        sizes = (self.data_parallel, self.expert_parallel, self.tensor_parallel)
        if math.prod(sizes) == 1 and jax.process_count() == 1:
            return None
        devices = jax.devices()
        if jax.process_count() == 1:
            devices = devices[: math.prod(sizes)]
        return make_mesh(*sizes, devices=devices)
