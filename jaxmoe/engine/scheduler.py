"""Which tokens the next step computes: continuous batching with chunked prefill, priorities and preemption.

Pure bookkeeping, no arrays. A step carries a flat list of tokens per rank: one per decoding request first, and its
drafts to verify, then chunks of prompts as far as the budget goes. When pages run out, the request of lowest priority that came last
gives its pages back and waits again; its tokens, those already produced included, are recomputed later.

Only requests of one width share a step. Widths take turns, step by step, whatever the priorities: all who decode get a token in each
round. Requests are admitted in one order for all widths.
"""

import dataclasses
import heapq
from collections import Counter
from collections.abc import Iterable, Sequence

from jaxmoe.engine.pages import PagePool
from jaxmoe.engine.requests import Request
from jaxmoe.errors import JaxMoeError


class QueueFull(JaxMoeError):
    """The engine has as many waiting requests as it may; try again later."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Tokens ``start`` to ``stop`` of a request, and ``drafts`` after its last one, to compute in one step."""

    request: Request
    start: int
    stop: int
    drafts: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Tokens to compute."""
        return self.stop - self.start + len(self.drafts)

    @property
    def samples(self) -> bool:
        """Whether the step reaches the request's last token, so that it yields the next one."""
        return self.stop == self.request.length


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a step and a rank may hold.

    Attributes:
      max_running: requests with pages, per rank.
      max_step_tokens: tokens of one step, per rank.
      max_waiting: requests that may wait in all.
      draft_rows: rows that making drafts writes behind those of a request's step.
      draft_width: at which drafts are made, for requests of higher ones; None: for all.
    """

    max_running: int = 32
    max_step_tokens: int = 256
    max_waiting: int = 1024
    draft_rows: int = 0
    draft_width: int | None = None


def _urgency(request: Request) -> tuple[int, int]:
    """Sorts the most urgent first: priority, then arrival."""
    return -request.priority, request.order


class Scheduler:
    """Waiting and running requests over the page pools of all ranks.

    Args:
      pools: one per rank.
      limits: of a step and a rank.
    """

    def __init__(self, pools: list[PagePool], limits: Limits):
        self.pools, self.limits = pools, limits
        self._waiting: list[tuple[tuple[int, int], Request]] = []
        self.running: list[list[Request]] = [[] for _ in pools]
        self._slots = [list(range(limits.max_running - 1, -1, -1)) for _ in pools]
        self.active = frozenset(range(len(pools)))
        self.preemptions = 0
        self.width_steps: Counter[int | None] = Counter()  # planned so far
        self._last_turn: dict[int | None, int] = {}

    @property
    def waiting(self) -> list[Request]:
        """Requests without pages, the next one first."""
        return [request for _, request in sorted(self._waiting, key=lambda item: item[0])]

    @property
    def waiting_count(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    @property
    def running_count(self) -> int:
        """How many requests hold pages."""
        return sum(map(len, self.running))

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises:
          QueueFull: if too many wait.
          ValueError: if it could never run: its prompt and output do not fit into the pages of a rank.
        """
        pool = self.pools[0]
        tokens = request.most_tokens
        if self._pages_for(tokens, pool) > pool.pages:
            raise ValueError(
                f"prompt plus max_new_tokens ({tokens} tokens) exceed the cache of a rank "
                f"({pool.pages} pages of {pool.page_size}); shorten one or give the engine more pages."
            )
        if len(self._waiting) >= self.limits.max_waiting:
            raise QueueFull(
                f"{len(self._waiting)} requests are waiting, the most allowed (max_waiting); try again later."
            )
        self._push(request)

    def _push(self, request: Request) -> None:
        heapq.heappush(self._waiting, (_urgency(request), request))

    def plan(self) -> list[list[Work]]:
        """The next step's work by rank, all of one width. Assigns pages; admits and preempts as needed."""
        works: list[list[Work]] = [[] for _ in self.pools]
        for width in self._turns():
            works = self._plan_at(width)
            if any(works):
                self._last_turn[width] = self.width_steps.total()
                self.width_steps[width] += 1
                break
        return works

    def _turns(self) -> list[int | None]:
        """Widths that somebody has work for, the one whose last turn is longest ago first."""
        widths = {request.width for running in self.running for request in running}
        if self._waiting:
            widths.add(self._waiting[0][1].width)
        # Widths in turn for the first time: the widest first, as for a lone request.
        return sorted(widths, key=lambda w: (self._last_turn.get(w, -1), -(w or 0)))

    def _plan_at(self, width: int | None) -> list[list[Work]]:
        works: list[list[Work]] = [[] for _ in self.pools]
        budgets = [self.limits.max_step_tokens] * len(self.pools)
        for rank, everyone in enumerate(self.running):
            running = [request for request in everyone if request.width == width]
            # Decoding requests first: a token each for those who wait for one, whatever prompts arrive.
            decoding = sorted((r for r in running if r.length - r.computed == 1), key=_urgency)
            for request in decoding:
                self._add(works[rank], request, 1, budgets, rank)
            filling = sorted((r for r in running if r.length - r.computed > 1), key=_urgency)
            for request in filling:
                self._add(works[rank], request, request.length - request.computed, budgets, rank)
        self._admit(works, budgets, width)
        for rank, mine in enumerate(works):
            works[rank] = self._with_drafts(mine, budgets[rank])
        return works

    def _with_drafts(self, works: list[Work], budget: int) -> list[Work]:
        """The works with as many drafts as there is budget for, and pages that nobody else has asked for."""
        extended = []
        for work in works:
            request, drafts = work.request, work.request.drafts[:budget]
            while drafts and not self._grow(request, work.stop + len(drafts)):
                drafts = drafts[:-1]
            budget -= len(drafts)
            extended.append(dataclasses.replace(work, drafts=drafts) if drafts else work)
            if work.samples and self._drafts_follow(request):
                # A draft is made from the row of the one before; without a page for that it is only a poor one.
                ahead = work.stop + len(drafts) + self.limits.draft_rows
                self._grow(request, min(ahead, request.most_tokens))
        return extended

    def _drafts_follow(self, request: Request) -> bool:
        """Whether drafts are made for a request: at a width of their own only for those above it."""
        if self.limits.draft_rows == 0 or self.limits.draft_width is None:
            return self.limits.draft_rows > 0
        return request.width is not None and request.width > self.limits.draft_width

    def _add(
        self, works: list[Work], request: Request, count: int, budgets: list[int], rank: int
    ) -> None:
        """Adds up to ``count`` of a running request's tokens, if pages can be had and it is still running."""
        if request.rank is None or budgets[rank] == 0:
            return
        stop = request.computed + min(count, budgets[rank])
        while not self._grow(request, stop):
            victim = max(self.running[rank], key=_urgency)
            if victim is not request:
                for work in [work for work in works if work.request is victim]:
                    works.remove(work)
                    budgets[rank] += work.size
            self.preempt(victim)
            if victim is request:
                return
        works.append(Work(request, request.computed, stop))
        budgets[rank] -= works[-1].size

    def _admit(self, works: list[list[Work]], budgets: list[int], width: int | None) -> None:
        """Starts waiting requests in order of urgency while there is room; those of another width compute at its turn."""
        while self._waiting:
            request = self._waiting[0][1]
            now = request.width == width
            ranks = self._ranks_for(request, budgets if now else None)
            rank = next((rank for rank in ranks if self._start(request, rank)), None)
            if rank is None:
                return  # in order: nobody overtakes a request that waits for pages
            heapq.heappop(self._waiting)
            if now:
                count = request.length - request.computed
                self._add(works[rank], request, count, budgets, rank)

    def _ranks_for(self, request: Request, budgets: list[int] | None) -> list[int]:
        """Ranks that could start the request now, best first: where most is cached already and least is left to compute."""
        tokens = request.tokens(0, request.length)

        def left(rank: int) -> int:
            running = sum(other.most_tokens - other.computed for other in self.running[rank])
            return running - self.pools[rank].known(tokens, request.width)

        ranks = [
            rank for rank in self.active if self._slots[rank] and (budgets is None or budgets[rank])
        ]
        return sorted(ranks, key=lambda rank: (left(rank), -self.pools[rank].available))

    def _start(self, request: Request, rank: int) -> bool:
        """Gives a waiting request the pages it shares and those for its tokens; False (and nothing) if it can't have them."""
        pool = self.pools[rank]
        tokens = request.tokens(0, request.length)
        shared = pool.match(tokens, request.width)
        # The whole of what it has so far, so that it does not start only to be preempted by its own growth.
        missing = self._pages_for(request.length, pool) - len(shared)
        own = pool.allocate(missing)
        if own is None:
            pool.release(shared)
            return False
        request.pages = shared + own
        request.computed = len(shared) * pool.page_size
        if not request.preemptions:
            request.cached_tokens = request.computed
        request.rank, request.slot = rank, self._slots[rank].pop()
        self.running[rank].append(request)
        return True

    def _grow(self, request: Request, tokens: int) -> bool:
        """Makes sure that the request has pages for its first ``tokens`` tokens."""
        pool = self.pools[request.rank]
        missing = self._pages_for(tokens, pool) - len(request.pages)
        if missing <= 0:
            return True
        own = pool.allocate(missing)
        if own is None:
            return False
        request.pages += own
        return True

    @staticmethod
    def _pages_for(tokens: int, pool: PagePool) -> int:
        return -(-tokens // pool.page_size)

    def advance(self, work: Work, accepted: Sequence[int] = ()) -> None:
        """Notes that a step's rows are in the cache, and lets later prompts find full pages.

        Args:
          work: what the step computed.
          accepted: those of its drafts that have turned out right.
        """
        request = work.request
        before, request.computed = request.computed, work.stop + len(accepted)
        request.drafts = ()
        pool = self.pools[request.rank]
        if before // pool.page_size < request.computed // pool.page_size:
            known = [*request.tokens(0, work.stop), *accepted]
            pool.publish(known, request.pages, request.width)

    def preempt(self, request: Request) -> None:
        """Takes a running request's pages away; it waits again, with its tokens."""
        self._leave(request)
        request.computed = 0
        request.preemptions += 1
        self.preemptions += 1
        self._push(request)

    def adopt(self, active: Iterable[int], lost: Iterable[int]) -> list[Request]:
        """Goes on with other ranks; returns the requests whose rows are gone, which wait again with their tokens.

        Args:
          active: ranks that take part from now on.
          lost: ranks whose cache is gone, for good or because they have begun anew.
        """
        self.active = frozenset(active)
        moved = []
        for rank in lost:
            for request in list(self.running[rank]):
                self.preempt(request)
                moved.append(request)
            self.pools[rank].forget()
        return moved

    def finish(self, request: Request) -> None:
        """Forgets a request, running or waiting, and releases its pages."""
        if request.rank is not None:
            self._leave(request)
            return
        self._waiting = [item for item in self._waiting if item[1] is not request]
        heapq.heapify(self._waiting)

    def _leave(self, request: Request) -> None:
        self.running[request.rank].remove(request)
        self._slots[request.rank].append(request.slot)
        self.pools[request.rank].release(request.pages)
        request.pages, request.rank, request.slot, request.drafts = [], None, None, ()

    def everyone(self) -> Iterable[Request]:
        """All requests, running first."""
        for running in self.running:
            yield from running
        for _, request in self._waiting:
            yield request
