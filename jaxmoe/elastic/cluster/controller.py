"""What happens between steps: ranks that are lost, return, or go on purpose, and experts that move. On the engine's thread."""

import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from jaxmoe.elastic.cluster.drains import Drain, Drains
from jaxmoe.elastic.cluster.layout import Layout, Phases
from jaxmoe.elastic.cluster.messages import Abort, Fetch, Stop
from jaxmoe.elastic.cluster.options import ClusterOptions
from jaxmoe.elastic.cluster.orders import OrdersExhausted
from jaxmoe.elastic.cluster.startup import FLOOR, Startup
from jaxmoe.elastic.cluster.status import Event, EventType
from jaxmoe.elastic.cluster.supervisor import Member, Supervisor
from jaxmoe.elastic.cluster.team import RankFailed, Team
from jaxmoe.elastic.membership import Membership
from jaxmoe.elastic.placement import CoverageLost
from jaxmoe.elastic.repair import Plan
from jaxmoe.engine.runner import Change
from jaxmoe.errors import JaxMoeError

logger = logging.getLogger(__name__)

MOST_TRIES = 5  # of a step that fails although no rank is gone
_RECENT_STEPS = 64  # whose sizes are likely
_START_AGAIN_S = 1.0  # after a process could not be started at all
_CALM_STEPS = 8  # after a change, before the next one is prepared for


