"""Fault schedules as data: what is done to which rank, and when.

A schedule is a script; its injections happen one after another, in the order in which they are written:

    kill:1@2                    SIGKILL for rank 1, 2 s after the first token of the load
    kill:0+2@2                  for two ranks at once
    kill:1@2/committed          rank 1 dies at a point of a step: step, computed or committed
    kill:0@1/install, kill:1@2  rank 0 dies while the loss of rank 1 is repaired (/fetch: while it takes in weights)
    kill:1@2, kill_joiner:1@returning+3   the process that is to replace rank 1 dies 3 s after its start
    kill:1@2, kill:1@lost/install         ... or while it joins
    kill:1@2, kill:1@joined               ... or as soon as it has joined
    kill_holders@2              every rank that has a copy of the scarcest expert
    stop:1@2, stop:1@2x0.5      SIGSTOP, for good or SIGCONT after so many seconds
    slow:1@2x0.3                one step of the rank takes so much longer
    raise:1@2, nan:1@2          an exception, or weights that are not numbers, in one rank
    flip:1@2, flip_host:1@2     one bit of the weights in a slot, or of the copy in the host's memory
    cut:1@2, mute:1@2x3         its collectives' connections end; its answers to the controller are lost for so long
    replay:1@2                  it sends its last answer again
    drain:1@2, resume:1@5       planned: it leaves once its requests are elsewhere; it returns
    cancel:3@2                  three of the clients' requests, whatever their state

After @ comes a number of seconds since the first token, or one of lost, returning, joined and draining, with a delay if one
is wanted (``@lost+0.1``): as soon as that has happened since the injection before. Without @: at once, and kill_joiner as soon
as there is a process to kill.

Faults are told apart as F1 crash, F2 crash inside a step, F3 hang, F4 straggler, F5 repeated failures, F6 failure during
recovery, F7 of the joiner, F8 of the controller, F9 partition, F10 loss of last copies, F11 corruption, F12 stale messages,
F13 differing views, F14 faults beside admission and cancellation, F15 several at once, F16 errors in one expert,
F17 planned changes. ``COVERS`` says which kind injects which; F8 would end the process that injects, and has its tests
with the cluster's (``tests/serve/test_ranks.py``).
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

POINTS = ("now", "step", "computed", "committed", "fetch", "install")
CONDITIONS = ("lost", "returning", "joined", "draining")

COVERS = {
    "kill": ("F1", "F2", "F5", "F6", "F7", "F15"),
    "kill_joiner": ("F7",),
    "kill_holders": ("F10",),
    "stop": ("F3",),
    "slow": ("F4",),
    "raise": ("F16",),
    "nan": ("F16",),
    "flip": ("F11",),
    "flip_host": ("F11",),
    "cut": ("F9", "F13"),
    "mute": ("F9",),
    "replay": ("F12",),
    "drain": ("F17",),
    "resume": ("F17",),
    "cancel": ("F14",),
}
_ENDS_A_RANK = ("kill", "kill_joiner", "stop", "raise", "nan", "cut", "mute", "drain", "flip")
HOLDERS = 2  # copies of every expert that placements strive for, on as many ranks
_WITHOUT_RANKS = ("kill_holders", "cancel")
_NEEDS_SECONDS = ("slow", "mute")
_TAKES_SECONDS = (*_NEEDS_SECONDS, "stop")
_TAKES_POINT = ("kill", "stop", "slow", "raise", "nan", "flip", "flip_host", "cut", "replay")

_TEXT = re.compile(
    r"(?P<kind>[a-z_]+)(?::(?P<target>\d+(?:\+\d+)*))?"
    r"(?:@(?:(?P<after>[a-z]+)(?:\+(?P<wait>\d+(?:\.\d+)?))?|(?P<at>\d+(?:\.\d+)?)))?"
    r"(?:/(?P<point>[a-z]+))?(?:x(?P<seconds>\d+(?:\.\d+)?))?"
)


@dataclasses.dataclass(frozen=True)
class Injection:
    """One thing that is done to the cluster.

    Attributes:
      kind: a key of ``COVERS``.
      ranks: to whom; empty for kinds that are about no rank.
      number: of requests, with kind "cancel".
      after: a condition, or None: then ``at_s`` counts from the load's first token.
      at_s: seconds.
      point: of the rank's work.
      seconds: how long, for kinds that last.

    Raises:
      ValueError: names what does not fit.
    """

    kind: str
    ranks: tuple[int, ...] = ()
    number: int = 0
    after: str | None = None
    at_s: float = 0.0
    point: str = "now"
    seconds: float = 0.0

    def __post_init__(self):
        kind = self.kind
        if kind not in COVERS:
            raise ValueError(f"a fault must be one of {', '.join(COVERS)}; got {kind!r}.")
        if self.after is not None and self.after not in CONDITIONS:
            raise ValueError(
                f"{kind}: after @ comes a number of seconds or one of {', '.join(CONDITIONS)}; got {self.after!r}."
            )
        if bool(self.ranks) == (kind in _WITHOUT_RANKS):
            rule = "is about no rank" if self.ranks else "needs a rank, such as"
            raise ValueError(f"{kind} {rule}{'' if self.ranks else f' {kind}:1'}; got {self}.")
        if len(set(self.ranks)) < len(self.ranks):
            raise ValueError(f"{kind}: every rank once; got {self}.")
        if (kind == "cancel") != (self.number > 0):
            raise ValueError(f"cancel, and only that, needs a number of requests; got {self}.")
        if self.point != "now" and (kind not in _TAKES_POINT or self.point not in POINTS):
            raise ValueError(
                f"{kind}: a point is one of {', '.join(POINTS)}, for {', '.join(_TAKES_POINT)}; got {self.point!r}."
            )
        if kind in _NEEDS_SECONDS and not self.seconds:
            raise ValueError(f"{kind} needs seconds, such as {kind}:1@2x0.3; got {self}.")
        if self.seconds and kind not in _TAKES_SECONDS:
            raise ValueError(f"{kind} lasts no time; leave x{self.seconds:g} out.")

    def __str__(self) -> str:
        target = "+".join(map(str, self.ranks)) if self.ranks else str(self.number or "")
        when = f"@{self.at_s:g}" if self.at_s else ""
        if self.after is not None:
            when = f"@{self.after}" + (f"+{self.at_s:g}" if self.at_s else "")
        point = "" if self.point == "now" else f"/{self.point}"
        lasting = f"x{self.seconds:g}" if self.seconds else ""
        return f"{self.kind}{':' + target if target else ''}{when}{point}{lasting}"

    @property
    def ends(self) -> frozenset[int]:
        """Ranks that it may take out of the cluster."""
        return frozenset(self.ranks if self.kind in _ENDS_A_RANK else ())


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A script of injections, and the seed of the load beside it.

    Attributes:
      injections: in order.
      seed: of the load, and of the schedule itself if it was drawn.
      refuses: whether so many ranks go that requests may end with an error that says which experts are missing.
    """

    injections: tuple[Injection, ...]
    seed: int = 0
    refuses: bool = False

    def __str__(self) -> str:
        return ", ".join(map(str, self.injections))

    def shifted(self, by: int, ranks: int) -> "Schedule":
        """The same for other ranks, each ``by`` further: repetitions then are not about one rank."""
        moved = [
            dataclasses.replace(x, ranks=tuple((rank + by) % ranks for rank in x.ranks))
            for x in self.injections
        ]
        return dataclasses.replace(self, injections=tuple(moved), seed=self.seed + by)

    def checked(self, ranks: int, spare_ranks: int) -> "Schedule":
        """The same, which ``refuses`` if it takes out more ranks than may be gone.

        Args:
          ranks: how many there are.
          spare_ranks: so many may be gone with every expert still having a slot somewhere.

        Raises:
          ValueError: names the first injection that is about a rank that is not there.
        """
        for injection in self.injections:
            for rank in injection.ranks:
                if rank >= ranks:
                    raise ValueError(
                        f"--faults: ranks are 0..{ranks - 1} with --ranks {ranks}; got {injection}."
                    )
        out = frozenset().union(*(injection.ends for injection in self.injections))
        # Those who have the scarcest expert are two as soon as every expert has two copies.
        holders = any(injection.kind == "kill_holders" for injection in self.injections)
        gone = max(len(out), HOLDERS if holders else 0)
        return dataclasses.replace(self, refuses=self.refuses or gone > spare_ranks)

    def to_dict(self) -> dict[str, Any]:
        """As in a file."""
        return {
            "seed": self.seed,
            "refuses": self.refuses,
            "faults": [str(injection) for injection in self.injections],
        }


