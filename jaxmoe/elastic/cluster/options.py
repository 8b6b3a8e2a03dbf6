"""Sizes and limits of a cluster."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class ClusterOptions:
    """Sizes and limits of a cluster of processes."""

    ranks: int = 4
    """Processes that share the requests and the experts."""
    redundant_experts: int | None = None
    """Copies beyond the first, of a layer over all ranks; default: one of each expert."""
    spares: int = 0
    """Further processes, loaded and warm, that take the place of lost ones."""
    host_backup: bool = False
    """Whether ranks keep copies of experts in host memory, each on two hosts: faster than the checkpoint."""
    respawn: bool = True
    """Whether a rank that has died is started again."""
    respawn_delay_s: float = 0.0
    """How long after its death, whether the others can serve or not: starting takes time from them, if they share processors."""
    silence_s: float = 2.0
    """After so long without an answer to a ping a rank counts as dead."""
    deadline_s: float = 60.0
    """After so long without a step's result a rank counts as dead though it answers."""
    start_s: float = 300.0
    """How long processes may take to start, and programs to compile."""
    chunk_moves: int = 8
    """Experts that may move at a time while copies are spread evenly in the background."""
    devices: int = 4
    """CPU devices of each process, which uses one at a time: they multiply the meshes that are possible (``orders``)."""
    frozen: bool = False
    """Whether tables are constants of the programs, so that ranks cannot change: what elasticity costs is measured against it."""
    programs: str | None = None
    """Folder of compiled programs, kept between runs; whoever can write there can run code in the ranks. Default: a new one, and
    of `jaxmoe serve` one of the user (docs/serving.md)."""

    def __post_init__(self):
        least = {"ranks": 1, "spares": 0, "chunk_moves": 2, "devices": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be >= {value}; got {getattr(self, name)}.")
        if self.redundant_experts is not None and self.redundant_experts < 0:
            raise ValueError(f"redundant_experts must be >= 0; got {self.redundant_experts}.")
        for name in ("silence_s", "deadline_s", "start_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} must be > 0 seconds and finite; got {getattr(self, name)}."
                )
        if not 0 <= self.respawn_delay_s < math.inf:
            raise ValueError(
                f"respawn_delay_s must be >= 0 seconds and finite; got {self.respawn_delay_s}."
            )
