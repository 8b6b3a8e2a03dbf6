"""Which tokens the next step computes: continuous batching with chunked prefill, priorities and preemption.

Pure bookkeeping, no arrays. A step carries a flat list of tokens per rank: one per decoding request first, then
chunks of prompts as far as the budget goes. When pages run out, the request of lowest priority that came last
gives its pages back and waits again; its tokens, those already produced included, are recomputed later.
"""

import dataclasses
import heapq
from collections.abc import Iterable

from jaxmoe.engine.pages import PagePool
from jaxmoe.engine.requests import Request
from jaxmoe.errors import JaxMoeError


class QueueFull(JaxMoeError):
    """The engine has as many waiting requests as it may; try again later."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Tokens ``start`` to ``stop`` of a request, to compute in one step."""

    request: Request
    start: int
    stop: int

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
    """

    max_running: int = 32
    max_step_tokens: int = 256
    max_waiting: int = 1024


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
        self.preemptions = 0

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
        tokens = len(request.prompt) + request.sampling.max_new_tokens
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
        """The next step's work by rank. Assigns pages; admits and preempts as needed."""
        works: list[list[Work]] = [[] for _ in self.pools]
        budgets = [self.limits.max_step_tokens] * len(self.pools)
        for rank, running in enumerate(self.running):
            # Decoding requests first: a token each for those who wait for one, whatever prompts arrive.
            decoding = sorted((r for r in running if r.length - r.computed == 1), key=_urgency)
            for request in decoding:
                self._add(works[rank], request, 1, budgets, rank)
            filling = sorted((r for r in running if r.length - r.computed > 1), key=_urgency)
            for request in filling:
                self._add(works[rank], request, request.length - request.computed, budgets, rank)
        self._admit(works, budgets)
        return works

    def _add(
        self, works: list[Work], request: Request, count: int, budgets: list[int], rank: int
    ) -> None:
        """Adds up to ``count`` of a running request's tokens, if pages can be had and it is still running."""
        if request.rank is None or budgets[rank] == 0:
            return
        stop = request.computed + min(count, budgets[rank])
        while not self._grow(request, stop):
            victim = max(self.running[rank], key=_urgency)
            if any(work.request is victim for work in works) and victim is not request:
                works[:] = [work for work in works if work.request is not victim]
            self.preempt(victim)
            if victim is request:
                return
        works.append(Work(request, request.computed, stop))
        budgets[rank] -= stop - request.computed

    def _admit(self, works: list[list[Work]], budgets: list[int]) -> None:
        """Starts waiting requests in order of urgency, on the rank with most room, while there is any."""
        while self._waiting:
            request = self._waiting[0][1]
            rank = self._best_rank(budgets)
            if rank is None:
                return
            if not self._start(request, rank):
                return  # in order: nobody overtakes a request that waits for pages
            heapq.heappop(self._waiting)
            count = request.length - request.computed
            self._add(works[rank], request, count, budgets, rank)

    def _best_rank(self, budgets: list[int]) -> int | None:
        rooms = [
            (pool.available, -len(self.running[rank]), -rank)
            for rank, pool in enumerate(self.pools)
            if budgets[rank] and self._slots[rank]
        ]
        return -max(rooms)[2] if rooms else None

    def _start(self, request: Request, rank: int) -> bool:
        """Gives a waiting request the pages it shares and those for its tokens; False (and nothing) if it can't have them."""
        pool = self.pools[rank]
        tokens = request.tokens(0, request.length)
        shared = pool.match(tokens)
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

    def advance(self, work: Work) -> None:
        """Notes that a step's rows are in the cache, and lets later prompts find full pages."""
        request = work.request
        before, request.computed = request.computed, work.stop
        pool = self.pools[request.rank]
        if before // pool.page_size < work.stop // pool.page_size:
            pool.publish(request.tokens(0, work.stop), request.pages)

    def preempt(self, request: Request) -> None:
        """Takes a running request's pages away; it waits again, with its tokens."""
        self._leave(request)
        request.computed = 0
        request.preemptions += 1
        self.preemptions += 1
        self._push(request)

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
        request.pages, request.rank, request.slot = [], None, None

    def everyone(self) -> Iterable[Request]:
        """All requests, running first."""
        for running in self.running:
            yield from running
        for _, request in self._waiting:
            yield request
