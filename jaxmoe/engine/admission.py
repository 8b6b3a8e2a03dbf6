"""From a caller's arguments to a request that can run: everything that can be wrong with them is found here."""

import dataclasses
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxmoe.config import ModelConfig
from jaxmoe.engine import grammar
from jaxmoe.engine.requests import Chunk, Request, SamplingParams
from jaxmoe.engine.stream import Progress, Stream, key_data
from jaxmoe.engine.text import StoppableText
from jaxmoe.engine.widths import Widths
from jaxmoe.tokenizer import ByteTokenizer, FileTokenizer


class Admission:
    """Makes requests for one model.

    Args:
      config: the model.
      tokenizer: for text prompts, stop texts and results.
      max_length: tokens that a request may have.
      cancel: ends a request by its name.
      widths: which there are, and which one a request gets.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: ByteTokenizer | FileTokenizer,
        max_length: int,
        cancel: Callable[[str], bool],
        widths: Widths,
    ):
        self._config, self._tokenizer, self._max_length = config, tokenizer, max_length
        self._cancel, self._widths = cancel, widths
        eos = config.eos_token_id
        self._eos = frozenset(() if eos is None else np.atleast_1d(np.asarray(eos)).tolist())

    def request(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams,
        priority: int,
        timeout_s: float | None,
        request_id: str | None,
        on_chunk: Callable[[Chunk], None] | None,
    ) -> Request:
        """A request with its progress. Arguments and errors as of ``Engine.submit``."""
        # What follows counts, in the deadline and in the request's times.
        submitted = time.monotonic()
        ids = self._ids(prompt)
        room = self._max_length - len(ids)
        if room < 1:
            raise ValueError(
                f"prompt has {len(ids)} tokens but the engine's max_length is {self._max_length}, output included; "
                "shorten the prompt."
            )
        if sampling.max_new_tokens > room:
            sampling = dataclasses.replace(sampling, max_new_tokens=room)
        for token, _ in sampling.logit_bias:
            if token >= self._config.vocab_size:
                raise ValueError(
                    f"logit_bias names token {token}; ids must be below vocab_size ({self._config.vocab_size})."
                )
        width = self._widths.choose(ids, sampling)
        if width != sampling.width:
            sampling = dataclasses.replace(sampling, width=width)
        if not isinstance(priority, int):
            raise TypeError(f"priority must be an integer; got {priority!r}.")
        request = Request(
            ids, sampling, priority, _deadline(submitted, timeout_s), request_id or ""
        )
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        own = frozenset() if sampling.ignore_eos else self._eos
        request.progress = Progress(
            Stream(request, self._cancel, queued=on_chunk is None),
            StoppableText(self._tokenizer.stream(), sampling.stop),
            key_data(seed),
            own | frozenset(sampling.stop_token_ids),
            on_chunk,
            grammar.start(sampling.output_form(), self._tokenizer, self._config, self._eos),
            submitted,
        )
        return request

    def _ids(self, prompt: Any) -> list[int]:
        if not isinstance(prompt, str | Iterable):
            raise TypeError(f"prompt must be text or integer token ids; got {prompt!r}.")
        ids = self._tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise ValueError("prompt must have at least one token; got none.")
        if not all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in ids):
            raise TypeError("prompt must be text or integer token ids.")
        if min(ids) < 0 or max(ids) >= self._config.vocab_size:
            raise ValueError(
                f"prompt ids must lie in [0, vocab_size={self._config.vocab_size}); got {min(ids)}..{max(ids)}."
            )
        return [int(i) for i in ids]


def _deadline(submitted: float, timeout_s: float | None) -> float | None:
    if timeout_s is None:
        return None
    if not isinstance(timeout_s, int | float) or not timeout_s > 0:
        raise ValueError(f"timeout_s must be > 0 or None; got {timeout_s!r}.")
    return submitted + timeout_s