class Controller:
    """Who takes part, what they hold, and every change of that.

    Args:
      startup: the processes.
      options: of the cluster.
    """

    def __init__(self, startup: Startup, options: ClusterOptions):
        self._startup, self._options = startup, options
        self._tasks: queue.SimpleQueue[tuple[Callable[[], None], Future]] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._quiet = False  # nothing has been heard of the ranks for a while
        self.events: list[Event] = []
        # Ranks that have lost their caches, which the engine does not know yet.
        self.owed: set[int] = set()
        self._begin(0)
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        """Has the ranks asked now and then whether they live, though nothing else is asked of them."""
        while not self._closed.wait(self._options.silence_s):
            self._quiet = True
            self._startup.on_change()

    def _begin(self, epoch: int) -> None:
        """Starts all processes and begins an epoch."""
        options, capacity = self._options, self._startup.capacity
        self.drains, self._wanted = Drains(), options.ranks
        self._plans: dict[Member, Plan] = {}  # of ranks that wait: what they are getting
        self._tries = 0
        self._sizes: deque[int] = deque(maxlen=_RECENT_STEPS)
        self._seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._prepared: tuple[int, frozenset[int]] | None = None  # epoch and sizes
        self._steps, self._seen = 0, -1  # steps of the epoch that the last one belonged to
        self._failures: Counter[int] = Counter()  # of ranks to get their experts
        self._returns: dict[int, float] = {}  # of ranks that are to be started: when
        members, placement = self._startup.begin()
        taking_part = tuple(rank in members for rank in range(capacity))
        incarnations = tuple(
            members[r].incarnation if r in members else -1 for r in range(capacity)
        )
        self.team = Team(Membership(epoch, taking_part, incarnations), options.silence_s)
        self.team.members.update(members)
        memory, orders = self._startup.memory, self._startup.orders()
        self.layout = Layout(self.team, placement, memory, orders, options.deadline_s)
        try:
            self.layout.begin(Phases())
        except BaseException:
            self._end_processes()
            raise

    def end(self) -> None:
        """Ends all processes; whoever still waits for something learns that it will not come."""
        self._closed.set()
        self._end_processes()
        self._disappoint("the cluster is closed.")
        self._fail_tasks()

    def _end_processes(self) -> None:
        for member in list(self.team.members.values()):  # the engine may be changing them
            member.end()
        self.team.members.clear()
        self._startup.end()  # last: processes that miss the coordination service complain

    def _disappoint(self, why: str) -> None:
        for drain in self.drains.running.values():
            _fail(drain.future, why)
        self.drains.running.clear()

    def between_steps(self, work: Callable[[], None], future: Future) -> None:
        """Has the engine's thread do something; ``future`` is told if it can't."""
        if self._closed.is_set():
            _fail(future, "the cluster is closed.")
            return
        self._tasks.put((work, future))
        if self._closed.is_set():  # just now: nobody may have seen it
            self._fail_tasks()

    def _fail_tasks(self) -> None:
        while True:
            try:
                _, future = self._tasks.get_nowait()
            except queue.Empty:
                return
            _fail(future, "the cluster is closed.")

    # -- orders from outside -----------------------------------------------------------------------

    @property
    def supervisor(self) -> Supervisor:
        """Of the processes that do not take part."""
        return self._startup.supervisor

    def drain(self, rank: int, drain: Drain) -> None:
        """Begins to take a rank out."""
        if rank not in self.open:
            drain.future.set_exception(
                ValueError(f"rank must take part ({list(self.open)}) to be drained; got {rank}.")
            )
        elif missing := self._needed(rank):
            drain.future.set_exception(missing)
        else:
            self.drains.running[rank] = drain

    def _needed(self, rank: int) -> CoverageLost | None:
        """Why a rank cannot be done without; None if it can."""
        rest = len(self.team.members.keys() - self.drains.running.keys() - {rank})
        placement = self.layout.placement
        slots = rest * placement.slots_per_rank
        if slots >= placement.experts:
            return None
        return CoverageLost(
            f"without rank {rank} the other {rest} ranks have {slots} slots per layer for {placement.experts} experts; "
            "bring another one back first."
        )

    def resume(self, rank: int, future: Future) -> None:
        """Starts a rank that is out."""
        there = {*(m.rank for m in self.supervisor.waiting), *self.team.members}
        if rank in there:
            future.set_exception(
                ValueError(f"rank must be out to be resumed; got {rank}, which has a process.")
            )
            return
        if rank in self.drains.done:
            self.drains.done.discard(rank)
            self._wanted += 1
        self.supervisor.given_up.discard(rank)
        self._launch(rank)
        future.set_result(None)

    # -- changes -----------------------------------------------------------------------------------

    @property
    def open(self) -> tuple[int, ...]:
        """Ranks that get new requests."""
        return tuple(rank for rank in self.team.membership.ranks if rank not in self.drains.running)

    def change(self) -> Change:
        """What the engine has to know."""
        return Change(self.open, frozenset(self.owed))

    def _joiner(self) -> Member | None:
        """The process that something is to be done for, so that it takes part."""
        if len(self.team.membership.ranks) >= self._wanted:
            return None
        ready = self.supervisor.ready
        self._plans = {m: plan for m, plan in self._plans.items() if m in ready}
        asked = [member for member in ready if member in self._plans]
        if asked:  # one at a time: every change makes the plans of others void
            return asked[0] if asked[0].answer is not None else None
        return ready[0] if ready else None

    def pending(self) -> bool:
        """Whether ``poll`` has something to do."""
        return bool(
            self.team.dead
            or not self._tasks.empty()
            or self.drains.running
            or self._joiner()
            or self.owed
            or self._quiet
            or any(due <= time.monotonic() for due in self._returns.values())
            or (self.layout.restless and not self._fetching)
        )

    def poll(self) -> Change | None:
        """Between steps: takes note of ranks that have died, takes in those that have returned, evens out the experts."""
        return self.guarded(self._poll)

    def guarded(self, work: Callable[[], Any]) -> Any:
        """Does work in which ranks may fail, and what follows if they do."""
        try:
            try:
                return work()
            except RankFailed as error:
                return self.recover(error.ranks)
        except OrdersExhausted as error:
            return self._renew(str(error))

    def _poll(self) -> Change | None:
        if dead := self.team.dead:
            return self.recover(dead)
        self._launch_due()
        while not self._tasks.empty():
            work, future = self._tasks.get()
            try:
                work()
            except Exception as error:
                if not future.done():
                    future.set_exception(error)
                raise
        if change := self._go_on_draining():
            return change
        if member := self._joiner():
            return self._go_on_joining(member)
        if self.layout.restless and not self._fetching:
            return self._tidy()
        if self._quiet:
            self._quiet = False
            if silent := self.team.silent():
                return self.recover(silent)
        return None

    @property
    def _fetching(self) -> bool:
        """Whether a process is getting its experts: the placement had better not change now."""
        return any(member in self._plans for member in self.supervisor.ready)

    def _tell(self, kind: EventType, ranks: Iterable[int], phases: Phases) -> None:
        """Takes note of a change."""
        event = Event(
            kind,
            tuple(sorted(ranks)),
            self.team.epoch,
            phases.at,
            phases.total,
            dict(phases.seconds),
            self.team.membership.ranks,
            self.layout.placement.min_copies,
        )
        self.events.append(event)
        logger.warning(
            "%s ranks=%s epoch=%d active=%s seconds=%.3f",
            kind,
            list(event.ranks),
            event.epoch,
            list(event.active),
            event.seconds,
        )

    def step_done(self, size: int, seconds: float) -> None:
        """A step of ``size`` tokens has been computed by all."""
        self._tries, self._quiet = 0, False
        self._sizes.append(size)
        self._seconds.append(seconds)
        # What is lost is computed again, in large steps.
        self.layout.sizes = tuple({size, self._startup.largest_step})
        self._steps = self._steps + 1 if self._seen == self.team.epoch else 1
        self._seen = self.team.epoch
        likely = frozenset({*self._sizes, self._startup.largest_step})
        ready = (self._seen, likely)
        if self._steps >= _CALM_STEPS and ready != self._prepared and not self._options.frozen:
            self.layout.likely, self._prepared = tuple(likely), ready
            self.layout.prepare()

    def _launch_due(self) -> None:
        """Starts ranks that have been away for long enough."""
        now = time.monotonic()
        for rank in [rank for rank, due in self._returns.items() if due <= now]:
            self._launch(rank)

    def _launch(self, rank: int) -> None:
        self._returns.pop(rank, None)
        self.layout.began(rank)
        try:
            self._startup.launch(rank)
        except OSError as error:  # no memory, no descriptors: requests go on without it
            logger.error("rank %d could not be started: %s", rank, error)
            self._returns[rank] = time.monotonic() + _START_AGAIN_S

    def recover(self, gone: Iterable[int]) -> Change:
        """Goes on without ``gone``, and without those that fail meanwhile; with nobody gone, with the same ranks once more."""
        phases, gone, lost = Phases(), set(gone), set()
        while True:
            self._tries = 0 if gone else self._tries + 1
            lost |= gone
            self.owed |= gone
            for rank in gone & set(self.team.members):
                self.team.members.pop(rank).end()
            current = self.team.membership
            leaving = gone & set(current.ranks)
            self.team.commit(current.without(leaving) if leaving else current.renewed())
            try:
                self._abort()
                phases.mark("abort")
                self.layout.repair(phases, lost)
                break
            except RankFailed as error:
                gone = set(error.ranks)
                if self._tries > MOST_TRIES:
                    break
        self._tell("lost" if lost else "retried", lost, phases)
        for rank in lost:
            if rank in self.drains.running:
                self._out(rank)
            elif self._options.respawn:
                self._returns[rank] = time.monotonic() + self._options.respawn_delay_s
        self._launch_due()
        if self._tries > MOST_TRIES:
            tries, self._tries = self._tries, 0
            raise JaxMoeError(f"a step has failed {tries} times: {self.team.last_error}")
        self._settle(anew=False)
        return self.change()

    def _settle(self, *, anew: bool) -> None:
        self.layout.settle(FLOOR, self._options.chunk_moves, anew=anew)

    def _abort(self) -> None:
        """Members end what they are doing. Who does not come out of a step hangs; anything else may take its time."""
        self.team.tell(Abort(self.team.epoch))
        hanging = max(self._options.silence_s, 3 * max(self._seconds, default=0.0))
        limit = hanging if self.team.asked == "done" else self._options.deadline_s
        self.team.gather("aborted", limit)

    def _renew(self, reason: str) -> Change:
        """Starts all processes again; requests wait for them."""
        logger.warning("all ranks start again: %s", reason)
        phases, epoch = Phases(), self.team.epoch
        self.owed |= set(range(self._startup.capacity))
        self._disappoint("all ranks have been started again.")
        self._end_processes()
        try:
            self._begin(epoch + 1)
        except RankFailed:
            self._begin(epoch + 2)
        phases.mark("load")
        self._tell("renewed", self.team.membership.ranks, phases)
        return self.change()

    def _go_on_draining(self) -> Change | None:
        new = [drain for drain in self.drains.running.values() if not drain.announced]
        for drain in new:
            drain.announced = True
        if new:
            return self.change()
        due = [rank for rank, drain in self.drains.running.items() if drain.due]
        if not due:
            return None
        if missing := self._needed(due[0]):  # others have gone meanwhile
            self.drains.running.pop(due[0]).future.set_exception(missing)
            return self.change()
        return self._leave(due[0])

    def _leave(self, rank: int) -> Change:
        """A rank goes on purpose: the others get from it what they need."""
        phases, member = Phases(), self.team.members.pop(rank)
        self.team.commit(self.team.membership.without([rank]))
        try:
            self.layout.repair(phases, leaving={rank: member})
            member.send(Stop())
        except RankFailed as error:
            return self.recover({*error.ranks, rank})
        finally:
            member.end()
        self.owed.add(rank)
        self._out(rank)
        self._tell("drained", [rank], phases)
        self._settle(anew=True)
        return self.change()

    def _out(self, rank: int) -> None:
        self.drains.done.add(rank)
        self._wanted -= 1
        self.drains.running.pop(rank).future.set_result(None)

    def _go_on_joining(self, member: Member) -> Change | None:
        """A rank that is ready gets its experts, while the others serve; when it has them, it takes part."""
        plan = self._plans.pop(member, None)
        if not self._startup.same(member):
            return self._give_up(member, "it has loaded other weights than the others")
        if self.layout.refusal is not None:
            return self._join(member, None)
        if plan is None or plan.epoch != self.team.epoch:
            plan = self._plans[member] = self.layout.join_plan(member.rank)
            fills = self.layout.fills_for(plan, member.rank)
            fetch = Fetch(self.team.epoch, fills, self.layout.prepare_for(member.rank))
            self.supervisor.ask(member, fetch, "fetched", self._options.deadline_s)
            return None
        answer = member.answer
        if answer.kind == "failed" or answer.value.failed:
            logger.warning("rank %d could not get its experts: %s", member.rank, answer.value)
            self._failures[member.rank] += 1
            if self._failures[member.rank] > MOST_TRIES:
                return self._give_up(member, "it cannot get its experts")
            return self.mend()  # a source may be damaged
        return self._join(member, plan)

    def _give_up(self, member: Member, why: str) -> None:
        logger.error("rank %d is given up: %s", member.rank, why)
        self.supervisor.drop(member.rank)
        self.supervisor.given_up.add(member.rank)

    def _join(self, member: Member, plan: Plan | None) -> Change | None:
        phases, rank = Phases(), member.rank
        if not self.supervisor.take(member):
            return None  # it has just died
        self._failures.pop(rank, None)
        self.team.commit(self.team.membership.with_joined(rank, member.incarnation))
        self.team.members[rank] = member
        try:
            if plan is None:
                self.layout.repair(phases)
            else:
                self.layout.join(plan, phases)
        except RankFailed as error:
            return self.recover(error.ranks)
        self._tell("joined", [rank], phases)
        self._settle(anew=True)
        return self.change()

    def _tidy(self) -> None:
        phases = Phases()
        try:
            self.layout.tidy(phases)
        except CoverageLost:
            return self.mend()
        if not self.layout.restless:
            self._tell("rebalanced", self.team.membership.ranks, phases)
        return None

    def mend(self) -> Change | None:
        """Compares all weights with their checksums, and gets those again that are damaged; None if none are."""
        phases = Phases()
        wrong = [
            (rank, layer, slot)
            for rank, found in self.layout.verify().items()
            for layer, slot in found.wrong
        ]
        phases.mark("plan")
        if not wrong:
            return None
        self.team.commit(self.team.membership.renewed())
        self.layout.repair(phases, wrong=wrong)
        self._tell("repaired", {rank for rank, _, _ in wrong}, phases)
        self._settle(anew=False)
        return self.change()


def _fail(future: Future, why: str) -> None:
    if not future.done():
        future.set_exception(JaxMoeError(why))
