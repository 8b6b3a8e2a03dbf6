"""Runs steps: packs the scheduler's work into arrays, computes, samples, verifies and makes drafts, and commits."""

import itertools
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmoe.cache import init_cache
from jaxmoe.config import ModelConfig
from jaxmoe.engine import sampling
from jaxmoe.engine.requests import TokenLogprobs
from jaxmoe.engine.sampling import Ask, Sampled
from jaxmoe.engine.scheduler import Work
from jaxmoe.engine.step import Batch, make_program, pack, tiles_of
from jaxmoe.layers.attention import Entries
from jaxmoe.params import Params
from jaxmoe.sharding import shardings


class Outcome(NamedTuple):
    """What a step has given a request.

    Attributes:
      work: what was computed.
      tokens: the next token, after it one for every draft that was right; empty if the work does not sample.
      logprobs: one for each token, if the request asks for them.
      drafts: likely tokens after these.
    """

    work: Work
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    drafts: tuple[int, ...] = ()

    @property
    def accepted(self) -> tuple[int, ...]:
        """Drafts that were right."""
        return self.tokens[:-1]


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
    """

    running: int
    step_tokens: int
    pages: int
    page_size: int
    table: int
    drafts: int
    cache_dtype: str | None = None


def _buckets(largest: int) -> list[int]:
    """1, 2, 4, ... and ``largest``: how many tokens a compiled step may have."""
    powers = itertools.takewhile(lambda n: n < largest, (1 << i for i in itertools.count()))
    return [*powers, largest]


def _concatenate(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    return Batch(*map(np.concatenate, zip(*batches, strict=True)))


class Runner:
    """A model's parameters, its cache and its compiled steps. Used by one thread at a time.

    Speculation: the model's multi-token-prediction module, which has a cache of its own over the same pages, guesses
    the tokens after the sampled one; the next step computes them too, and those that equal what is then
    sampled are kept. What is sampled does not depend on the guesses.

    Args:
      params: parameters.
      config: the model.
      sizes: shapes.
      mesh: ranks along its axis "expert", or None for one device.
    """

    def __init__(self, params: Params, config: ModelConfig, sizes: Sizes, mesh: Mesh | None):
        self.config, self.sizes = config, sizes
        self.ranks = 1 if mesh is None else mesh.shape["expert"]
        self.program = make_program(config, mesh)
        self.buckets = _buckets(sizes.step_tokens)
        self._params = params if mesh is None else jax.device_put(params, shardings(config, mesh))
        self._dtype = sizes.cache_dtype or params["embed"]["weight"].dtype
        self._tables = np.full((self.ranks, sizes.running, sizes.table), -1, np.int32)
        self._entries, self._draft_entries = self._empty()
        self.load = np.zeros(
            (0, 0), np.int64
        )  # [layers with experts, E]: tokens that each has computed
        self.drafted = self.accepted = 0

    def _empty(self) -> tuple[Entries, Entries | None]:
        pages = self.sizes.pages * self.ranks, self.sizes.page_size

        def place(**kind: bool) -> Entries:
            cache = init_cache(self.config, *pages, self._dtype, **kind)
            return self.program.place_cache(cache.entries)

        return place(), place(mtp=True) if self.sizes.drafts else None

    def restore(self) -> bool:
        """Makes the cache anew, empty, if a commit that failed has taken it along; whether it had."""
        lost = any(x.is_deleted() for x in jax.tree.leaves((self._entries, self._draft_entries)))
        if lost:
            self._entries, self._draft_entries = self._empty()
        return lost

    # -- a step ------------------------------------------------------------------------------------

    def pack(self, works: list[list[Work]]) -> Batch | None:
        """The ranks' work, one rank after another; None if there is none. Slots, spans, pages and rows are each rank's own."""
        total = max((sum(work.size for work in rank) for rank in works), default=0)
        if total == 0:
            return None
        size = next(s for s in self.buckets if s >= total)
        for tables, mine in zip(self._tables, works, strict=True):
            for work in mine:
                pages = work.request.pages
                tables[work.request.slot] = -1
                tables[work.request.slot, : len(pages)] = pages
        return self._batch(works, size)

    def _batch(self, works: list[list[Work]], size: int) -> Batch:
        rows = min(size, self.sizes.running * (self.sizes.drafts + 1))
        return _concatenate(
            [
                pack(mine, size, rows, tables)
                for mine, tables in zip(works, self._tables, strict=True)
            ]
        )

    def run(self, works: list[list[Work]], batch: Batch) -> list[list[Outcome]]:
        """Computes and commits a step.

        Args:
          works: by rank.
          batch: their arrays, from ``pack``.

        Returns:
          What became of every work, in the same order.
        """
        result = self.program.compute(self._params, self._entries, batch, None)
        asking = [
            [
                Ask(work.request, work.drafts[:n])
                for work in rank
                if work.samples
                for n in range(len(work.drafts) + 1)
            ]
            for rank in works
        ]
        sampled = sampling.next_tokens(result.logits, result.best, asking)
        rows = result.logits.shape[0] // self.ranks
        outcomes = [self._outcomes(rank, sampled, i * rows) for i, rank in enumerate(works)]
        load = sum(np.split(np.asarray(result.load, np.int64), self.ranks))
        self.load = load + (self.load if self.load.size else 0)
        self._entries = self.program.commit(self._entries, result.entries, batch)
        if self.sizes.drafts:
            outcomes = self._draft(outcomes, batch, result.hidden)
        return outcomes

    def _outcomes(self, works: list[Work], sampled: Sampled | None, row: int) -> list[Outcome]:
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
            self.drafted += len(work.drafts)
            self.accepted += len(tokens) - 1
        return outcomes

    # -- drafts ------------------------------------------------------------------------------------

    def _draft(
        self, outcomes: list[list[Outcome]], batch: Batch, hidden: jax.Array
    ) -> list[list[Outcome]]:
        """Outcomes with drafts; the module's rows are committed, first those of the step's tokens, then of its own drafts."""
        size = batch.tokens.shape[0] // self.ranks
        rows = min(size, self.sizes.running)
        parts = [
            _after(mine, part, rows)
            for mine, part in zip(outcomes, _split(batch, self.ranks), strict=True)
        ]
        batch = _concatenate(parts)
        drafts: list[list[tuple[int, ...]]] = [[()] * len(_sampling(mine)) for mine in outcomes]
        for ahead in range(self.sizes.drafts):
            if ahead:
                batch = _further(batch, drafts, self.ranks, self.sizes.page_size)
            result = self.program.draft(self._params, self._draft_entries, hidden, batch, None)
            asking = [
                [
                    Ask(o.work.request, (*o.tokens, *d))
                    for o, d in zip(_sampling(mine), own, strict=True)
                ]
                for mine, own in zip(outcomes, drafts, strict=True)
            ]
            sampled = sampling.next_tokens(result.logits, result.best, asking)
            self._draft_entries = self.program.commit(self._draft_entries, result.entries, batch)
            if sampled is None:
                return outcomes
            hidden = result.hidden
            drafts = [
                [(*d, int(sampled.token[rank * rows + i])) for i, d in enumerate(own)]
                for rank, own in enumerate(drafts)
            ]
        found = [iter(own) for own in drafts]
        return [
            [o._replace(drafts=next(own)) if o.tokens else o for o in mine]
            for mine, own in zip(outcomes, found, strict=True)
        ]

    # -- compilation -------------------------------------------------------------------------------

    def warm_up(self, size: int) -> set[tuple]:
        """Compiles everything that a step of ``size`` tokens may run; returns what that is, each executable once."""
        batch = self._batch([[]] * self.ranks, size)
        result = self.program.compute(self._params, self._entries, batch, None)
        self._entries = self.program.commit(self._entries, result.entries, batch)
        done = {("compute", size), ("commit", size), *_warm_up_sampling(result.logits)}
        hidden, nobody = result.hidden, [[] for _ in range(self.ranks)]
        for ahead in range(min(self.sizes.drafts, 2)):  # later ones are like the second
            if ahead:
                batch = _further(batch, nobody, self.ranks, self.sizes.page_size)
            else:
                rows = min(size, self.sizes.running)
                batch = _concatenate([_after([], part, rows) for part in _split(batch, self.ranks)])
            result = self.program.draft(self._params, self._draft_entries, hidden, batch, None)
            self._draft_entries = self.program.commit(self._draft_entries, result.entries, batch)
            hidden, tokens = result.hidden, len(batch.tokens) // self.ranks
            done |= {("draft", tokens, len(batch.rows)), ("commit drafts", tokens)}
            done |= _warm_up_sampling(result.logits)
        jax.block_until_ready((self._entries, self._draft_entries))
        return done


def _warm_up_sampling(logits: jax.Array) -> set[tuple]:
    return {("sample", kind, len(logits)) for kind in sampling.warm_up(logits)}


def _logprobs(work: Work, sampled: Sampled, row: int) -> TokenLogprobs:
    best = range(work.request.sampling.logprobs)
    top = ((int(sampled.top_tokens[row, i]), float(sampled.top_logprobs[row, i])) for i in best)
    return TokenLogprobs(int(sampled.token[row]), float(sampled.logprob[row]), tuple(top))


def _sampling(outcomes: list[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.tokens]


def _split(batch: Batch, ranks: int) -> list[Batch]:
    """The inverse of ``_concatenate``."""
    if ranks == 1:
        return [batch]
    return [Batch(*parts) for parts in zip(*(np.split(x, ranks) for x in batch), strict=True)]


def _after(outcomes: list[Outcome], batch: Batch, rows: int) -> Batch:
    """A rank's step as the MTP module sees it: the token after each position, wrong drafts left out.

    Args:
      outcomes: of the step.
      batch: of the step.
      rows: how many of the tokens may be drafted from: the last right one of every request that has sampled.
    """
    tokens, positions = np.zeros_like(batch.tokens), np.full_like(batch.positions, -1)
    wanted = np.zeros(rows, np.int32)
    first = number = 0
    for outcome in outcomes:
        work = outcome.work
        following = [*work.request.tokens(work.start + 1, work.stop + 1), *outcome.tokens]
        kept = slice(first, first + len(following))
        tokens[kept], positions[kept] = following, work.start + np.arange(len(following))
        if outcome.tokens:
            wanted[number] = kept.stop - 1
            number += 1
        first += work.size
    return batch._replace(tokens=tokens, positions=positions, rows=wanted)


def _further(
    batch: Batch, drafts: list[list[tuple[int, ...]]], ranks: int, page_size: int
) -> Batch:
    """The batch of the drafts' own positions: each one behind the row of ``batch`` that it was made from."""
    parts = zip(_split(batch, ranks), drafts, strict=True)
    return _concatenate([_one_further(part, own, page_size) for part, own in parts])


def _one_further(batch: Batch, drafts: list[tuple[int, ...]], page_size: int) -> Batch:
    number, columns = len(batch.rows), batch.tables.shape[1]
    tokens, lengths = np.zeros(number, np.int32), np.zeros(number, np.int32)
    positions = np.full(number, -1, np.int32)
    slots, last = batch.slots[batch.rows], batch.positions[batch.rows]
    for i, own in enumerate(drafts):
        column = (last[i] + 1) // page_size
        # Without a page for its row a draft is left out; what is guessed from nothing will be refused.
        if last[i] >= 0 and column < columns and batch.tables[slots[i], column] >= 0:
            tokens[i], positions[i], lengths[i] = own[-1], last[i] + 1, last[i] + 1
    spans = np.stack([np.arange(number), np.arange(1, number + 1)], -1).astype(np.int32)
    tiles = tiles_of([1] * number, number, len(batch.tables))
    rows = np.arange(number, dtype=np.int32)
    return Batch(tokens, slots, lengths, spans, positions, batch.tables, rows, tiles)
