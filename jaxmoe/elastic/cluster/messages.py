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
      config, sizes, weights: the model and the shapes.
      slots: experts that a rank has slots for.
      programs: folder of compiled programs that all ranks of the machine share.
    """

    coordinator: str
    capacity: int
    config: ModelConfig
    sizes: Sizes
    weights: Weights
    slots: int
    programs: str


@dataclasses.dataclass(frozen=True)
class Fill:
    """An expert to be put into one of a rank's slots.

    Attributes:
      slot: of the rank, from 0.
      expert: which.
      kind: where it is taken from: "place" (another slot of the rank), "peer", "host" or "checkpoint".
      peer: address of the rank that has it, with kind "peer".
    """

    slot: int
    expert: int
    kind: str
    peer: str | None = None


@dataclasses.dataclass(frozen=True)
class Install:
    """A new epoch: who takes part, in which order, and what changes in the rank's slots first.

    Attributes:
      epoch: its number.
      order: ranks in the order of the mesh, one not used before.
      experts: [ranks of the mesh * slots] the expert in each slot, -1 for none, in the order of the mesh.
      fills: the rank's own.
    """

    epoch: int
    order: tuple[int, ...]
    experts: np.ndarray
    fills: tuple[Fill, ...] = ()


@dataclasses.dataclass(frozen=True)
class Compile:
    """What a step of ``size`` tokens per rank takes is to be ready: its sampling, and its program for these numbers of ranks."""

    epoch: int
    size: int
    numbers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Step:
    """A step to compute."""

    epoch: int
    number: int
    batch: Batch
    inputs: Inputs | None


@dataclasses.dataclass(frozen=True)
class Abort:
    """Give up the step of this epoch that is being computed, if one is."""

    epoch: int


@dataclasses.dataclass(frozen=True)
class Ping:
    """Are you there?"""

    epoch: int
    number: int


@dataclasses.dataclass(frozen=True)
class Stop:
    """End the process."""

    epoch: int = -1


@dataclasses.dataclass(frozen=True)
class Reply:
    """A rank's answer.

    Attributes:
      kind: "ready", "installed", "compiled", "done", "failed", "aborted" or "pong".
      rank, incarnation, epoch: whose and of when.
      number: of the step or ping.
      value: with "done" a ``StepValue``; with "failed" the error's text; with "ready" the address for peers.
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
class StepValue:
    """Of a rank's step: what its rows have sampled, and [layers, E] tokens per expert of its own tokens."""

    sampled: Sampled | None
    load: np.ndarray
