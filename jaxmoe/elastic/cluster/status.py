"""What an operator can see of a cluster."""

import dataclasses
from typing import Any, Literal

State = Literal["active", "draining", "starting", "ready", "drained", "away"]


@dataclasses.dataclass(frozen=True)
class RankStatus:
    """A rank at this moment.

    Attributes:
      rank: its number.
      state: "active" ranks take part, "draining" ones too but get no new requests; "starting" and "ready" ones are on their way
        or spare; "drained" ones were taken out on purpose; "away" ones are dead and not started again.
      incarnation: of its process; -1 if there was none.
      pid: of its process, None if there is none.
      compiles: programs that XLA has compiled in it.
      experts: different ones that it holds in the first layer with experts.
    """

    rank: int
    state: State
    incarnation: int
    pid: int | None
    compiles: int
    experts: int


@dataclasses.dataclass(frozen=True)
class ClusterStatus:
    """A cluster at this moment.

    Attributes:
      epoch: of the membership.
      refusal: why nothing can be computed; None if it can.
      min_copies: the fewest copies that an expert has.
      placement_digest: a hash of the whole placement.
      ranks: all of them.
      dropped: messages that did not count, by kind and reason.
      events: changes so far.
    """

    epoch: int
    refusal: str | None
    min_copies: int
    placement_digest: str
    ranks: tuple[RankStatus, ...]
    dropped: dict[str, int]
    events: int

    def to_dict(self) -> dict[str, Any]:
        """For messages and files (JSON types only)."""
        return dataclasses.asdict(self)


EventType = Literal["lost", "joined", "drained", "retried", "repaired", "rebalanced", "renewed"]


@dataclasses.dataclass(frozen=True)
class Event:
    """A change of epoch.

    Attributes:
      type: ranks were "lost", "joined" or "drained"; a step failed with nobody lost and is "retried"; damaged weights were
        "repaired"; experts were "rebalanced"; all processes were "renewed".
      ranks: concerned.
      epoch: that it led to.
      at: when it was noticed, ``time.monotonic()`` seconds.
      seconds: that serving stood still for it.
      phases: parts of that: "abort", "plan", "move" (weights between devices), "load" (from host memory or a checkpoint), "agree"
        (all have adopted the epoch), "executable".
      active: who takes part now.
      min_copies: the fewest copies that an expert has now.
    """

    type: EventType
    ranks: tuple[int, ...]
    epoch: int
    at: float
    seconds: float
    phases: dict[str, float]
    active: tuple[int, ...]
    min_copies: int

    def to_dict(self) -> dict[str, Any]:
        """For messages and files (JSON types only)."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Verification:
    """A rank's tables and weights, checked.

    Attributes:
      digest: a hash of its tables; the same on all ranks.
      wrong: (layer, slot of the rank) whose weights fail their checksum.
    """

    digest: str
    wrong: tuple[tuple[int, int], ...]
