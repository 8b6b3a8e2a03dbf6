"""Counters and events of the engine."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """A moment of the engine.

    Attributes:
      waiting, running: requests without and with pages.
      preemptions: how often a request's pages were taken away.
      steps: steps so far.
      prompt_tokens, cached_tokens: of started requests; the latter were not computed again.
      generated_tokens: sampled tokens, stop tokens included.
      drafted_tokens, accepted_tokens: guessed ahead and computed, and those of them that were right.
      finished: ended requests by reason.
      pages, pages_held, pages_idle: of all ranks; idle ones are kept for prompts that begin alike.
      step_s: smoothed seconds from one step's plan to its commit.
      schedule_s: smoothed seconds of that which the host spent outside compiled functions.
      expert_load: [layers with experts, E] int64, tokens that each expert has computed.
      ranks: how many ranks share the experts.
      epoch: of the membership.
      rank_experts: the experts in each rank's slots.
      draining: whether new requests are refused.
      width_steps: planned steps by the SEFP width of their requests; None where weights have none.
    """

    waiting: int
    running: int
    preemptions: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    finished: dict[str, int]
    pages: int
    pages_held: int
    pages_idle: int
    step_s: float
    schedule_s: float
    expert_load: np.ndarray
    ranks: int
    epoch: int
    rank_experts: list[list[int]]
    draining: bool
    width_steps: dict[int | None, int] = dataclasses.field(default_factory=dict)


class Smoothed:
    """An exponentially weighted mean; the first value counts whole."""

    def __init__(self, weight: float = 0.05):
        self._weight, self.value = weight, 0.0
        self._any = False

    def add(self, value: float) -> None:
        """Takes a new value into account."""
        self.value += (value - self.value) * (self._weight if self._any else 1.0)
        self._any = True


class Events:
    """Who wants to hear of what happens to requests."""

    def __init__(self):
        self._subscribers: tuple[Callable[[dict[str, Any]], None], ...] = ()

    def subscribe(self, callback: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        """Adds a callback; returns a function that takes it out again."""
        self._subscribers = (*self._subscribers, callback)

        def unsubscribe() -> None:
            self._subscribers = tuple(c for c in self._subscribers if c is not callback)

        return unsubscribe

    def tell(self, event: dict[str, Any]) -> None:
        """Calls everyone."""
        for callback in self._subscribers:
            try:
                callback(event)
            except Exception:  # requests must not end because somebody watches them badly
                logger.exception("subscriber failed event=%s", event["type"])
