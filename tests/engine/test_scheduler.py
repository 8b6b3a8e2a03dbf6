"""The scheduler: who computes next, who waits, who gives way; and that everyone ends."""

import dataclasses
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.engine.pages import PagePool
from jaxmoe.engine.requests import Request, SamplingParams
from jaxmoe.engine.scheduler import Limits, QueueFull, Scheduler, Work


def _request(prompt: int | list[int], new: int = 8, priority: int = 0) -> Request:
    """A request whose prompt shares nothing with others', if only its length is given."""
    request = Request([], SamplingParams(max_new_tokens=new), priority)
    request.prompt = [1000 + request.order] * prompt if isinstance(prompt, int) else prompt
    return request


def _scheduler(pages: int = 64, size: int = 4, ranks: int = 1, **limits: int) -> Scheduler:
    return Scheduler([PagePool(pages, size) for _ in range(ranks)], Limits(**limits))


def _submit(scheduler: Scheduler, *requests: Request) -> None:
    for request in requests:
        scheduler.submit(request)


def _step(scheduler: Scheduler) -> list[tuple[Request, int, int]]:
    """Runs one step: every request that reaches its last token gets the token 7, and ends if that is its last."""
    works = [work for rank in scheduler.plan() for work in rank]
    for work in works:
        scheduler.advance(work)
        if work.samples:
            work.request.output.append(7)
            if len(work.request.output) == work.request.sampling.max_new_tokens:
                scheduler.finish(work.request)
    return [(work.request, work.start, work.stop) for work in works]


# -- budgets and order -------------------------------------------------------------------------------


def test_a_long_prompt_is_cut_into_steps_and_samples_with_its_last_token():
    scheduler = _scheduler(max_step_tokens=8)
    request = _request(19)
    _submit(scheduler, request)
    assert _step(scheduler) == [(request, 0, 8)] and not request.output
    assert _step(scheduler) == [(request, 8, 16)] and not request.output
    assert _step(scheduler) == [(request, 16, 19)] and request.output == [7]
    assert _step(scheduler) == [(request, 19, 20)] and request.output == [7, 7]


def _at(width: int | None, prompt: int = 3, new: int = 8, priority: int = 0) -> Request:
    request = _request(prompt, new, priority)
    request.sampling = dataclasses.replace(request.sampling, width=width)
    return request


def test_widths_take_turns_and_never_share_a_step():
    scheduler = _scheduler(max_step_tokens=8)
    many, one = [_at(8, new=5) for _ in range(3)], _at(3, new=5, priority=-9)
    _submit(scheduler, *many, one)
    widths = []
    while scheduler.running_count or scheduler.waiting_count:
        step = _step(scheduler)
        assert len({request.width for request, *_ in step}) == 1
        widths.append(step[0][0].width)
    # A token of each in every round, however many ask for the other width; the last prompt takes two steps.
    assert widths == [8, 3, 8, 3, 8, 3, 8, 3, 8, 3, 8]
    assert scheduler.width_steps == {8: 6, 3: 5}


def test_nobody_overtakes_a_request_of_another_width_that_waits_for_pages():
    scheduler = _scheduler(pages=6, size=2, max_step_tokens=8)
    _submit(scheduler, holder := _at(8, prompt=5, new=3), waits := _at(3, prompt=8, new=2))
    _step(scheduler)
    _submit(scheduler, later := _at(8, prompt=2, new=2))
    _step(scheduler)
    assert holder.rank is not None and waits.rank is None and later.rank is None
    while waits.rank is None:
        _step(scheduler)
    assert later.rank is None or later.order > waits.order
    while scheduler.running_count or scheduler.waiting_count:
        _step(scheduler)
    assert [len(r.output) for r in (holder, waits, later)] == [3, 2, 2]


