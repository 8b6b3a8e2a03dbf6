"""What a run gives back: a record per round, and the models."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from fed.models import Model, Params


@dataclasses.dataclass(eq=False)
class History:
    """The course of a federated run.

    Attributes:
      method: its name.
      rounds: a record (a dict of JSON values) per round.
      large: parameters of the server's model at the end, if there is one.
      small: parameters of each client architecture at the end.
      personal: of each architecture, every member's own parameters, stacked, where clients keep theirs.
      models: the server's model or None, and the client architectures.
      partition: statistics of the realised split, as text.
      costs: of one client (:mod:`fed.costs`).
      privacy: what each private rule of the run has spent (``fed.privacy.spent``), as text.
    """

    method: str
    rounds: list[dict[str, Any]]
    large: Params | None
    small: tuple[Params, ...]
    personal: tuple[Params, ...] | None
    models: tuple[Model | None, tuple[Model, ...]]
    partition: str = ""
    costs: dict[str, Any] = dataclasses.field(default_factory=dict)
    privacy: tuple[str, ...] = ()

    @property
    def final(self) -> dict[str, Any]:
        """The last record in which models were evaluated."""
        evaluated = [r for r in self.rounds if "small_accuracy" in r or "large_accuracy" in r]
        return evaluated[-1] if evaluated else {}

    def series(self, name: str) -> np.ndarray:
        """A metric over the rounds, NaN where a round has none."""
        return np.array([r.get(name, np.nan) for r in self.rounds], np.float64)

    def rounds_to(self, target: float, metric: str = "large_accuracy") -> int | None:
        """The first round, from 1, whose metric reaches ``target``; None if none does."""
        for record in self.rounds:
            if record.get(metric, -np.inf) >= target:
                return record["round"] + 1
        return None

    def total(self, name: str) -> float:
        """The sum of a metric over the rounds."""
        return float(np.nansum(self.series(name)))

    def write(self, path: str | pathlib.Path) -> None:
        """Writes the records as JSON lines."""
        target = pathlib.Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("".join(json.dumps(record) + "\n" for record in self.rounds))

    def __repr__(self) -> str:
        figures = ", ".join(
            f"{name} {self.final[name]:.4f}"
            for name in ("large_accuracy", "small_accuracy")
            if name in self.final
        )
        return f"History({self.method}: {len(self.rounds)} rounds; {figures})"
