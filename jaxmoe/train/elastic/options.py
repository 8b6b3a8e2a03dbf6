"""How a training run is kept going while its ranks die and return."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class ElasticOptions:
    """Ranks and limits of an elastic training run."""

    ranks: int = 4
    """Processes that share the batch and the experts."""
    snapshot_every: int = 10
    """Steps between copies of the state in the ranks' host memory: the most that a loss can cost."""
    respawn: bool = True
    """Whether a rank that has died is started again."""
    silence_s: float = 5.0
    """After so long without an answer to a ping a rank counts as dead."""
    deadline_s: float = 300.0
    """After so long without the result of a step, or of each batch of an evaluation, a rank counts as dead though it answers."""
    start_s: float = 600.0
    """How long processes may take to start, and programs to compile."""
    devices: int = 4
    """CPU devices of each process, which uses one at a time: they multiply the meshes that are possible."""
    programs: str | None = None
    """Folder of compiled programs, kept between runs; whoever can write there can run code in the ranks. Default a new one."""

    def __post_init__(self):
        for name in ("ranks", "snapshot_every", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1; got {getattr(self, name)}.")
        for name in ("silence_s", "deadline_s", "start_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} must be > 0 seconds and finite; got {getattr(self, name)}."
                )
