"""Ranks on their way out on purpose."""

import dataclasses
import time
from concurrent.futures import Future


@dataclasses.dataclass
class Drain:
    """A rank that gets no new requests and waits for the end of those it has, until ``deadline`` (``time.monotonic()``)."""

    deadline: float
    future: Future
    announced: bool = False  # the scheduler knows
    busy: bool = True

    @property
    def due(self) -> bool:
        """Whether the rank can go."""
        return self.announced and (not self.busy or time.monotonic() > self.deadline)


class Drains:
    """Those that are under way, and the ranks that are out."""

    def __init__(self):
        self.running: dict[int, Drain] = {}
        self.done: set[int] = set()
