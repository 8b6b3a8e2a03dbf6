"""Runs steps: packs the scheduler's work into arrays, computes, samples, verifies and makes drafts, and commits."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmoe.cache import init_cache
from jaxmoe.config import ModelConfig
from jaxmoe.engine import sampling
from jaxmoe.engine.drafts import Drafter, Outcome, after, further, sampling_ones
from jaxmoe.engine.requests import TokenLogprobs
from jaxmoe.engine.sampling import Ask, Sampled
from jaxmoe.engine.scheduler import Work
from jaxmoe.engine.step import Batch, StepResult, make_program, pack
from jaxmoe.layers.attention import Entries
from jaxmoe.params import Params
from jaxmoe.sharding import shardings_of
from quant import at_width


class Sizes(NamedTuple):
    """The shapes of a runner, per rank.

    Attributes:
      running: requests that may have pages.
      step_tokens: tokens of the largest step.
      pages: cache pages.
      page_size: tokens of a page.
      table: pages that a request may have.
      drafts: tokens to guess after each sampled one; 0 for no speculation.
      cache_dtype: as in ``init_cache``; None for the parameters'.
      draft_width: at which the model itself makes the drafts; None if its MTP module does.
    """

    running: int
    step_tokens: int
    pages: int
    page_size: int
    table: int
    drafts: int
    cache_dtype: str | None = None
    draft_width: int | None = None

    def rows(self, size: int) -> int:
        """Rows of logits of a step of ``size`` tokens."""
        return min(size, self.running * (self.drafts + 1))


def _buckets(largest: int) -> list[int]:
    """1, 2, 4, ... and ``largest``: how many tokens a compiled step may have."""
    powers = itertools.takewhile(lambda n: n < largest, (1 << i for i in itertools.count()))
    return [*powers, largest]


class Change(NamedTuple):
    """Which ranks take part from now on, and which have lost their requests' cache pages.

    A runner whose ranks may come and go returns it instead of a step's outcomes: then the step has not happened.
    """

    active: tuple[int, ...]
    lost: frozenset[int]


@runtime_checkable
class ElasticRunner(Protocol):
    """A runner whose ranks may fail and return."""

    ranks: int
    active: tuple[int, ...]
    epoch: int
    buckets: list[int]
    load: np.ndarray
    drafted: int
    accepted: int
    computing_s: float
    rank_experts: list[list[int]]
    on_change: Callable[[], None]
    """Called, on any thread, when ``pending`` may have become true."""

    def start(self, sizes: Sizes) -> None:
        """Makes everything ready for steps of these sizes."""

    def close(self) -> None:
        """Ends everything."""

    def pending(self) -> bool:
        """Whether ``poll`` has something to do."""

    def poll(self) -> Change | None:
        """Between steps: a change of the ranks that take part."""

    def pack(self, works: list[list[Work]]) -> list[Batch] | None:
        """As ``Runner.pack``."""

    def run(self, works: list[list[Work]], batches: list[Batch]) -> list[list[Outcome]] | Change:
        """As ``Runner.run``; or how the ranks have changed, and then the step has not happened."""

    def warm_up(self, size: int) -> set[tuple]:
        """As ``Runner.warm_up``."""

    def restore(self) -> bool:
        """As ``Runner.restore``."""


class Packing:
    """The scheduler's work as arrays: how many tokens a step has, and every slot's pages.

    Args:
      sizes: shapes.
      ranks: how many.
    """

    def __init__(self, sizes: Sizes, ranks: int):
        self._sizes = sizes
        self.buckets = _buckets(sizes.step_tokens)
        self._tables = np.full((ranks, sizes.running, sizes.table), -1, np.int32)

    def pack(self, works: list[list[Work]]) -> list[Batch] | None:
        """A batch for every rank, all of one size; None if there is no work. Slots, spans, pages and rows are each rank's own."""
        total = max((sum(work.size for work in rank) for rank in works), default=0)
        if total == 0:
            return None
        size = next(s for s in self.buckets if s >= total)
        for tables, mine in zip(self._tables, works, strict=True):
            for work in mine:
                pages = work.request.pages
                tables[work.request.slot] = -1
                tables[work.request.slot, : len(pages)] = pages
        return self._batches(works, size)

    def idle(self, size: int) -> list[Batch]:
        """Batches without a token in them."""
        return self._batches([[] for _ in self._tables], size)

    def _batches(self, works: list[list[Work]], size: int) -> list[Batch]:
        rows = self._sizes.rows(size)
        return [pack(mine, size, rows, t) for mine, t in zip(works, self._tables, strict=True)]