def test_prompts_that_begin_alike_share_pages_at_one_width_only():
    scheduler = _scheduler(size=2)
    first = Request([1, 2, 3, 4, 5], SamplingParams(max_new_tokens=1, width=8))
    _submit(scheduler, first)
    _step(scheduler)
    again = [Request([1, 2, 3, 4, 5], SamplingParams(max_new_tokens=1, width=w)) for w in (3, 8)]
    _submit(scheduler, *again)
    _step(scheduler)
    _step(scheduler)
    assert [request.cached_tokens for request in again] == [0, 4]


def test_decoding_requests_come_first_and_prompts_fill_what_is_left():
    scheduler = _scheduler(max_step_tokens=8)
    first, second, long = _request(2), _request(3), _request(30, priority=5)
    _submit(scheduler, first, second)
    _step(scheduler)
    _submit(scheduler, long)
    assert _step(scheduler) == [(first, 2, 3), (second, 3, 4), (long, 0, 6)]
    assert _step(scheduler) == [(first, 3, 4), (second, 4, 5), (long, 6, 12)]


def test_prompts_begun_go_on_before_new_ones_begin():
    scheduler = _scheduler(max_step_tokens=8)
    begun, late = _request(12), _request(12)
    _submit(scheduler, begun, late)
    assert _step(scheduler) == [(begun, 0, 8)]
    assert _step(scheduler) == [(begun, 8, 12), (late, 0, 4)]


def test_equal_priorities_go_in_order_of_arrival_and_higher_ones_before():
    scheduler = _scheduler(max_running=1)
    requests = [_request(3, new=1, priority=p) for p in (0, 1, 0, 2, 1, 0)]
    _submit(scheduler, *requests)
    expected = [requests[i] for i in (3, 1, 4, 0, 2, 5)]
    assert scheduler.waiting == expected
    assert [_step(scheduler)[0][0] for _ in requests] == expected


def test_no_more_requests_run_than_a_rank_has_slots():
    scheduler = _scheduler(max_running=2)
    requests = [_request(2, new=2) for _ in range(3)]
    _submit(scheduler, *requests)
    _step(scheduler)
    assert (scheduler.running_count, scheduler.waiting_count) == (2, 1)
    assert {request.slot for request in requests[:2]} == {0, 1}
    _step(scheduler)
    _step(scheduler)
    assert requests[2].slot in (0, 1) and scheduler.running_count == 1


def test_ranks_share_the_requests():
    scheduler = _scheduler(ranks=2, max_step_tokens=8)
    requests = [_request(4) for _ in range(4)]
    _submit(scheduler, *requests)
    works = scheduler.plan()
    assert [len(rank) for rank in works] == [2, 2]
    assert sorted(request.rank for request in requests) == [0, 0, 1, 1]


# -- pages -------------------------------------------------------------------------------------------


def test_nobody_overtakes_a_request_that_waits_for_pages():
    scheduler = _scheduler(pages=4, size=4)
    running, big, small = _request(8, new=4), _request(12, new=4), _request(1, new=1)
    _submit(scheduler, running)
    _step(scheduler)
    _submit(scheduler, big, small)
    while running.rank is not None:
        assert [request for request, _, _ in _step(scheduler)] == [running]
        assert scheduler.waiting == [big, small] or running.rank is None
    assert _step(scheduler)[0] == (big, 0, 12)


def test_out_of_pages_the_least_urgent_gives_way_and_goes_on_with_its_own_tokens_later():
    scheduler = _scheduler(pages=4, size=2)
    kept, victim = _request(4, new=4), _request(4, new=4)
    _submit(scheduler, kept, victim)
    assert [work[0] for work in _step(scheduler)] == [kept, victim]
    assert [work[0] for work in _step(scheduler)] == [kept]
    assert victim.rank is None and victim.slot is None and victim.pages == []
    assert (victim.output, victim.preemptions, scheduler.preemptions) == ([7], 1, 1)
    while kept.rank is not None:
        _step(scheduler)
    # What it had computed itself may still be there; the last token is computed in any case.
    ((request, start, stop),) = _step(scheduler)
    assert request is victim and stop == 5 and start <= 4
    while victim.rank is not None:
        _step(scheduler)
    assert victim.output == [7] * 4 and kept.output == [7] * 4
    assert scheduler.pools[0].held == 0


