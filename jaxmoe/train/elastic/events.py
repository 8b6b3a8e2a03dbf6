"""What happens to the ranks of a run, for people and for ``events.jsonl``."""

import dataclasses
from typing import Any, Literal

EVENTS = "events.jsonl"


@dataclasses.dataclass(frozen=True)
class Event:
    """A change of the ranks.

    Attributes:
      type: "started", "lost", "retried" (a step failed though all ranks live) or "joined".
      ranks: whom it concerns.
      step: steps of the state that training went on from.
      redone: steps that had been done already and are done again.
      source: where that state came from: "memory" of the ranks, the last "checkpoint", or the "seed".
      seconds: how long training stood still, from when it was noticed until the ranks could go on.
      phases: the same by what it was spent on.
      active: ranks that take part from now on.
      mesh: sizes of the mesh's axes.
      compiled: programs that ranks had to compile because none was stored.
      pids: processes of the active ranks.
    """

    type: Literal["started", "lost", "retried", "joined"]
    ranks: tuple[int, ...]
    step: int
    redone: int
    source: Literal["memory", "checkpoint", "seed"]
    seconds: float
    phases: dict[str, float]
    active: tuple[int, ...]
    mesh: dict[str, int]
    compiled: int
    pids: dict[int, int]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable dict."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.ranks))
        mesh = " x ".join(f"{axis}={size}" for axis, size in self.mesh.items())
        origin = {
            "memory": "the ranks' memory",
            "checkpoint": "the last checkpoint",
            "seed": "the beginning",
        }[self.source]
        went_on = f"{mesh}, from step {self.step} out of {origin}"
        compiled = f", {self.compiled} programs compiled" if self.compiled else ""
        if self.type == "started":
            return f"{len(self.ranks)} ranks started as {went_on} ({self.seconds:.1f} s{compiled})"
        what = {"lost": f"rank {ranks} lost", "joined": f"rank {ranks} joined"}.get(
            self.type, "a step failed though all ranks live"
        )
        return (
            f"{what}: on as {went_on}; {self.redone} steps redone, "
            f"{self.seconds:.2f} s stood still{compiled}"
        )
