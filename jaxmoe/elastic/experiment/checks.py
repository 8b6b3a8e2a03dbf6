"""What must hold after every run, whatever was done to the ranks."""

import os
import pathlib
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxmoe.elastic.experiment.load import Record
from jaxmoe.engine.stats import EngineStats

LEAKED_MOST = 16  # descriptors and threads that may be there beyond what was there at first: those of the moment

# What a request that the cluster's policy ends has to name: what is missing, or how often its rank was lost.
_EXPLAINED = re.compile(r"CoverageLost.*(expert|slot|rank)|its rank was lost \d+ times")


class Counts(NamedTuple):
    """What became of a run's requests.

    Attributes:
      completed: with all their tokens.
      cancelled: by their clients.
      refused: ended with an error that names what is missing, where that had to be.
      lost: never ended, or with fewer tokens than they should, or with an error for no good reason.
      duplicated: ended twice, or had tokens again that they had had.
      wrong_tokens: tokens that differ from the undisturbed ones.
    """

    completed: int = 0
    cancelled: int = 0
    refused: int = 0
    lost: int = 0
    duplicated: int = 0
    wrong_tokens: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


def count(
    records: Sequence[Record], expected: Sequence[tuple[int, ...]], refuses: bool
) -> tuple[Counts, list[str]]:
    """What became of the requests, and one line for each that is not as it should be."""
    total, problems = Counts(), []
    for record in records:
        counts, problem = _count(record, expected[record.ask], refuses)
        total += counts
        if problem:
            problems.append(f"request {record.ask}: {problem}")
    return total, problems


def _count(record: Record, expected: tuple[int, ...], refuses: bool) -> tuple[Counts, str | None]:
    tokens, reason = tuple(record.tokens), record.reason
    if record.ends > 1:
        return Counts(duplicated=1), f"ended {record.ends} times"
    if tokens != expected[: len(tokens)]:
        return _differing(tokens, expected)
    if record.ends == 0:
        return Counts(lost=1), f"has not ended after {len(tokens)} tokens"
    if reason == "cancelled" and record.cancelled:
        return Counts(cancelled=1), None
    if reason == "error":
        if refuses and _EXPLAINED.search(record.error or ""):
            return Counts(refused=1), None
        return Counts(lost=1), f"ended with an error: {record.error}"
    if len(tokens) < len(expected):
        return Counts(lost=1), f"ended with {reason} after {len(tokens)} of {len(expected)} tokens"
    return Counts(completed=1), None


def _differing(tokens: tuple[int, ...], expected: tuple[int, ...]) -> tuple[Counts, str]:
    """Tokens that came again, or others."""
    first = next(
        (i for i, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b), len(expected)
    )
    rest = tokens[first:]
    for back in range(first):  # the stream has gone back to an earlier place
        if rest == expected[back : back + len(rest)] and len(rest) > 1:
            return Counts(duplicated=1), f"had tokens {back}..{first} twice"
    if first == len(expected):
        return Counts(duplicated=1), f"had {len(rest)} tokens too many"
    wrong = sum(a != b for a, b in zip(rest, expected[first:], strict=False))
    return Counts(wrong_tokens=wrong), f"token {first} is {tokens[first]}, not {expected[first]}"


def of_events(events: Sequence[Any], epoch: int, refuses: bool) -> list[str]:
    """Epochs only grow, and every expert has a copy, from ``epoch`` on."""
    problems = []
    for event in events:
        if event.epoch <= epoch:
            problems.append(f"epoch {event.epoch} of {event.type} {event.ranks} follows {epoch}")
        epoch = max(epoch, event.epoch)
        if event.min_copies < 1 and not refuses:
            problems.append(f"an expert has no copy after {event.type} {event.ranks}")
    return problems


def of_engine(stats: EngineStats) -> list[str]:
    """Nothing is left over once all requests have ended."""
    left = {name: getattr(stats, name) for name in ("running", "waiting", "pages_held")}
    return [f"{value} {name} with no request left" for name, value in left.items() if value]


def of_ranks(verified: Mapping[int, Any]) -> list[str]:
    """All ranks have the same tables, and weights as they should be."""
    problems = []
    if len({v.digest for v in verified.values()}) > 1:
        problems.append(f"tables differ: { ({rank: v.digest for rank, v in verified.items()}) }")
    for rank, verification in verified.items():
        if verification.wrong:
            problems.append(f"rank {rank} has wrong weights in {list(verification.wrong)[:5]}")
    return problems


def compiles(status: Any) -> dict[tuple[int, int], int]:
    """Programs that each process has compiled, by rank and incarnation."""
    return {(r.rank, r.incarnation): r.compiles for r in status.ranks if r.state == "active"}


def compiled_since(before: Mapping, after: Mapping) -> int:
    """Programs that processes which were there all the time have compiled."""
    return sum(after[key] - before[key] for key in before.keys() & after.keys())


class Resources(NamedTuple):
    """Open descriptors and threads of this process."""

    descriptors: int
    threads: int

    @classmethod
    def now(cls) -> "Resources":
        """Of this moment."""
        return cls(len(os.listdir("/proc/self/fd")), threading.active_count())

    def leaked(self, first: "Resources") -> list[str]:
        """What is there beyond what was there at first and may come and go."""
        return [
            f"{now} {name}, at first {then}"
            for name, now, then in zip(self._fields, self, first, strict=True)
            if now > then + LEAKED_MOST
        ]


def orphans(pids: set[int]) -> list[int]:
    """Which of these processes, all of ranks, are still there."""
    found = []
    for pid in pids:
        try:
            command = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"jaxmoe.elastic.cluster.rank" in command:
            found.append(pid)
    return sorted(found)
