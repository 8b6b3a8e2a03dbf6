"""Pages: who holds which, what a new prompt finds, and which page is given up first."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from jaxmoe.engine.pages import PageLeak, PagePool


def _pages_of(tokens: list[int], size: int) -> int:
    return -(-len(tokens) // size)


def _computed(pool: PagePool, tokens: list[int]) -> list[int]:
    """Pages of a request whose tokens have all been computed."""
    shared = pool.match(tokens)
    own = pool.allocate(_pages_of(tokens, pool.page_size) - len(shared))
    assert own is not None
    pool.publish(tokens, shared + own)
    return shared + own


def test_a_shared_beginning_is_found_page_by_page():
    pool = PagePool(8, 2)
    first = _computed(pool, [1, 2, 3, 4, 5])
    assert pool.match([1, 2, 3, 4, 9, 9]) == first[:2]
    assert pool.match([1, 2, 9, 4, 5]) == first[:1]
    assert pool.match([9, 2, 3, 4, 5]) == []
    assert pool.match([3, 4, 5, 5]) == [], "the tokens before a page count too"


def test_never_the_whole_prompt_is_found_so_that_its_last_token_is_computed():
    pool = PagePool(8, 2)
    pages = _computed(pool, [1, 2, 3, 4])
    assert pool.match([1, 2, 3, 4]) == pages[:1]
    assert pool.match([1, 2]) == []
    assert pool.match([1]) == []
    assert pool.match([1, 2, 3, 4, 5]) == pages


def test_a_partly_filled_page_is_found_by_nobody():
    pool = PagePool(8, 4)
    _computed(pool, [1, 2, 3, 4, 5, 6])
    assert len(pool.match([1, 2, 3, 4, 5, 6, 7, 8, 9])) == 1


def test_finished_requests_pages_are_found_until_they_are_needed():
    pool = PagePool(3, 2)
    pages = _computed(pool, [1, 2, 3, 4])
    pool.release(pages)
    assert (pool.held, pool.idle, pool.available) == (0, 2, 3)
    found = pool.match([1, 2, 3, 4, 5])
    assert found == pages and (pool.held, pool.idle) == (2, 0)
    pool.release(found)
    taken = pool.allocate(2)
    assert pool.match([1, 2, 3, 4, 5]) == pages[:1], "the end of a chain goes before its beginning"
    assert pages[1] in taken and pages[0] not in taken


def test_the_prompt_released_longest_ago_is_given_up_first():
    pool = PagePool(3, 2)
    held = [_computed(pool, [i, i]) for i in range(3)]
    for i in (1, 0, 2):
        pool.release(held[i])
    pool.release(pool.match([1, 1, 1]))  # used again: no longer the oldest
    pool.allocate(1)
    assert [len(pool.match([i, i, i])) for i in range(3)] == [0, 1, 1]


def test_of_two_that_computed_the_same_at_once_one_is_remembered_and_nothing_leaks():
    pool = PagePool(8, 2)
    tokens = [1, 2, 3, 4]
    first, second = pool.allocate(2), pool.allocate(2)
    pool.publish(tokens, first)
    pool.publish(tokens, second)
    found = pool.match([*tokens, 5])
    assert found == first
    for pages in (first, second, found):
        pool.release(pages)
    assert (pool.held, pool.idle, pool.available) == (0, 2, 8)


def test_more_pages_than_there_are_are_refused_and_nothing_is_held():
    pool = PagePool(4, 2)
    held = pool.allocate(3)
    assert pool.allocate(2) is None
    assert pool.available == 1 and pool.held == 3
    assert len(pool.allocate(1)) == 1
    pool.release(held)


def test_a_page_released_twice_is_a_leak_that_is_named():
    pool = PagePool(4, 2)
    page = pool.allocate(1)
    pool.release(page)
    with pytest.raises(PageLeak, match=f"page {page[0]} was released but nobody held it"):
        pool.release(page)


def test_without_reuse_nothing_is_found_and_nothing_stays_idle():
    pool = PagePool(4, 2, reuse=False)
    pages = _computed(pool, [1, 2, 3, 4])
    assert pool.match([1, 2, 3, 4, 5]) == []
    pool.release(pages)
    assert (pool.idle, pool.available) == (0, 4)


def test_forgetting_frees_idle_pages_and_leaves_held_ones():
    pool = PagePool(6, 2)
    held, idle = _computed(pool, [1, 2, 3, 4]), _computed(pool, [1, 2, 5, 6])
    pool.release(idle)
    pool.forget()
    assert (pool.held, pool.idle) == (2, 0)
    assert pool.match([1, 2, 5, 6, 7]) == held[:1], "its first page is still the other's"
    assert pool.match([1, 2, 3, 4, 7]) == held


@pytest.mark.parametrize(("pages", "size"), [(0, 4), (4, 0)])
def test_a_pool_without_room_is_refused(pages, size):
    with pytest.raises(ValueError, match=f"must be >= 1; got {pages} and {size}"):
        PagePool(pages, size)


# Beginnings of one text, most of them: requests that compute the same at once are the hard case.
_TOKENS = st.tuples(st.integers(1, 9), st.sampled_from([9, 9, 9, 4, 2])).map(
    lambda x: [i if i < x[1] else -1 for i in range(x[0])]
)


class PoolMachine(RuleBasedStateMachine):
    """Requests that come, compute, grow and go, against a model that remembers prefixes in a dictionary."""

    requests = Bundle("requests")

    @initialize(pages=st.integers(1, 9), size=st.integers(1, 3))
    def make(self, pages, size):
        self.pool = PagePool(pages, size)
        self.holders = Counter()
        self.known: dict[tuple[int, ...], int] = {}  # prefix of whole pages -> its last page
        self.idle: list[int] = []  # oldest first

    def _hold(self, pages):
        self.holders.update(pages)
        self.idle = [page for page in self.idle if page not in pages]

    def _give_up_oldest(self):
        page = self.idle.pop(0)
        prefix = next(p for p, known in self.known.items() if known == page)
        longer = [p for p in self.known if len(p) > len(prefix) and p[: len(prefix)] == prefix]
        assert not longer, "a page was given up before those behind it"
        del self.known[prefix]

    def _expected_match(self, tokens):
        found, size = [], self.pool.page_size
        for end in range(size, len(tokens), size):
            page = self.known.get(tuple(tokens[:end]))
            if page is None:
                break
            found.append(page)
        return found

    def _allocate(self, count):
        held = {page for page, number in self.holders.items() if number}
        room = self.pool.pages - len(held)
        pages = self.pool.allocate(count)
        assert (pages is None) == (count > room)
        if pages is None:
            return None
        assert len(set(pages)) == count and not held.intersection(pages)
        free = room - len(self.idle)
        for _ in range(count - free):
            self._give_up_oldest()
        assert not set(pages).intersection(self.idle), "a younger idle page was given up"
        self._hold(pages)
        return pages

    def _release(self, pages):
        self.pool.release(pages)
        for page in reversed(pages):
            self.holders[page] -= 1
            if not self.holders[page] and page in self.known.values():
                self.idle.append(page)

    @rule(target=requests, tokens=_TOKENS)
    def start(self, tokens):
        expected = self._expected_match(tokens)
        shared = self.pool.match(tokens)
        assert shared == expected
        self._hold(shared)
        own = self._allocate(_pages_of(tokens, self.pool.page_size) - len(shared))
        if own is None:
            self._release(shared)
            return multiple()
        return tokens, shared + own

    @rule(request=requests, share=st.floats(0, 1))
    def compute(self, request, share):
        tokens, pages = request
        tokens = tokens[: round(share * len(tokens))]
        self.pool.publish(tokens, pages)
        size = self.pool.page_size
        for i in range(len(tokens) // size):
            prefix = tuple(tokens[: (i + 1) * size])
            if self.known.setdefault(prefix, pages[i]) != pages[i]:
                return

    @rule(target=requests, request=consumes(requests), more=_TOKENS)
    def grow(self, request, more):
        tokens, pages = request
        longer = [*tokens, *more]
        own = self._allocate(_pages_of(longer, self.pool.page_size) - len(pages))
        return request if own is None else (longer, pages + own)

    @rule(request=consumes(requests))
    def finish(self, request):
        self._release(request[1])

    @rule()
    def forget(self):
        self.pool.forget()
        while self.idle:
            self._give_up_oldest()

    @rule(page=st.integers(0, 8))
    def release_what_nobody_holds(self, page):
        if page < self.pool.pages and not self.holders[page]:
            with pytest.raises(PageLeak):
                self.pool.release([page])

    @invariant()
    def counts_add_up(self):
        held = sum(number > 0 for number in self.holders.values())
        assert (self.pool.held, self.pool.idle) == (held, len(self.idle))
        assert self.pool.available == self.pool.pages - held

    @invariant()
    def no_page_is_both_free_and_held(self):
        held = {page for page, number in self.holders.items() if number}
        free, idle = self.pool._free, set(self.pool._idle)
        assert len(free) == len(set(free))
        assert not held.intersection(free) and not held.intersection(idle)
        assert held.union(free, idle) == set(range(self.pool.pages))


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestPool = PoolMachine.TestCase
