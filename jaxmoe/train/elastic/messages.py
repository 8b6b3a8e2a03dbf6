"""What the controller of a training run says to its ranks, beside what every controller says (``elastic.cluster.messages``)."""

import dataclasses
from typing import Any

from jaxmoe.config import ModelConfig
from jaxmoe.elastic.cluster.orders import Order
from jaxmoe.train.config import TrainConfig
from jaxmoe.train.data import DataOptions
from jaxmoe.train.elastic.parts import Sources


def name_of(rank: int, incarnation: int) -> str:
    """Of a rank's process, for its peers."""
    return f"{rank}-{incarnation}"


@dataclasses.dataclass(frozen=True)
class Setup:
    """The first message to a rank.

    Attributes:
      coordinator: address of the coordination service.
      capacity: how many ranks there can be.
      devices: of each process, of which it uses one at a time (``elastic.cluster.orders``).
      config, train_config: the run.
      data, tokens: what to train on, and the folder of its tokens, as of ``load_corpus``.
      fingerprint: that the text must have.
      folder, key: for sockets, of one user, and what proves that a process may ask.
      programs: folder of compiled programs that all ranks share.
      prepare: meshes whose programs this rank shall have loaded before it says that it is ready.
    """

    coordinator: str
    capacity: int
    devices: int
    config: ModelConfig
    train_config: TrainConfig
    data: DataOptions
    tokens: str
    fingerprint: dict[str, Any]
    folder: str
    key: bytes
    programs: str
    prepare: tuple[Order, ...] = ()


@dataclasses.dataclass(frozen=True)
class Compile:
    """The programs for these numbers of ranks are to be ready."""

    epoch: int
    numbers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Install:
    """A new epoch: who takes part, and the state to go on with.

    Attributes:
      epoch: its number.
      order: (rank, its device) in the order of the mesh.
      names: of the ranks' processes, in the same order.
      step: of the state.
      sources: from whom this rank gets what it lacks.
    """

    epoch: int
    order: Order
    names: tuple[str, ...]
    step: int
    sources: Sources


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Meshes that may come next, whose programs are to be loaded while training goes on."""

    epoch: int
    orders: tuple[Order, ...]


@dataclasses.dataclass(frozen=True)
class Step:
    """An optimiser step to take.

    Attributes:
      epoch: in which.
      number: steps done before.
      evaluate: held-out text to score afterwards: None, "probe" or "final".
      safe: of older steps than this no snapshot is needed any more.
    """

    epoch: int
    number: int
    evaluate: str | None
    safe: int


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Keep a copy of the state, which is that after ``number`` steps."""

    epoch: int
    number: int


@dataclasses.dataclass(frozen=True)
class StepValue:
    """With "done".

    Attributes:
      metrics: of the step.
      held_out, scoring_s: figures of held-out text if asked for, and how long they took.
      protected: the last step of which this rank has all it keeps.
    """

    metrics: dict[str, Any]
    held_out: dict[str, float] | None
    scoring_s: float
    protected: int


@dataclasses.dataclass(frozen=True)
class InstallValue:
    """With "installed": programs compiled for want of a stored one, and seconds by what they were spent on."""

    compiled: int
    seconds: dict[str, float]