def test_higher_priority_keeps_its_pages_although_it_came_last():
    scheduler = _scheduler(pages=4, size=2)
    early, urgent = _request(4, new=4), _request(4, new=4, priority=1)
    _submit(scheduler, early, urgent)
    _step(scheduler)
    _step(scheduler)
    assert urgent.preemptions == 0 and early.preemptions == 1


def test_a_plan_has_no_work_for_a_request_that_gave_way_in_it():
    scheduler = _scheduler(pages=5, size=2)
    requests = [_request(3, new=5), _request(2, new=5), _request(2, new=5, priority=-1)]
    _submit(scheduler, *requests)
    for _ in range(20):
        works = [work for rank in scheduler.plan() for work in rank]
        assert all(work.request.rank is not None for work in works)
        for work in works:
            assert len(work.request.pages) * 2 >= work.stop
            scheduler.advance(work)
            if work.samples:
                work.request.output.append(7)
                if len(work.request.output) == 5:
                    scheduler.finish(work.request)
    assert scheduler.running_count == scheduler.waiting_count == 0


def test_a_known_beginning_is_not_computed_again():
    scheduler = _scheduler(size=4)
    prompt = list(range(10))
    first, second = _request(prompt, new=1), _request([*prompt[:9], 99], new=1)
    _submit(scheduler, first)
    _step(scheduler)
    _submit(scheduler, second)
    assert _step(scheduler) == [(second, 8, 10)]
    assert (first.cached_tokens, second.cached_tokens) == (0, 8)


def test_cached_tokens_do_not_count_what_was_found_again_after_a_preemption():
    scheduler = _scheduler(pages=16, size=2)
    request = _request(6)
    _submit(scheduler, request)
    _step(scheduler)
    scheduler.preempt(request)
    assert _step(scheduler) == [(request, 6, 7)]
    assert request.cached_tokens == 0


# -- refusals and ends -------------------------------------------------------------------------------


def test_one_request_more_than_may_wait_is_refused_with_the_limit():
    scheduler = _scheduler(max_waiting=2)
    _submit(scheduler, _request(1), _request(1))
    with pytest.raises(
        QueueFull, match=r"2 requests are waiting, the most allowed \(max_waiting\)"
    ):
        scheduler.submit(_request(1))
    assert scheduler.waiting_count == 2
    scheduler.plan()
    scheduler.submit(_request(1))


def test_a_preempted_request_may_wait_although_the_queue_is_full():
    scheduler = _scheduler(max_waiting=1)
    running = _request(4)
    _submit(scheduler, running)
    _step(scheduler)
    _submit(scheduler, _request(4))
    scheduler.preempt(running)
    assert scheduler.waiting_count == 2 and scheduler.waiting[0] is running


def test_a_request_that_could_never_run_is_refused_and_one_that_just_fits_runs():
    scheduler = _scheduler(pages=4, size=4)
    with pytest.raises(ValueError, match=r"17 tokens\) exceed .* \(4 pages of 4\); shorten"):
        scheduler.submit(_request(9, new=8))
    fitting = _request(8, new=8)
    _submit(scheduler, fitting)
    for _ in range(8):
        _step(scheduler)
    assert fitting.output == [7] * 8 and not fitting.preemptions


def test_finished_requests_give_everything_back_whether_they_ran_or_waited():
    scheduler = _scheduler(max_running=1)
    running, waiting, last = _request(5), _request(5), _request(5)
    _submit(scheduler, running, waiting, last)
    _step(scheduler)
    assert list(scheduler.everyone())[0] is running and len(list(scheduler.everyone())) == 3
    scheduler.finish(waiting)
    assert scheduler.waiting == [last]
    scheduler.finish(running)
    assert scheduler.pools[0].held == 0 and scheduler.running_count == 0
    assert _step(scheduler) == [(last, 0, 5)] and last.slot == 0


# -- everyone ends -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Arrival:
    at: int
    prompt: int
    new: int
    family: int  # requests of a family begin alike
    priority: int
    cancel_after: int | None
    width: int | None