def asks_of(works: list[Work]) -> list[Ask]:
    """A rank's rows of logits: for every work that samples one after its last token and one after each draft."""
    return [
        Ask(work.request, work.drafts[:n])
        for work in works
        if work.samples
        for n in range(len(work.drafts) + 1)
    ]


def outcomes_of(works: list[Work], sampled: Sampled | None, row: int) -> list[Outcome]:
    """A rank's outcomes; its rows of ``sampled`` begin at ``row``."""
    outcomes = []
    for work in works:
        if not work.samples:
            outcomes.append(Outcome(work))
            continue
        tokens = [int(sampled.token[row])]
        for i, draft in enumerate(work.drafts, start=1):
            if tokens[-1] != draft:
                break
            tokens.append(int(sampled.token[row + i]))
        logprobs = ()
        if work.request.sampling.logprobs is not None:
            logprobs = tuple(_logprobs(work, sampled, row + i) for i in range(len(tokens)))
        outcomes.append(Outcome(work, tuple(tokens), logprobs))
        row += 1 + len(work.drafts)
    return outcomes


def _concatenate(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    return Batch(*map(np.concatenate, zip(*batches, strict=True)))


class Runner:
    """A model's parameters, its cache and its compiled steps. Used by one thread at a time.

    Speculation: the model's multi-token-prediction module, which has a cache of its own over the same pages, guesses
    the tokens after the sampled one; the next step computes them too, and those that equal what is then
    sampled are kept. What is sampled does not depend on the guesses.

    With a draft width the model itself guesses, its weights read at that width. It has no cache of its own: it attends to the rows
    that verified tokens have, at the request's width, and puts those of its guesses behind them in the same pages, where the next
    step, which reads none of them, writes its own.

    Args:
      params: parameters by width: of the requests that they are for, and of drafts.
      config: the model.
      sizes: shapes.
      mesh: ranks along its axis "expert", or None for one device.
      served: widths that requests may have; default all of ``params``.
    """

    epoch = 0  # ranks of a mesh neither come nor go

    def __init__(
        self,
        params: Mapping[int | None, Params],
        config: ModelConfig,
        sizes: Sizes,
        mesh: Mesh | None,
        served: Sequence[int] | None = None,
    ):
        some = next(iter(params.values()))
        self._own_drafts = sizes.drafts > 0 and sizes.draft_width is None
        if self._own_drafts and "mtp" not in some:
            raise ValueError(
                f"speculative_tokens={sizes.drafts} needs a multi-token-prediction module, which these parameters don't "
                "have; use 0, or a draft_width."
            )
        if mesh is not None and "expert" not in mesh.shape:
            raise ValueError(
                f"the mesh must have an axis 'expert'; got {tuple(mesh.shape)}. Use sharding.make_mesh(expert=N)."
            )
        self.config, self.sizes = config, sizes
        self.ranks = 1 if mesh is None else mesh.shape["expert"]
        self.program = make_program(config, mesh)
        self._packing = Packing(sizes, self.ranks)
        self.buckets = self._packing.buckets
        if mesh is not None:
            widest = list(params.values())[-1]
            widest = jax.device_put(widest, shardings_of(widest, config, mesh))
            # Others are parts of the widest: nothing is moved twice.
            params = {w: widest if w is None else at_width(widest, w) for w in params}
        self._params = dict(params)
        self._served = tuple(served or params)
        self._dtype = sizes.cache_dtype or some["embed"]["weight"].dtype
        self._entries, self._draft_entries = self._empty()
        self.load = np.zeros(
            (0, 0), np.int64
        )  # [layers with experts, E]: tokens that each has computed
        self.drafted = self.accepted = 0
        self.computing_s = 0.0  # of the last step, in compiled functions
        experts = np.arange(config.n_routed_experts or 0)
        self.rank_experts = experts.reshape(self.ranks, -1).tolist()  # in each rank's slots

    def _empty(self) -> tuple[Entries, Entries | None]:
        pages = self.sizes.pages * self.ranks, self.sizes.page_size

        def place(**kind: bool) -> Entries:
            cache = init_cache(self.config, *pages, self._dtype, **kind)
            return self.program.place_cache(cache.entries)

        return place(), place(mtp=True) if self._own_drafts else None

    def restore(self) -> bool:
        """Makes the cache anew, empty, if a commit that failed has taken it along; whether it had."""
        lost = any(x.is_deleted() for x in jax.tree.leaves((self._entries, self._draft_entries)))
        if lost:
            self._entries, self._draft_entries = self._empty()
        return lost

    # -- a step ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Nothing to end."""

    def pending(self) -> bool:
        """Whether ``poll`` has something to do: never, for ranks that cannot come and go."""
        return False

    def poll(self) -> Change | None:
        """Between steps: a change of the ranks that take part."""
        return None

    def pack(self, works: list[list[Work]]) -> list[Batch] | None:
        """The ranks' batches, for ``run``; None if there is no work."""
        return self._packing.pack(works)

    def run(self, works: list[list[Work]], batches: list[Batch]) -> list[list[Outcome]]:
        """Computes and commits a step.

        Args:
          works: by rank, all of one width.
          batches: their arrays, from ``pack``.

        Returns:
          What became of every work, in the same order.
        """
        batch, rows, self.computing_s = _concatenate(batches), len(batches[0].rows), 0.0
        width = next(work.request.width for work in itertools.chain(*works))
        with self._computing():
            result = self.program.compute(self._params[width], self._entries, batch, None)
        inputs = sampling.prepare([asks_of(rank) for rank in works], rows, self.config.vocab_size)
        with self._computing():
            sampled = sampling.finish(result.logits, result.best, inputs)
            jax.block_until_ready(result.load)
        outcomes = [outcomes_of(rank, sampled, i * rows) for i, rank in enumerate(works)]
        for outcome in itertools.chain(*outcomes):
            self.drafted += len(outcome.work.drafts)
            self.accepted += len(outcome.accepted)
        load = sum(np.split(np.asarray(result.load, np.int64), self.ranks))
        self.load = load + (self.load if self.load.size else 0)
        with self._computing():
            self._entries = self.program.commit(self._entries, result.entries, batch)
        if self._own_drafts:
            return self._draft(outcomes, batches, self._module(width, result.hidden))
        if self.sizes.drafts and width is not None and width > self.sizes.draft_width:
            return self._draft(outcomes, batches, self._narrower())
        return outcomes

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Adds up the step's time in compiled functions, waiting for them included."""
        began = time.perf_counter()
        yield
        self.computing_s += time.perf_counter() - began

    # -- drafts ------------------------------------------------------------------------------------

    def _module(self, width: int | None, hidden: jax.Array) -> Drafter:
        """The MTP module after a step of this width, whose tokens it sees first; ``hidden`` are theirs."""

        def guess(batch: Batch) -> StepResult:
            nonlocal hidden
            params = self._params[width]
            result = self.program.draft(params, self._draft_entries, hidden, batch, None)
            hidden = result.hidden
            return result

        def commit(result: StepResult, batch: Batch) -> None:
            self._draft_entries = self.program.commit(self._draft_entries, result.entries, batch)

        return Drafter(guess, commit, sees_step=True)

    def _narrower(self) -> Drafter:
        """The model at the draft width, over the cache as the step has left it."""
        params = self._params[self.sizes.draft_width]

        def guess(batch: Batch) -> StepResult:
            return self.program.compute(params, self._entries, batch, None)

        def commit(result: StepResult, batch: Batch) -> None:
            self._entries = self.program.commit(self._entries, result.entries, batch)

        return Drafter(guess, commit, sees_step=False)

    def _draft(
        self, outcomes: list[list[Outcome]], batches: list[Batch], drafter: Drafter
    ) -> list[list[Outcome]]:
        """Outcomes with drafts; the drafter's rows are committed, first those of the step's tokens, then of its own drafts."""
        if not drafter.sees_step and not any(sampling_ones(mine) for mine in outcomes):
            return outcomes
        rows = min(len(batches[0].tokens), self.sizes.running)
        batches = [after(mine, b, rows) for mine, b in zip(outcomes, batches, strict=True)]
        drafts: list[list[tuple[int, ...]]] = [[()] * len(sampling_ones(mine)) for mine in outcomes]
        for ahead in range(self.sizes.drafts):
            if ahead:
                batches = self._further(batches, drafts)
            elif not drafter.sees_step:
                last = [[o.tokens[-1:] for o in sampling_ones(mine)] for mine in outcomes]
                batches = self._further(batches, last)
            batch = _concatenate(batches)
            with self._computing():
                result = drafter.guess(batch)
            asking = [
                [
                    Ask(o.work.request, (*o.tokens, *d))
                    for o, d in zip(sampling_ones(mine), own, strict=True)
                ]
                for mine, own in zip(outcomes, drafts, strict=True)
            ]
            inputs = sampling.prepare(asking, rows, self.config.vocab_size)
            with self._computing():
                sampled = sampling.finish(result.logits, result.best, inputs)
                drafter.commit(result, batch)
            if sampled is None:
                return outcomes
            drafts = [
                [(*d, int(sampled.token[rank * rows + i])) for i, d in enumerate(own)]
                for rank, own in enumerate(drafts)
            ]
        found = [iter(own) for own in drafts]
        return [
            [o._replace(drafts=next(own)) if o.tokens else o for o in mine]
            for mine, own in zip(outcomes, found, strict=True)
        ]

    def _further(self, batches: list[Batch], drafts: list[list[tuple[int, ...]]]) -> list[Batch]:
        page_size = self.sizes.page_size
        return [further(b, own, page_size) for b, own in zip(batches, drafts, strict=True)]

    # -- compilation -------------------------------------------------------------------------------

    def warm_up(self, size: int) -> set[tuple]:
        """Compiles everything that a step of ``size`` tokens may run; returns what that is, each executable once."""
        done: set[tuple] = set()
        for width in self._served:
            batches = self._packing.idle(size)
            batch = _concatenate(batches)
            result = self.program.compute(self._params[width], self._entries, batch, None)
            self._entries = self.program.commit(self._entries, result.entries, batch)
            done |= {("compute", width, size, len(batch.rows)), ("commit", size)}
            done |= _warm_up_sampling(result.logits)
            if self._own_drafts:
                done |= self._warm_up_drafts(self._module(width, result.hidden), batches, width)
        if self.sizes.draft_width is not None:
            batches = self._packing.idle(size)
            done |= self._warm_up_drafts(self._narrower(), batches, self.sizes.draft_width)
        jax.block_until_ready((self._entries, self._draft_entries))
        return done

    def _warm_up_drafts(
        self, drafter: Drafter, batches: list[Batch], width: int | None
    ) -> set[tuple]:
        size, nobody = len(batches[0].tokens), [[] for _ in range(self.ranks)]
        batches = [after([], b, min(size, self.sizes.running)) for b in batches]
        done: set[tuple] = set()
        for ahead in range(min(self.sizes.drafts, 2)):  # later ones are like the second
            if ahead or not drafter.sees_step:
                batches = self._further(batches, nobody)
            batch, tokens = _concatenate(batches), len(batches[0].tokens)
            result = drafter.guess(batch)
            drafter.commit(result, batch)
            name = "draft" if drafter.sees_step else "compute"
            done |= {(name, width, tokens, len(batch.rows))}
            done |= {("commit drafts" if drafter.sees_step else "commit", tokens)}
            done |= _warm_up_sampling(result.logits)
        return done


def _warm_up_sampling(logits: jax.Array) -> set[tuple]:
    return {("sample", kind, len(logits)) for kind in sampling.warm_up(logits)}


def _logprobs(work: Work, sampled: Sampled, row: int) -> TokenLogprobs:
    best = range(work.request.sampling.logprobs)
    top = ((int(sampled.top_tokens[row, i]), float(sampled.top_logprobs[row, i])) for i in best)
    return TokenLogprobs(int(sampled.token[row]), float(sampled.logprob[row]), tuple(top))
