"""What the controller and the ranks say to each other.

Every message to a rank belongs to an epoch, and every answer names its rank, its incarnation and that epoch: the controller
drops and counts answers of others (``membership.Fence``).
"""

import dataclasses
from typing import Any

import numpy as np

from jaxmoe.config import ModelConfig
from jaxmoe.engine.runner import Sizes
from jaxmoe.engine.sampling import Inputs, Sampled
from jaxmoe.engine.step import Batch


@dataclasses.dataclass(frozen=True)
class Weights:
    """Where a rank gets the model from.

    Attributes:
      path: a checkpoint, as ``checkpoint.locate`` gives it: a rank that returns must load what the others did. None for random
        weights.
      seed: of random weights.
      dtype: of the parameters.
    """

    path: str | None
    seed: int = 0
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Setup:
    """The first message to a rank.

    Attributes:
      coordinator: address of the coordination service.
      capacity: how many ranks there can be.
      devices: of each process, of which it uses one at a time (``orders``).
      config, sizes, weights: the model and the shapes.
      slots: of a layer with experts, on one rank.
      initial: [layers, capacity * slots] experts to begin with, -1 for none; None for a rank that joins later.
      backup: [capacity, layers, experts] bool, the experts that each rank's host memory keeps.
      folder: for sockets, of one user.
      programs: folder of compiled programs that all ranks of the machine share.
      frozen: whether the first epoch is the last, its tables being constants of the programs.
    """

    coordinator: str
    capacity: int
    devices: int
    config: ModelConfig
    sizes: Sizes
    weights: Weights
    slots: int
    initial: np.ndarray | None
    backup: np.ndarray
    folder: str
    programs: str
    frozen: bool


@dataclasses.dataclass(frozen=True)
class Fill:
    """An expert to be put into one of a rank's slots.

    Attributes:
      layer: of those with experts.
      expert: which.
      slot: of the rank, from 0.
      source: kind of its source, one of ``inventory.SOURCES``.
      address: of the rank that has it; None if that is this one.
      source_slot: of the rank that has it on its device.
      canary: the checksum that its weights must have.
    """

    layer: int
    expert: int
    slot: int
    source: str
    address: str | None
    source_slot: int | None
    canary: int


@dataclasses.dataclass(frozen=True)
class Prepare:
    """A mesh that may come: its programs are loaded while others run. Nothing is answered.

    Attributes:
      epoch: in which it was thought of.
      order: as in ``Install``.
      sizes: of steps.
    """

    epoch: int
    order: tuple[tuple[int, int], ...]
    sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Fetch:
    """Get these experts' weights, check them, and keep them until they are installed; then ``prepare``, if there is something."""

    epoch: int
    fills: tuple[Fill, ...]
    prepare: Prepare | None = None


@dataclasses.dataclass(frozen=True)
class Install:
    """A new epoch: who takes part, in which order, and what changes in the rank's slots first.

    Attributes:
      epoch: its number.
      order: (rank, its device) in the order of the mesh.
      experts: [layers, ranks of the mesh * slots] the expert in each slot, -1 for none, in the order of the mesh.
      fills: the rank's own, all fetched before.
      sizes: of steps whose programs shall be ready at once.
    """

    epoch: int
    order: tuple[tuple[int, int], ...]
    experts: np.ndarray
    fills: tuple[Fill, ...] = ()
    sizes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Compile:
    """What a step of ``size`` tokens per rank takes is to be ready.

    Attributes:
      numbers: of ranks, for each of which there shall be a program.
      local: whether also what a rank does on its own, sampling above all, shall be ready.
    """

    epoch: int
    size: int
    numbers: tuple[int, ...]
    local: bool


@dataclasses.dataclass(frozen=True)
class Step:
    """A step to compute; its rows are committed if its results are finite numbers, or if they are to be trusted anyway."""

    epoch: int
    number: int
    batch: Batch
    inputs: Inputs | None
    trust: bool = False


@dataclasses.dataclass(frozen=True)
class Abort:
    """Give up what is being computed; nothing of an older epoch is to be begun."""

    epoch: int


@dataclasses.dataclass(frozen=True)
class Verify:
    """Which tables hold, and which slots' weights are not what they should be: ``canaries`` [layers, slots], -1 for none."""

    epoch: int
    canaries: np.ndarray


@dataclasses.dataclass(frozen=True)
class Ping:
    """Are you there?"""

    epoch: int
    number: int


@dataclasses.dataclass(frozen=True)
class Stop:
    """End the process."""

    epoch: int = -1


POINTS = ("now", "step", "computed", "committed", "fetch", "install")
ACTIONS = (
    "kill",
    "stop",
    "sleep",
    "raise",
    "nan",
    "flip",
    "flip_host",
    "cut",
    "mute",
    "replay",
)


@dataclasses.dataclass(frozen=True)
class Fault:
    """Something that goes wrong in a rank, once: for experiments.

    Attributes:
      point: "now"; "step", with the collectives under way; "computed", before the rows are committed; "committed", before the
        answer; "fetch" of weights; "install" of an epoch.
      action: "kill" or "stop" the process; "sleep"; "raise" an error; weights of a slot become "nan", or one bit of them does
        "flip"; "flip_host", of a copy in host memory; "cut" the collectives' connections; "mute", so that answers are lost;
        "replay" the last answer.
      seconds: of sleeping or silence; for kill, stop and cut at "step": after its beginning.
      index: of the slot or of the host's copy, counted over all layers.
    """

    point: str
    action: str
    seconds: float = 0.0
    index: int = 0

    def __post_init__(self):
        for name, value, known in (
            ("point", self.point, POINTS),
            ("action", self.action, ACTIONS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}.")
        if not 0 <= self.seconds < float("inf"):
            raise ValueError(f"seconds must be >= 0; got {self.seconds}.")
        if self.index < 0:
            raise ValueError(f"index must be >= 0; got {self.index}.")


@dataclasses.dataclass(frozen=True)
class Reply:
    """A rank's answer.

    Attributes:
      kind: "ready", "fetched", "installed", "compiled", "done", "verified", "failed", "aborted" or "pong".
      rank, incarnation, epoch: whose and of when.
      number: of the step or ping.
      value: one of the classes below, by kind; with "pong" whether the rank has nothing to do.
      compiles: programs that XLA has compiled in this process so far.
    """

    kind: str
    rank: int
    incarnation: int
    epoch: int
    number: int = 0
    value: Any = None
    compiles: int = 0


@dataclasses.dataclass(frozen=True)
class ReadyValue:
    """With "ready": the address for other ranks, [layers, experts] checksums of experts, and that of all other weights."""

    address: str
    canaries: np.ndarray
    trunk: int


@dataclasses.dataclass(frozen=True)
class FetchValue:
    """With "fetched": which fills could not be had whole, by their index; seconds by kind of source."""

    failed: tuple[int, ...]
    seconds: dict[str, float]


@dataclasses.dataclass(frozen=True)
class InstallValue:
    """With "installed": a hash of the tables, and of the time seconds for loading programs ("executable")."""

    digest: str
    seconds: dict[str, float]


@dataclasses.dataclass(frozen=True)
class StepValue:
    """Of a rank's step: what its rows have sampled, [layers, E] tokens per expert of its own tokens, whether all is finite."""

    sampled: Sampled | None
    load: np.ndarray
    finite: bool


@dataclasses.dataclass(frozen=True)
class VerifyValue:
    """With "verified": a hash of the tables, and the (layer, slot) whose weights fail their checksum."""

    digest: str
    wrong: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class FailureValue:
    """With "failed": the error, and whether it is this rank's own, not that of a collective with others."""

    error: str
    own: bool
