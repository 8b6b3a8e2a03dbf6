"""A submitted request as its caller sees it, and the engine's notes on it."""

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxmoe.engine.requests import Chunk, Request, Result, TokenLogprobs
from jaxmoe.engine.text import StoppableText

logger = logging.getLogger(__name__)


class Stream:
    """Chunks of a request, as they come: iterate over it, or wait for ``result()``.

    Attributes:
      request_id: the engine's name for the request.
      prompt_tokens: tokens of the prompt.
    """

    def __init__(self, request: Request, cancel: Callable[[str], bool], *, queued: bool = True):
        self.request_id, self.prompt_tokens = request.request_id, len(request.prompt)
        self._cancel, self._queued = cancel, queued
        self._chunks: queue.SimpleQueue[Chunk] = queue.SimpleQueue()
        self._result: Result | None = None
        self._finished = threading.Event()
        self._ended = False

    def __iter__(self) -> Iterator[Chunk]:
        if not self._queued:
            raise RuntimeError("this request's chunks go to its on_chunk; use result() here.")
        return self._take()

    def _take(self) -> Iterator[Chunk]:
        while not self._ended:
            chunk = self._chunks.get()
            self._ended = chunk.finish_reason is not None
            yield chunk

    def cancel(self) -> bool:
        """Ends the request at the next step; False if it has ended already."""
        return self._cancel(self.request_id)

    def result(self, timeout_s: float | None = None) -> Result:
        """Waits for the end.

        Raises:
          TimeoutError: if it has not come after ``timeout_s``; the request goes on.
        """
        if not self._finished.wait(timeout_s):
            raise TimeoutError(f"request {self.request_id} has not finished after {timeout_s} s.")
        return self._result

    def __repr__(self) -> str:
        return f"Stream({self.request_id}, {self.prompt_tokens} prompt tokens)"


@dataclasses.dataclass
class Progress:
    """What the engine notes about a request.

    Attributes:
      stream: its caller's end.
      text: turns tokens into text.
      key: PRNG key data [2] uint32 of its draws.
      stop_ids: tokens that end it.
      on_chunk: called with every chunk instead of queueing it in the stream.
      grammar: state of its grammar, if it has one.
      submitted, first_token: ``time.monotonic()``.
      shown: generated tokens that belong to the result.
      pieces: text so far.
      logprobs: one per token, if asked for.
      cancelled: to be ended at the next step.
    """

    stream: Stream
    text: StoppableText
    key: np.ndarray
    stop_ids: frozenset[int]
    on_chunk: Callable[[Chunk], None] | None
    grammar: Any
    submitted: float
    first_token: float | None = None
    shown: list[int] = dataclasses.field(default_factory=list)
    pieces: list[str] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    cancelled: bool = False

    def emit(self, chunk: Chunk) -> None:
        """Hands a chunk to the caller."""
        self.shown += chunk.token_ids
        self.pieces.append(chunk.text)
        self.logprobs += chunk.logprobs
        if self.on_chunk is None:
            self.stream._chunks.put(chunk)
            return
        try:
            self.on_chunk(chunk)
        except Exception:  # one caller's mistake must not end the others' requests
            logger.exception("on_chunk failed, request is cancelled request=%s", self.stream)
            self.cancelled = True

    def finish(self, request: Request, reason: str) -> Result:
        """Notes the end, once the last chunk is out; returns the result."""
        now = time.monotonic()
        first = self.first_token if self.first_token is not None else now
        result = Result(
            request.request_id,
            len(request.prompt),
            request.cached_tokens,
            tuple(self.shown),
            "".join(self.pieces),
            tuple(self.logprobs),
            reason,
            first - self.submitted,
            now - self.submitted,
            request.width,
        )
        self.stream._result = result
        self.stream._finished.set()
        return result


def key_data(seed: int) -> np.ndarray:
    """Key data of ``jax.random.key(seed)``, but for what JAX does not keep: the upper half of seeds of 64 bits."""
    return np.asarray([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)
