"""Figures over the last minutes, from the engine's events and the differences of its counters. Pure: time is an argument."""

import dataclasses
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

PERCENTILES = (50, 90, 99)


def percentiles(values: Iterable[float]) -> dict[str, float] | None:
    """p50, p90 and p99, linear between neighbours; None without values.

    Example:
      >>> percentiles([1.0, 2.0, 3.0])["p50"]
      2.0
    """
    values = np.asarray(list(values), np.float64)
    if not values.size:
        return None
    found = np.percentile(values, PERCENTILES)
    return {f"p{q}": float(value) for q, value in zip(PERCENTILES, found, strict=True)}


class Window:
    """Values of the last ``seconds``, at most ``most`` of them (the oldest go first).

    Times must not decrease.
    """

    def __init__(self, seconds: float, most: int = 20_000):
        self.seconds = seconds
        self._items: deque[tuple[float, Any]] = deque(maxlen=most)

    def add(self, now: float, value: Any) -> None:
        """Remembers a value."""
        self._items.append((now, value))

    def values(self, now: float) -> list[Any]:
        """What is not older than the window, oldest first."""
        while self._items and self._items[0][0] < now - self.seconds:
            self._items.popleft()
        return [value for _, value in self._items]


class Point(NamedTuple):
    """One point of the timeline; rates are tokens per second, None where nothing was measured."""

    time: float
    output: float | None
    prompt: float | None
    running: int
    waiting: int
    pages_held: int


@dataclasses.dataclass(frozen=True)
class _Counts:
    """Counters at one moment; ``load`` [E] is summed over layers."""

    time: float
    generated: int
    prompt: int
    cached: int
    load: np.ndarray


def _rate(now: int, before: int, seconds: float) -> float:
    return max(0, now - before) / seconds


def _load_by_expert(stats: Any) -> np.ndarray:
    """Tokens per expert, summed over layers; zeros before the first step, when the engine has no counts yet."""
    experts = max((e for rank in stats.rank_experts for e in rank), default=-1) + 1
    load = np.asarray(stats.expert_load, np.int64).sum(0)
    return load if load.size >= experts else np.zeros(experts, np.int64)


def expert_ranks(
    rank_experts: Sequence[Sequence[int]], recent: np.ndarray, total: np.ndarray
) -> list[dict[str, Any]]:
    """Each rank's experts with their tokens; an expert's copies take turns, so each counts its share.

    Args:
      rank_experts: experts by rank.
      recent: tokens per expert in the window, [E].
      total: tokens per expert since the start, [E].

    Returns:
      One dict per rank: "experts", "recent" and "total" in the same order.
    """
    copies = np.zeros(len(total), np.int64)
    for experts in rank_experts:
        np.add.at(copies, np.asarray(experts, np.int64), 1)
    copies = np.maximum(copies, 1)
    shares = {"recent": recent / copies, "total": total / copies}
    return [
        {"experts": list(map(int, experts))}
        | {name: [round(float(share[e]), 1) for e in experts] for name, share in shares.items()}
        for experts in rank_experts
    ]


class Aggregator:
    """Turns events and counters into what the page shows. Not thread-safe; the caller holds a lock.

    Args:
      latency_s: over how long percentiles look back.
      load_s: over how long expert load looks back.
      timeline: how many points the timeline keeps.
    """

    def __init__(self, *, latency_s: float = 300.0, load_s: float = 60.0, timeline: int = 300):
        self._ttft, self._tpot = Window(latency_s), Window(latency_s)
        self._counts: deque[_Counts] = deque()
        self._load_s = load_s
        self.timeline: deque[Point] = deque(maxlen=timeline)

    def event(self, now: float, event: Mapping[str, Any]) -> None:
        """Takes one event of ``engine.subscribe``; kinds that it does not know are passed over."""
        if event["type"] == "first_token":
            self._keep(self._ttft, now, event["seconds"])
        elif event["type"] == "finished":
            self._keep(self._tpot, now, event.get("tpot_s"))

    @staticmethod
    def _keep(window: Window, now: float, seconds: float | None) -> None:
        # A request with one token has no time per further token.
        if seconds is not None and math.isfinite(seconds):
            window.add(now, seconds)

    def sample(self, now: float, time: float, stats: Any) -> dict[str, Any]:
        """A snapshot, and a point of the timeline.

        Args:
          now: monotonic seconds.
          time: seconds since 1970, for the page.
          stats: ``engine.stats()``.

        Returns:
          A dict that JSON can hold.
        """
        load, time = _load_by_expert(stats), round(time, 3)
        counts = _Counts(
            now, stats.generated_tokens, stats.prompt_tokens, stats.cached_tokens, load
        )
        rates = self._rates(counts)
        speeds = rates["output"], rates["prompt"]
        point = Point(time, *speeds, stats.running, stats.waiting, stats.pages_held)
        self.timeline.append(point)
        return {
            "time": time,
            "point": list(point),
            "throughput": rates,
            "running": stats.running,
            "waiting": stats.waiting,
            "preemptions": stats.preemptions,
            "steps": stats.steps,
            "totals": {
                "prompt": stats.prompt_tokens,
                "cached": stats.cached_tokens,
                "generated": stats.generated_tokens,
            },
            "finished": {str(reason): int(n) for reason, n in stats.finished.items()},
            "pages": {
                "total": stats.pages,
                "held": stats.pages_held,
                "idle": stats.pages_idle,
            },
            "step_s": stats.step_s if stats.steps else None,
            "schedule_share": stats.schedule_s / stats.step_s if stats.step_s > 0 else None,
            "latency": self._latency(now),
            "load": {
                "window_s": self._load_s,
                "ranks": expert_ranks(stats.rank_experts, self._recent_load(counts), load),
            },
            "epoch": stats.epoch,
            "draining": bool(stats.draining),
        }

    def _rates(self, counts: _Counts) -> dict[str, float | None]:
        """Tokens per second since the sample before; remembers this one."""
        before = self._counts[-1] if self._counts else None
        self._counts.append(counts)
        while self._counts[0].time < counts.time - self._load_s:
            self._counts.popleft()
        if before is None or counts.time <= before.time:
            return {"output": None, "prompt": None, "cached": None}
        seconds = counts.time - before.time
        return {
            "output": round(_rate(counts.generated, before.generated, seconds), 2),
            "prompt": round(_rate(counts.prompt, before.prompt, seconds), 2),
            "cached": round(_rate(counts.cached, before.cached, seconds), 2),
        }

    def _recent_load(self, counts: _Counts) -> np.ndarray:
        return np.maximum(counts.load - self._counts[0].load, 0)

    def _latency(self, now: float) -> dict[str, Any]:
        ttft, tpot = self._ttft.values(now), self._tpot.values(now)
        return {
            "window_s": self._ttft.seconds,
            "ttft": percentiles(ttft),
            "ttft_count": len(ttft),
            "tpot": percentiles(tpot),
            "tpot_count": len(tpot),
        }
