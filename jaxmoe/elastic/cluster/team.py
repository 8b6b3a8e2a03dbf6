"""The ranks that take part, and how they are asked: every answer, or who is to blame that there is none."""

import logging
import time
from collections import Counter
from collections.abc import Iterable
from multiprocessing.connection import wait
from typing import Any

from jaxmoe.elastic.cluster.messages import Ping, Reply
from jaxmoe.elastic.cluster.supervisor import Member
from jaxmoe.elastic.membership import Fence, Ledger, Membership
from jaxmoe.errors import JaxMoeError

logger = logging.getLogger(__name__)


class RankFailed(JaxMoeError):
    """Something asked of all ranks has failed, because these have died or fallen silent; or, if there are none, for now."""

    def __init__(self, ranks: Iterable[int]):
        self.ranks = frozenset(ranks)
        super().__init__(f"ranks {sorted(self.ranks)} have failed.")


class Team:
    """Members, their membership, and the fence before answers of others.

    Args:
      membership: the first one.
      silence_s: after so long without an answer to a ping a rank counts as dead.
    """

    def __init__(self, membership: Membership, silence_s: float):
        self.members: dict[int, Member] = {}
        self._ledger, self._fence = Ledger(membership), Fence(membership)
        self._silence_s = silence_s
        self._pings = 0
        self.last_error = "none"
        self.asked = ""  # what was asked of members last, but for giving up
        self._strikes: Counter[int] = (
            Counter()
        )  # errors of a rank's own since the last step that all have done

    @property
    def membership(self) -> Membership:
        """The current one."""
        return self._ledger.current

    @property
    def epoch(self) -> int:
        """Of the current membership."""
        return self.membership.epoch

    @property
    def dropped(self) -> dict[str, int]:
        """Answers that did not count, by "kind: reason"."""
        return {f"{kind}: {why}": count for (kind, why), count in self._fence.dropped.items()}

    @property
    def dead(self) -> set[int]:
        """Members whose processes have ended."""
        return {rank for rank, member in self.members.items() if not member.alive}

    def commit(self, new: Membership) -> None:
        """Goes on with a later membership."""
        self._ledger.commit(self.epoch, new)
        self._fence.adopt(new)

    def tell(self, message: Any) -> None:
        """Sends the same to all."""
        for member in self.members.values():
            member.send(message)

    def gather(
        self,
        kind: str,
        deadline_s: float,
        number: int = 0,
        of: Iterable[int] | None = None,
        silence_s: float | None = None,
    ) -> dict[int, Reply]:
        """One answer of this kind and epoch from every member, or from those ``of`` whom one is expected.

        Args:
          kind: of the answers.
          deadline_s: after this, who has not answered has failed.
          number: of the answers.
          of: ranks; default all.
          silence_s: another limit than the team's, for what keeps a process from answering pings in time.

        Raises:
          RankFailed: if some have died, fall silent, fail by themselves or take too long; naming nobody if it was a collective
            that failed, or a step that took too long, although all live: who is to blame shows when they give up.
        """
        self.asked = self.asked if kind == "aborted" else kind
        answers: dict[int, Reply] = {}
        asked = pinged = time.monotonic()
        silence_s = silence_s or self._silence_s
        expected = set(self.members if of is None else of)
        # Of the others too: those of whom something is expected may be waiting for one of them.
        heard, idle, looked = dict.fromkeys(self.members, asked), Counter[int](), asked
        while missing := expected - set(answers):
            for reply in self._received(self.members, silence_s / 4):
                heard[reply.rank] = time.monotonic()
                if reply.kind == "failed" and kind != "aborted":
                    self.last_error = reply.value.error
                    logger.warning("failed rank=%d error=%s", reply.rank, reply.value.error)
                    raise RankFailed(self._blame(reply))
                if reply.kind == kind and reply.number == number:
                    answers[reply.rank] = reply
                elif reply.kind == "pong":
                    idle[reply.rank] = idle[reply.rank] + 1 if reply.value else 0
            now = time.monotonic()
            if now - looked > silence_s / 2:  # this process has stood still, not they
                heard = dict.fromkeys(heard, now)
            looked = now
            silent = {rank for rank in heard if now - heard[rank] > silence_s}
            # Twice idle, and no answer: it has been lost on the way. Once, it may be just coming.
            silent |= {rank for rank in missing if idle[rank] > 1 and rank not in answers}
            if silent:
                raise RankFailed(silent)
            if now - asked > deadline_s:
                raise RankFailed(() if kind == "done" else missing - set(answers))
            if now - pinged > silence_s / 4:
                pinged = now
                self._ping(self.members)
        if kind == "done":
            self._strikes.clear()
        return answers

    def _received(self, ranks: Iterable[int], timeout_s: float) -> Iterable[Reply]:
        """Answers of the current epoch as they come in, until ``timeout_s``; those of others are dropped.

        Raises:
          RankFailed: if one's connection has ended.
        """
        connections = {self.members[rank].connection: rank for rank in ranks}
        for ready in wait(list(connections), timeout_s):
            rank = connections[ready]
            try:
                reply: Reply = ready.recv()
            except (EOFError, OSError):
                raise RankFailed([rank]) from None  # the others can't go on without it
            member = self.members[rank]
            member.compiles = reply.compiles
            if self._fence.admits(reply.kind, reply.epoch, reply.rank, reply.incarnation):
                yield reply

    def _ping(self, ranks: Iterable[int]) -> int:
        self._pings += 1
        for rank in ranks:
            self.members[rank].send(Ping(self.epoch, self._pings))
        return self._pings

    def _blame(self, failure: Reply) -> set[int]:
        """Whose fault a failure is: of a rank that has failed by itself before; else of whoever is dead or does not answer, as
        a rule a peer that is just dying."""
        if failure.value.own:
            self._strikes[failure.rank] += 1
            again = self._strikes[failure.rank] > 1 and len(self.members) > 1
            return {failure.rank} if again else set()
        return self.silent()

    def silent(self) -> set[int]:
        """Members that are dead, or do not answer a ping in time."""
        number, waiting = self._ping(self.members), set(self.members)
        until = time.monotonic() + self._silence_s
        try:
            left = self._silence_s
            while waiting and left:
                left = max(
                    0.0, until - time.monotonic()
                )  # once more at the end, for what has come already
                for reply in self._received(waiting, left):
                    if reply.kind == "pong" and reply.number == number:
                        waiting.discard(reply.rank)
        except RankFailed as error:
            return set(error.ranks) | self.dead
        return waiting