def parse_injection(text: str) -> Injection:
    """An injection from its text.

    Raises:
      ValueError: says what is wrong with it.

    Example:
      >>> parse_injection("kill:2@lost+0.5/step")
      Injection(kind='kill', ranks=(2,), number=0, after='lost', at_s=0.5, point='step', seconds=0.0)
    """
    match = _TEXT.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            "a fault is written KIND:RANK@WHEN, then /POINT and xSECONDS if wanted, such as kill:1@2 or "
            f"stop:0+2@lost+0.5x1; got {text.strip()!r}."
        )
    part = match.groupdict()
    kind, target = part["kind"], part["target"]
    numbers = tuple(int(n) for n in target.split("+")) if target else ()
    about_requests = kind == "cancel"
    after = part["after"]
    if kind == "kill_joiner" and after is None and part["at"] is None:
        after = "returning"
    return Injection(
        kind,
        () if about_requests else numbers,
        sum(numbers) if about_requests else 0,
        after,
        float(part["wait"] or part["at"] or 0.0),
        part["point"] or "now",
        float(part["seconds"] or 0.0),
    )


def parse_schedule(text: str, seed: int = 0) -> Schedule:
    """A schedule from the text of its injections, with commas between them."""
    parts = [part for part in text.split(",") if part.strip()]
    return Schedule(tuple(map(parse_injection, parts)), seed)


def _from_dict(value: Any, path: pathlib.Path, seed: int) -> Schedule:
    if (
        not isinstance(value, Mapping)
        or not isinstance(value.get("faults"), list)
        or not all(isinstance(fault, str) for fault in value["faults"])
        or not set(value) <= {"faults", "seed", "refuses"}
        or not isinstance(value.get("seed", 0), int)
        or not isinstance(value.get("refuses", False), bool)
    ):
        raise ValueError(
            f'{path}: a schedule is {{"faults": ["kill:1@2", ...], "seed": 0, "refuses": false}}, the last two if '
            f"wanted; got {json.dumps(value)[:100]}."
        )
    injections = tuple(map(parse_injection, value["faults"]))
    return Schedule(injections, value.get("seed", seed), value.get("refuses", False))


def read_schedules(path: pathlib.Path, seed: int = 0) -> list[Schedule]:
    """Schedules of a JSON file: one, a list of them, or a report of earlier ones, which has them under "schedules".

    Raises:
      ValueError: says what is wrong with the file.
    """
    try:
        value = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); write a schedule into it.") from None
    if isinstance(value, Mapping) and "schedules" in value:
        value = value["schedules"]
    values: Sequence[Any] = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError(f"{path} has no schedule; add one.")
    return [_from_dict(one, path, seed) for one in values]
