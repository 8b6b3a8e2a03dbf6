"""What a run's tokens and events say: how long nothing came, and at which rate it came before and after."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmoe.elastic.experiment.load import Record

PHASES = ("detect", "abort", "agree", "plan", "move", "load", "executable")


def token_times(records: Sequence[Record]) -> np.ndarray:
    """When tokens came, of all requests together, sorted, in seconds."""
    return np.sort(np.concatenate([np.zeros(0), *(np.asarray(r.times) for r in records)]))


def gap_at(times: np.ndarray, at_s: float) -> tuple[float, float] | None:
    """The last token up to a moment and the first one after it; None if there is none before or after."""
    after = int(np.searchsorted(times, at_s, side="right"))
    if not 0 < after < len(times):
        return None
    return float(times[after - 1]), float(times[after])


def rate(times: np.ndarray, begin_s: float, end_s: float) -> float:
    """Tokens per second in a window."""
    first, last = np.searchsorted(times, [begin_s, end_s])
    return float(last - first) / (end_s - begin_s)


@dataclasses.dataclass(frozen=True)
class Pause:
    """A moment at which serving stood still for a change of ranks.

    Attributes:
      type: of the cluster's event, such as "lost" or "joined".
      ranks: which it was about.
      at_s: when it was noticed, since the load's first token.
      seconds: from the last token of the whole instance before it to the first one after.
      phases: what it consisted of, in seconds: "before" from the last token to the fault, "detect" from there to its
        notice, the controller's own phases, "refill" from the end of those to the first token.
      active: how many ranks took part then.
      everyone_s: from the notice until every request in flight had a token again: those of the lost rank are computed anew.
    """

    type: str
    ranks: tuple[int, ...]
    at_s: float
    seconds: float
    phases: dict[str, float]
    active: int
    everyone_s: float | None

    def to_dict(self) -> dict[str, Any]:
        """For reports."""
        return dataclasses.asdict(self) | {"ranks": list(self.ranks)}


def pauses_of(
    events: Sequence[Any],
    records: Sequence[Record],
    faults: Sequence[tuple[float, tuple[int, ...]]],
    began: float,
) -> list[Pause]:
    """The pauses of a run.

    Args:
      events: the cluster's.
      records: of all clients.
      faults: when which ranks were done something to.
      began: the load's first token.
    """
    times = token_times(records)
    pauses = []
    for event in events:
        gap = gap_at(times, event.at + event.seconds / 2)
        if gap is None:
            continue  # no token before or after: what is lost with it is counted elsewhere
        phases = {name: float(s) for name, s in event.phases.items()}
        causes = [at for at, ranks in faults if at <= event.at and set(ranks) & set(event.ranks)]
        if event.type == "lost" and causes:
            fault = max(causes)
            known = {"before": max(0.0, fault - gap[0]), "detect": event.at - max(fault, gap[0])}
            phases = known | phases
        phases["refill"] = max(0.0, gap[1] - event.at - event.seconds)
        pauses.append(
            Pause(
                event.type,
                tuple(event.ranks),
                event.at - began,
                gap[1] - gap[0],
                phases,
                len(event.active),
                _everyone(records, event.at),
            )
        )
    return pauses


def _everyone(records: Sequence[Record], at: float) -> float | None:
    """Until every request that was in flight and went on had a token again."""
    waits = []
    for record in records:
        if record.began <= at and (record.ended is None or record.ended > at):
            later = next((t for t in record.times if t > at), None)
            if later is not None:
                waits.append(later - at)
    return max(waits, default=None)
