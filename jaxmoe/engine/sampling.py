"""Choosing the next token of every request of a step: one compiled function per number of rows and kind of request."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.engine.requests import Request
from jaxmoe.engine.stream import key_data
from jaxmoe.generate import nucleus_mask

TOP_LOGPROBS = 20  # the most that a request may ask for


class Settings(NamedTuple):
    """Sampling parameters of R rows, as arrays [R]; ``key`` and ``index`` fix a row's draw.

    Attributes:
      temperature: 0 for the most probable token.
      top_p, top_k, min_p: cuts; 1, 0 and 0 for none.
      repetition, presence, frequency: penalties; 1, 0 and 0 for none.
      key: PRNG keys.
      index: how many tokens the request has generated.
    """

    temperature: Float[Array, " R"]
    top_p: Float[Array, " R"]
    top_k: Int[Array, " R"]
    min_p: Float[Array, " R"]
    repetition: Float[Array, " R"]
    presence: Float[Array, " R"]
    frequency: Float[Array, " R"]
    key: jax.Array
    index: Int[Array, " R"]


class Kind(NamedTuple):
    """What a batch of rows needs; static, one executable for each.

    Attributes:
      draws: some row has a temperature above 0.
      cuts: some row that draws has top_p, top_k or min_p.
      penalties: some row has a penalty.
      bias: some row has a bias or a grammar.
      logprobs: some row wants log-probabilities.
    """

    draws: bool = False
    cuts: bool = False
    penalties: bool = False
    bias: bool = False
    logprobs: bool = False


class Sampled(NamedTuple):
    """token [R]; and, if asked for, its log-probability [R] and the best ones [R, 20], best first."""

    token: Int[Array, " R"]
    logprob: Float[Array, " R"] | None = None
    top_tokens: Int[Array, "R n"] | None = None
    top_logprobs: Float[Array, "R n"] | None = None


def kind_of(requests: Sequence[Request]) -> Kind:
    """The least that serves all ``requests``."""
    params = [request.sampling for request in requests]
    drawing = [p for p in params if p.temperature > 0]
    return Kind(
        draws=bool(drawing),
        cuts=any(p.top_p < 1 or p.top_k > 0 or p.min_p > 0 for p in drawing),
        penalties=any(p.penalised for p in params),
        bias=any(p.logit_bias or p.json_schema is not None for p in params),
        logprobs=any(p.logprobs is not None for p in params),
    )


def settings_of(requests: Sequence[Request], rows: int, keys: np.ndarray) -> Settings:
    """Arrays for ``requests``, padded to ``rows`` with greedy ones.

    Args:
      requests: in the order of the logits' rows.
      rows: R.
      keys: key data [len(requests), 2] uint32 of each request's seed.
    """
    params = [request.sampling for request in requests]
    pad = rows - len(params)

    def column(name: str, fill: float, dtype: type) -> np.ndarray:
        return np.asarray([getattr(p, name) for p in params] + [fill] * pad, dtype)

    data = np.zeros((rows, *keys.shape[1:]), np.uint32)
    data[: len(params)] = keys
    index = [len(request.output) for request in requests] + [0] * pad
    return Settings(
        column("temperature", 0, np.float32),
        column("top_p", 1, np.float32),
        column("top_k", 0, np.int32),
        column("min_p", 0, np.float32),
        column("repetition_penalty", 1, np.float32),
        column("presence_penalty", 0, np.float32),
        column("frequency_penalty", 0, np.float32),
        jax.random.wrap_key_data(data),
        np.asarray(index, np.int32),
    )


def _penalise(logits: jax.Array, s: Settings, seen: jax.Array, counts: jax.Array) -> jax.Array:
    """Repetition for all tokens seen; presence and frequency for generated ones."""
    repetition = s.repetition[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen, repeated, logits)
    times = counts.astype(jnp.float32)
    return (
        logits
        - s.presence[:, None] * (times > 0).astype(jnp.float32)
        - s.frequency[:, None] * times
    )


def _cut(scaled: jax.Array, s: Settings) -> jax.Array:
    """-inf outside top-k, then outside min-p, then outside the nucleus of what is left; the best token always stays."""
    vocab = scaled.shape[-1]
    best_first = jnp.sort(scaled, axis=-1, descending=True)
    kth = jnp.where(s.top_k > 0, jnp.minimum(s.top_k, vocab), vocab) - 1
    floor = jnp.take_along_axis(best_first, kth[:, None], axis=-1)
    # p >= min_p * p_max, in logits.
    least = jnp.where(s.min_p > 0, jnp.log(jnp.maximum(s.min_p, 1e-30)), -jnp.inf)
    floor = jnp.maximum(floor, best_first[:, :1] + least[:, None])
    scaled = jnp.where(scaled >= floor, scaled, -jnp.inf)
    # Rounded sums reach 1 before the last token: without a cut of its own a row keeps all.
    nucleus = nucleus_mask(scaled, s.top_p) | (s.top_p >= 1)[:, None]
    return jnp.where(nucleus, scaled, -jnp.inf)


@functools.partial(jax.jit, static_argnames="kind")
def choose(
    logits: Float[Array, "R V"],
    settings: Settings | None,
    seen: Bool[Array, "R V"] | None,
    counts: Int[Array, "R V"] | None,
    bias: Float[Array, "R V"] | None,
    *,
    kind: Kind,
) -> Sampled:
    """The next token of every row.

    Args:
      logits: float32.
      settings: of the rows; only read for kinds other than ``Kind()``.
      seen: tokens in prompt or output; only read for ``kind.penalties``.
      counts: occurrences in the output; likewise.
      bias: added to the logits, -inf for tokens that a grammar forbids; only read for ``kind.bias``.
      kind: static.
    """
    raw = logits
    if kind.penalties:
        logits = _penalise(logits, settings, seen, counts)
    if kind.bias:
        logits = logits + bias
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if kind.draws:
        scaled = logits / jnp.maximum(settings.temperature, 1e-6)[:, None]
        if kind.cuts:
            scaled = _cut(scaled, settings)
        keys = jax.vmap(jax.random.fold_in)(settings.key, settings.index)
        drawn = jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)
        token = jnp.where(settings.temperature > 0, drawn, token)
    if not kind.logprobs:
        return Sampled(token)
    logprobs = jax.nn.log_softmax(raw, axis=-1)
    own = jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
    values, tokens = lax.top_k(logprobs, min(TOP_LOGPROBS, logits.shape[-1]))
    return Sampled(token, own, tokens.astype(jnp.int32), values)


def histories(requests: Sequence[Request], rows: int, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """(seen [R, V] bool, counts [R, V] int32) of requests with penalties; the other rows stay empty."""
    seen, counts = np.zeros((rows, vocab), bool), np.zeros((rows, vocab), np.int32)
    for row, request in enumerate(requests):
        if not request.sampling.penalised:
            continue
        np.add.at(counts[row], request.output, 1)
        seen[row] = counts[row] > 0
        seen[row, list(request.prompt)] = True
    return seen, counts


def _biases(requests: Sequence[Request], vocab: int) -> np.ndarray:
    """[R, V] float32: logit biases, and -inf for what a grammar forbids."""
    bias = np.zeros((len(requests), vocab), np.float32)
    for row, request in enumerate(requests):
        for token, value in request.sampling.logit_bias:
            bias[row, token] += value
        if request.progress is not None and request.progress.grammar is not None:
            request.progress.grammar.forbid(bias[row])
    return bias


def next_tokens(logits: Float[Array, "R V"], asking: list[list[Request]]) -> Sampled | None:
    """The next token of every row of logits, on the host; None (after waiting for the step) if nobody asks.

    Args:
      logits: of all ranks' rows, equally many each; a rank's requests have its first rows.
      asking: requests by rank.
    """
    flat = [request for rank in asking for request in rank]
    if not flat:
        jax.block_until_ready(logits)
        return None
    kind = kind_of(flat)
    if kind == Kind():
        return jax.device_get(choose(logits, None, None, None, None, kind=kind))
    total, vocab = logits.shape
    idle = Request((0,))  # fills rows that nobody asks for, greedily
    padded = [r for rank in asking for r in [*rank, *[idle] * (total // len(asking) - len(rank))]]
    keys = [key_data(0) if request is idle else request.progress.key for request in padded]
    settings = settings_of(padded, total, np.stack(keys))
    seen, counts = histories(padded, total, vocab) if kind.penalties else (None, None)
    bias = _biases(padded, vocab) if kind.bias else None
    return jax.device_get(choose(logits, settings, seen, counts, bias, kind=kind))


def warm_up(logits: Float[Array, "R V"]) -> int:
    """Compiles greedy and plainly drawn sampling for so many rows; returns how many executables these are."""
    settings = settings_of([], logits.shape[0], np.zeros((0, 2), np.uint32))
    choose(logits, None, None, None, None, kind=Kind())
    choose(logits, settings, None, None, None, kind=Kind(draws=True))
    choose(logits, settings, None, None, None, kind=Kind(draws=True, cuts=True))
    return 3
