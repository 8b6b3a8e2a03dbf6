"""Speculation's bookkeeping: what a step has given, who guesses on from there, and the batches that guessing takes."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxmoe.engine.requests import TokenLogprobs
from jaxmoe.engine.scheduler import Work
from jaxmoe.engine.step import Batch, StepResult, tiles_of


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


class Drafter(NamedTuple):
    """Who guesses ahead.

    Attributes:
      guess: logits after the tokens of a batch, over the rows committed so far.
      commit: puts a guess's rows into the cache.
      sees_step: whether it must see the step's own tokens, of whatever request, before the first guess; otherwise the
        first one is made from the sampled token.
    """

    guess: Callable[[Batch], StepResult]
    commit: Callable[[StepResult, Batch], None]
    sees_step: bool


def sampling_ones(outcomes: list[Outcome]) -> list[Outcome]:
    """Those that have got a token, in order."""
    return [outcome for outcome in outcomes if outcome.tokens]


def after(outcomes: list[Outcome], batch: Batch, rows: int) -> Batch:
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


def further(batch: Batch, drafts: list[tuple[int, ...]], page_size: int) -> Batch:
    """A rank's batch of the drafts' own positions: each one behind the row of ``batch`` that it was made from."""
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
