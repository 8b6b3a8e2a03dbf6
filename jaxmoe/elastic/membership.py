"""Who takes part: an immutable membership with an epoch, the one place that changes it, and the fence before late messages.

Ranks are never renumbered: a lost rank leaves a hole, and a replacement takes the hole under a higher incarnation.
"""

import dataclasses
import threading
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Any

from jaxmoe.errors import JaxMoeError

_REMEMBERED = 1000  # memberships; every part of a rebalancing has one


class StaleMembership(JaxMoeError):
    """A change was planned from a membership that is no longer the current one; plan again from the current one."""


@dataclasses.dataclass(frozen=True)
class Membership:
    """The ranks that take part in an epoch.

    Attributes:
      epoch: number of this membership, higher in every later one.
      active: whether each rank of the capacity takes part.
      incarnations: of each rank's process, the last one admitted; -1 where there was never one.
    """

    epoch: int
    active: tuple[bool, ...]
    incarnations: tuple[int, ...]

    def __post_init__(self):
        if self.epoch < 0:
            raise ValueError(f"epoch must be >= 0; got {self.epoch}.")
        if not self.active:
            raise ValueError(
                "active must have an entry per rank; got none. Give at least one rank."
            )
        if len(self.active) != len(self.incarnations):
            raise ValueError(
                f"incarnations must have an entry per rank ({len(self.active)}); got {len(self.incarnations)}."
            )
        for rank, (active, incarnation) in enumerate(
            zip(self.active, self.incarnations, strict=True)
        ):
            if incarnation < (0 if active else -1):
                raise ValueError(
                    f"incarnations must be >= 0 for an active rank and >= -1 for others; got {incarnation} for rank {rank}."
                )

    @classmethod
    def initial(cls, ranks: int, *, capacity: int | None = None) -> "Membership":
        """Epoch 0: ranks 0 to ``ranks`` - 1 are active in incarnation 0; the others, up to ``capacity``, can join later."""
        capacity = ranks if capacity is None else capacity
        if not 1 <= ranks <= capacity:
            raise ValueError(
                f"ranks must be from 1 to capacity; got ranks={ranks}, capacity={capacity}."
            )
        active = tuple(rank < ranks for rank in range(capacity))
        return cls(0, active, tuple(0 if on else -1 for on in active))

    @property
    def capacity(self) -> int:
        """How many ranks there can be; tables are sized by it."""
        return len(self.active)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The active ranks, ascending."""
        return tuple(rank for rank, active in enumerate(self.active) if active)

    def without(self, ranks: Iterable[int]) -> "Membership":
        """The next epoch, in which ``ranks`` are gone.

        Raises:
          ValueError: if there are none, or one of them is not active.
        """
        gone = set(ranks)
        if not gone:
            raise ValueError("ranks must name at least one rank to remove; got none.")
        for rank in sorted(gone):
            if not (0 <= rank < self.capacity and self.active[rank]):
                raise ValueError(
                    f"ranks must be active in epoch {self.epoch} ({_list(self.ranks)}); got {rank}."
                )
        active = tuple(on and rank not in gone for rank, on in enumerate(self.active))
        return Membership(self.epoch + 1, active, self.incarnations)

    def with_joined(self, rank: int, incarnation: int) -> "Membership":
        """The next epoch, in which a new process takes part as ``rank``.

        Raises:
          ValueError: if the rank is not a hole, or the incarnation not higher than all before it at this rank.
        """
        if not 0 <= rank < self.capacity or self.active[rank]:
            holes = [hole for hole, on in enumerate(self.active) if not on]
            raise ValueError(
                f"rank must be an inactive one in epoch {self.epoch} ({_list(holes)}); got {rank}."
            )
        if incarnation <= self.incarnations[rank]:
            raise ValueError(
                f"incarnation of rank {rank} must be higher than {self.incarnations[rank]}, its last one; "
                f"got {incarnation}. A process that was removed has to restart."
            )
        active, incarnations = list(self.active), list(self.incarnations)
        active[rank], incarnations[rank] = True, incarnation
        return Membership(self.epoch + 1, tuple(active), tuple(incarnations))

    def renewed(self) -> "Membership":
        """The next epoch, of the same processes: what was under way in the old one is void."""
        return dataclasses.replace(self, epoch=self.epoch + 1)

    def refusal(self, epoch: int, rank: int, incarnation: int) -> str | None:
        """Why a message with this stamp doesn't count in this epoch; None if it does."""
        if not (0 <= rank < self.capacity):
            return "unknown rank"
        if incarnation != self.incarnations[rank]:
            return "old incarnation" if incarnation < self.incarnations[rank] else "new incarnation"
        if not self.active[rank]:
            return "inactive rank"
        if epoch != self.epoch:
            return "old epoch" if epoch < self.epoch else "new epoch"
        return None

    def admits(self, epoch: int, rank: int, incarnation: int) -> bool:
        """Whether a message with this stamp belongs to this epoch and comes from one of its processes."""
        return self.refusal(epoch, rank, incarnation) is None

    def check_successor(self, new: "Membership") -> None:
        """Raises ValueError unless ``new`` may follow: later, of the same capacity, and nobody back under an old incarnation."""
        if new.capacity != self.capacity:
            raise ValueError(
                f"capacity is fixed at {self.capacity} ranks; got a membership of {new.capacity}."
            )
        if new.epoch <= self.epoch:
            raise ValueError(
                f"epoch must be higher than {self.epoch}, the current one; got {new.epoch}."
            )
        for rank, (before, after) in enumerate(
            zip(self.incarnations, new.incarnations, strict=True)
        ):
            returns = new.active[rank] and not self.active[rank]
            if after < before + returns:
                raise ValueError(
                    f"incarnation of rank {rank} must be at least {before + returns}; got {after}."
                )

    def to_dict(self) -> dict[str, Any]:
        """For messages and files (JSON types only)."""
        return {
            "epoch": self.epoch,
            "active": list(self.active),
            "incarnations": list(self.incarnations),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Membership":
        """The inverse of ``to_dict``."""
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            raise ValueError(
                f"a membership has exactly {_list(sorted(names))}; got {_list(sorted(values))}."
            )
        return cls(int(values["epoch"]), tuple(values["active"]), tuple(values["incarnations"]))


class Ledger:
    """The controller's record of memberships: the only way to change the current one. Safe to use from several threads.

    Args:
      first: the membership to begin with.
    """

    def __init__(self, first: Membership):
        self._history = deque([first], _REMEMBERED)
        self._lock = threading.Lock()

    @property
    def current(self) -> Membership:
        """The membership that holds now."""
        return self._history[-1]

    @property
    def history(self) -> tuple[Membership, ...]:
        """The latest memberships that were committed, at most 1000, oldest first."""
        return tuple(self._history)

    def commit(self, expected_epoch: int, new: Membership) -> Membership:
        """Makes ``new`` current if the current epoch is still the one it was planned from.

        Args:
          expected_epoch: of the membership that the change was planned from.
          new: the membership to commit.

        Raises:
          StaleMembership: if another change came first.
          ValueError: if ``new`` can't follow the current membership.
        """
        with self._lock:
            if self.current.epoch != expected_epoch:
                raise StaleMembership(
                    f"the change was planned from epoch {expected_epoch} and the current one is "
                    f"{self.current.epoch}; plan again."
                )
            self.current.check_successor(new)
            self._history.append(new)
            return new


class Fence:
    """Lets messages of the current epoch pass and counts the others. Safe to use from several threads.

    Args:
      membership: the one that holds now.
    """

    def __init__(self, membership: Membership):
        self._membership = membership
        self._dropped: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    @property
    def membership(self) -> Membership:
        """The membership that messages are held against."""
        return self._membership

    @property
    def dropped(self) -> dict[tuple[str, str], int]:
        """How many messages were refused, by (kind of message, reason)."""
        with self._lock:
            return dict(self._dropped)

    def adopt(self, membership: Membership) -> None:
        """Goes on with a later membership; the current one again changes nothing.

        Raises:
          ValueError: if it can't follow the current one.
        """
        with self._lock:
            if membership != self._membership:
                self._membership.check_successor(membership)
                self._membership = membership

    def admits(self, kind: str, epoch: int, rank: int, incarnation: int) -> bool:
        """Whether a message may be acted on; if not, it is counted and must be dropped."""
        with self._lock:
            refusal = self._membership.refusal(epoch, rank, incarnation)
            if refusal is not None:
                self._dropped[kind, refusal] += 1
            return refusal is None


def _list(items: Iterable[Any]) -> str:
    return ", ".join(map(str, items)) or "none"