_ARRIVAL = st.builds(
    Arrival,
    at=st.integers(0, 30),
    prompt=st.integers(1, 14),
    new=st.integers(1, 10),
    family=st.integers(0, 2),
    priority=st.integers(-1, 1),
    cancel_after=st.one_of(st.none(), st.none(), st.integers(0, 12)),
    width=st.sampled_from([None, 3, 8]),
)


def _tokens_of(arrival: Arrival, number: int) -> list[int]:
    """The beginning of its family, then its own end."""
    shared = arrival.prompt * 2 // 3
    return [arrival.family * 100 + i for i in range(shared)] + [
        1000 + number * 20 + i for i in range(arrival.prompt - shared)
    ]


class Simulation:
    """A scheduler over caches in which a row is the tokens up to its own: what a model would compute from."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.rows: list[dict[tuple[int, int], tuple[int, ...]]] = [{} for _ in scheduler.pools]

    def step(self) -> int:
        """Checks and runs a plan; returns how many tokens it had."""
        works = self.scheduler.plan()
        self._check_running()
        for rank, own in enumerate(works):
            self._check_budget(rank, own, {work.request.width for mine in works for work in mine})
            for work in own:
                self._check_rows(rank, work)
        for rank, own in enumerate(works):
            for work in own:
                self._compute(rank, work)
        return sum(work.stop - work.start for own in works for work in own)

    def _check_running(self):
        for rank, running in enumerate(self.scheduler.running):
            slots = [request.slot for request in running]
            assert len(set(slots)) == len(slots) <= self.scheduler.limits.max_running
            assert all(0 <= slot < self.scheduler.limits.max_running for slot in slots)
            assert all(request.rank == rank for request in running)
            pages = {page for request in running for page in request.pages}
            assert self.scheduler.pools[rank].held == len(pages), "a page is held by nobody"

    def _check_budget(self, rank: int, works: list[Work], widths: set[int | None]):
        assert len(widths) <= 1, "requests of several widths share a step"
        total = sum(work.stop - work.start for work in works)
        assert total <= self.scheduler.limits.max_step_tokens
        requests = [work.request for work in works]
        assert len(set(map(id, requests))) == len(requests)
        running = self.scheduler.running[rank]
        assert all(request in running for request in requests)
        if total == self.scheduler.limits.max_step_tokens:
            return
        decoding = [r for r in running if r.length - r.computed == 1 and r.width in widths]
        gave_way = any(request.preemptions for request in self.scheduler.waiting)
        assert gave_way or all(request in requests for request in decoding)

    def _check_rows(self, rank: int, work: Work):
        request, size = work.request, self.scheduler.pools[rank].page_size
        assert work.start == request.computed < work.stop <= request.length
        assert len(request.pages) * size >= work.stop
        tokens = tuple(request.tokens(0, request.length))
        for i in range(work.start):
            row = self.rows[rank].get((request.pages[i // size], i % size))
            assert row == tokens[: i + 1], "a cached row is another request's"
        holders = Counter(page for r in self.scheduler.running[rank] for page in r.pages)
        for i in range(work.start, work.stop):
            assert holders[request.pages[i // size]] == 1, "a shared page would be written"

    def _compute(self, rank: int, work: Work):
        request, size = work.request, self.scheduler.pools[rank].page_size
        tokens = tuple(request.tokens(0, request.length))
        for i in range(work.start, work.stop):
            self.rows[rank][request.pages[i // size], i % size] = tokens[: i + 1]
        samples = work.samples
        self.scheduler.advance(work)
        if samples:
            request.output.append(sum(tokens) % 50 + 10_000)
            if len(request.output) == request.sampling.max_new_tokens:
                self.scheduler.finish(request)


def _ended(request: Request, scheduler: Scheduler) -> bool:
    return request.rank is None and request not in scheduler.waiting


def _expected_output(request: Request) -> list[int]:
    tokens = list(request.prompt)
    for _ in range(request.sampling.max_new_tokens):
        tokens.append(sum(tokens) % 50 + 10_000)
    return tokens[len(request.prompt) :]


@settings(max_examples=150)
@given(
    arrivals=st.lists(_ARRIVAL, min_size=1, max_size=14),
    size=st.integers(1, 5),
    spare=st.integers(0, 8),
    ranks=st.integers(1, 3),
    running=st.integers(1, 6),
    budget=st.integers(1, 16),
    reuse=st.booleans(),
)
def test_everyone_ends_with_the_right_tokens_and_no_page_is_lost(
    arrivals, size, spare, ranks, running, budget, reuse
):
    least = max(-(-(a.prompt + a.new) // size) for a in arrivals)
    pools = [PagePool(least + spare, size, reuse=reuse) for _ in range(ranks)]
    simulation = Simulation(Scheduler(pools, Limits(running, budget)))
    scheduler, now = simulation.scheduler, 0
    requests = [
        Request(_tokens_of(a, i), SamplingParams(max_new_tokens=a.new, width=a.width), a.priority)
        for i, a in enumerate(arrivals)
    ]
    cancelled = set()
    while now <= 30 or scheduler.running_count or scheduler.waiting_count:
        for i, (arrival, request) in enumerate(zip(arrivals, requests, strict=True)):
            if arrival.at == now:
                scheduler.submit(request)
            due = arrival.cancel_after is not None and arrival.at + arrival.cancel_after == now
            if due and not _ended(request, scheduler):
                scheduler.finish(request)
                cancelled.add(i)
        busy = scheduler.running_count + scheduler.waiting_count
        computed = simulation.step()
        assert computed or not busy, "requests are there and nothing is computed"
        now += 1
        assert now < 5000, "requests go on for ever"
    for i, request in enumerate(requests):
        if i not in cancelled:
            assert request.output == _expected_output(request)
    for pool in pools:
        assert pool.held == 0
        assert pool.available == pool.pages
    assert all(sorted(slots) == list(range(running)) for slots in scheduler._slots)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=2, max_size=8),
    budget=st.integers(1, 8),
)
def test_a_pool_for_just_the_largest_request_serves_all_in_about_the_tokens_it_takes(sizes, budget):
    """Preemption costs recomputation, but whoever is most urgent is never held up by it."""
    least = max(-(-(prompt + new) // 2) for prompt, new in sizes)
    simulation = Simulation(_scheduler(pages=least, size=2, max_step_tokens=budget))
    requests = [_request(prompt, new) for prompt, new in sizes]
    _submit(simulation.scheduler, *requests)
    steps = 0
    while simulation.scheduler.running_count + simulation.scheduler.waiting_count:
        simulation.step()
        steps += 1
        # Alone, one after another, each with its prompt and every output recomputed once.
        assert steps <= sum(-(-(prompt + new) // budget) + new for prompt, new in sizes)
    assert [len(request.output) for request in requests] == [new for _, new in sizes]


def test_nobody_gives_way_to_drafts_on_the_last_page():
    """Each of two requests needs one page more for its next token; the first one's drafts would take both."""
    scheduler = _scheduler(pages=6, size=4, max_step_tokens=16)
    first, second = _request(8, new=9), _request(8, new=9)
    _submit(scheduler, first, second)
    _step(scheduler)
    first.drafts = (1, 2, 3, 4)
    works = [work for rank in scheduler.plan() for work in rank]
    assert [(work.request, work.size) for work in works] == [(first, 4), (second, 1)]
    assert works[0].drafts == (1, 2, 3) and scheduler.preemptions == 0


def test_only_requests_whom_drafts_follow_get_pages_for_them():
    """Of the width of the drafts, or below it, nobody is drafted for."""
    for limits, widths in (({"draft_width": 4}, {8: 3, 4: 2, 3: 2}), ({}, {8: 3, None: 3})):
        for width, pages in widths.items():
            scheduler = _scheduler(size=4, draft_rows=1, **limits)
            request = _at(width, prompt=8)
            _submit(scheduler, request)
            scheduler.plan()
            assert len(request.pages) == pages
