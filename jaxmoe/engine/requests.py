"""What a caller asks of the engine and what it gets back."""

import dataclasses
import itertools
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from jaxmoe.engine.grammar import Form, Json

_ids = itertools.count()
_MOST_BIAS = 1e6  # far above any logit, and sums of it stay finite in float32


def _check(name: str, value: float, low: float, high: float, hint: str) -> None:
    if not (isinstance(value, int | float) and low <= value <= high):
        raise ValueError(f"{name} must be in [{low:g}, {high:g}]; got {value!r}. {hint}")


def _maybe(kind: type) -> Callable[[Any], bool]:
    return lambda value: value is None or isinstance(value, kind) and not isinstance(value, bool)


def _are(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, tuple | list) and all(isinstance(x, kind) for x in value)


def _pairs(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(
        isinstance(pair, tuple | list)
        and len(pair) == 2
        and isinstance(pair[0], int)
        and isinstance(pair[1], int | float)
        for pair in value
    )


def _is_form(value: Any) -> bool:
    return value is None or isinstance(value, Form)


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen. Draws depend on these and the request's own tokens, not on the batch."""

    max_new_tokens: int = 128
    """At most so many tokens; the request also ends at a stop condition or a full context."""
    temperature: float = 0.0
    """0 takes the most probable token."""
    top_p: float = 1.0
    """Nucleus: the smallest set of tokens with at least this mass."""
    top_k: int = 0
    """Only the k most probable tokens; 0 for all."""
    min_p: float = 0.0
    """Only tokens at least this times as probable as the most probable one."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or output."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output."""
    frequency_penalty: float = 0.0
    """Subtracted once per occurrence in the output."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, added to its logit) pairs."""
    logprobs: int | None = None
    """With each token, its log-probability and those of so many most probable ones; None for neither.
    Those of the model itself: before penalties, biases, temperature and cuts."""
    stop: tuple[str, ...] = ()
    """Texts at which to end; not part of the result."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens at which to end, beside the model's own; not part of the text."""
    ignore_eos: bool = False
    """Whether to go on after the model's own stop token."""
    seed: int | None = None
    """Of the draws; None draws one."""
    json_schema: str | None = None
    """A JSON schema (as JSON text) that the output must satisfy."""
    form: Form | None = None
    """What else than JSON the output must look like: see ``jaxmoe.engine.grammar``."""
    width: int | None = None
    """SEFP mantissa bits, 3 to 8, at which the weights are read; None for the engine's policy or default."""

    def __post_init__(self):
        if not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise ValueError(
                f"max_new_tokens must be an integer >= 1; got {self.max_new_tokens!r}."
            )
        _check("temperature", self.temperature, 0, 100, "Use 0 for greedy.")
        _check("top_p", self.top_p, 0, 1, "Use 1 for no cut.")
        if self.top_p == 0:
            raise ValueError("top_p must be above 0; got 0. Use temperature=0 for greedy.")
        _check("min_p", self.min_p, 0, 1, "Use 0 for no cut.")
        if not isinstance(self.top_k, int) or not 0 <= self.top_k < 2**31:
            raise ValueError(
                f"top_k must be an integer >= 0 and below 2^31; got {self.top_k!r}. Use 0 for all."
            )
        _check("repetition_penalty", self.repetition_penalty, 1e-3, 1e3, "Use 1 for none.")
        _check("presence_penalty", self.presence_penalty, -100, 100, "Use 0 for none.")
        _check("frequency_penalty", self.frequency_penalty, -100, 100, "Use 0 for none.")
        self._check_kinds()
        for token, bias in self.logit_bias:
            if token < 0 or not abs(bias) <= _MOST_BIAS:
                raise ValueError(
                    f"logit_bias takes token ids and numbers within {_MOST_BIAS:g}; got {token}: {bias}."
                )
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise ValueError(f"logprobs must be in 0..20 or None; got {self.logprobs}.")
        if any(not text for text in self.stop):
            raise ValueError("stop must not contain an empty text; leave it out.")
        if self.form is not None and self.json_schema is not None:
            raise ValueError("form and json_schema must not both be given; leave one out.")
        if self.width is not None and not 3 <= self.width <= 8:
            raise ValueError(f"width must be in 3..8 or None; got {self.width}.")

    def _check_kinds(self) -> None:
        """What would only fail on the engine's thread, and there end everyone's requests."""
        kinds = {
            "stop": (_are(str), "a tuple of texts, e.g. ('END',)"),
            "stop_token_ids": (_are(int), "a tuple of token ids, e.g. (257,)"),
            "logit_bias": (_pairs, "a tuple of (token id, number) pairs, e.g. ((65, -5.0),)"),
            "logprobs": (_maybe(int), "an integer in 0..20 or None"),
            "seed": (_maybe(int), "an integer or None"),
            "width": (_maybe(int), "an integer in 3..8 or None"),
            "json_schema": (_maybe(str), "JSON text or None; use json.dumps"),
            "form": (_is_form, "a form of jaxmoe.engine.grammar or None"),
        }
        for name, (good, rule) in kinds.items():
            if not good(getattr(self, name)):
                raise TypeError(f"{name} must be {rule}; got {getattr(self, name)!r}.")

    @property
    def constrained(self) -> bool:
        """Whether the output must have a form."""
        return self.form is not None or self.json_schema is not None

    def output_form(self) -> Form | None:
        """The form that the output must have.

        Raises:
          ValueError: if ``json_schema`` is no JSON schema, or beyond the limits.
        """
        return self.form if self.json_schema is None else Json(self.json_schema)

    @property
    def penalised(self) -> bool:
        """Whether tokens seen before change the logits."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1, 0, 0)


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one generated token, before temperature and cuts.

    Attributes:
      token: the token.
      logprob: its own.
      top: (token, logprob) of the most probable ones, best first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What has been added to a request: as a rule one token.

    Attributes:
      token_ids: new tokens.
      text: new text; may lag behind the tokens by an unfinished character or a possible stop text.
      logprobs: one per token, if asked for.
      finish_reason: None while it goes on; "stop", "length", "cancelled", "deadline" or "error" with the last chunk.
      error: what went wrong, with finish_reason "error".
    """

    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished request.

    Attributes:
      request_id: the engine's name for it.
      prompt_tokens: how many tokens the prompt had.
      cached_tokens: how many of those were not computed again, because an earlier prompt began alike.
      token_ids: generated tokens, without a stop token.
      text: their text, without a stop text.
      logprobs: one per token, if asked for.
      finish_reason: as in ``Chunk``.
      time_to_first_token_s: from submission.
      total_s: from submission to the end.
      width: SEFP bits at which the weights were read; None if they aren't in SEFP.
    """

    request_id: str
    prompt_tokens: int
    cached_tokens: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: str
    time_to_first_token_s: float
    total_s: float
    width: int | None = None


@dataclasses.dataclass(eq=False)
class Request:
    """A request as the scheduler sees it. Owned by the engine's thread once submitted.

    Attributes:
      prompt: token ids.
      sampling: how to choose tokens.
      priority: higher goes first and is preempted last.
      deadline: ``time.monotonic()`` after which it ends with "deadline"; None for never.
      request_id: unique name.
      output: generated tokens, a stop token included.
      computed: how many of prompt + output have rows in the cache.
      pages: the pages that hold those rows, in order.
      rank: whose pages; None while waiting.
      slot: its row of the rank's page tables; None while waiting.
      drafts: guesses at the tokens after these, to be verified with the next step.
      cached_tokens: how many tokens of the prompt were found in the cache.
      preemptions: how often its pages were taken away.
      moves: how often its rank was lost.
      order: of arrival.
      progress: the engine's own notes.
    """

    prompt: Sequence[int]
    sampling: SamplingParams = SamplingParams()
    priority: int = 0
    deadline: float | None = None
    request_id: str = ""
    output: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    rank: int | None = None
    slot: int | None = None
    drafts: tuple[int, ...] = ()
    cached_tokens: int = 0
    preemptions: int = 0
    moves: int = 0
    order: int = dataclasses.field(default_factory=lambda: next(_ids))
    progress: Any = None

    def __post_init__(self):
        if not self.request_id:
            self.request_id = f"req-{secrets.token_hex(8)}"

    @property
    def width(self) -> int | None:
        """SEFP bits at which the weights are read for it; only requests of one width share a step, or pages."""
        return self.sampling.width

    @property
    def length(self) -> int:
        """Tokens so far, prompt included."""
        return len(self.prompt) + len(self.output)

    @property
    def most_tokens(self) -> int:
        """Tokens that it may come to, prompt included."""
        return len(self.prompt) + self.sampling.max_new_tokens

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens ``start`` to ``stop`` of prompt and output."""
        split = len(self.prompt)
        return [
            *self.prompt[start : min(stop, split)],
            *self.output[max(start - split, 0) : max(stop - split, 0)],
        ]
