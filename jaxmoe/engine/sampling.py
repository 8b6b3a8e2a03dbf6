"""Choosing the next token of every request of a step: one compiled function per number of rows and kind of request."""

import enum
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.engine.requests import Request, SamplingParams
from jaxmoe.engine.stream import key_data
from jaxmoe.generate import nucleus_mask

TOP_LOGPROBS = 20  # the most that a request may ask for


class Settings(NamedTuple):
    """Sampling parameters of R rows, as arrays [R]; ``key`` and ``index`` fix a row's draw.

    Attributes:
      temperature: 0 for the most probable token.
      top_p, top_k, min_p: cuts; 1, 0 and 0 for none.
      repetition, presence, frequency: penalties; 1, 0 and 0 for none.
      key: PRNG key data [R, 2], uint32.
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


class Kind(enum.IntEnum):
    """What rows need, each kind all that the ones before it do; static, one executable for each."""

    GREEDY = 0  # the most probable token
    DRAWS = 1  # temperature
    CUTS = 2  # top_p, top_k or min_p
    LOGPROBS = 3  # log-probabilities
    CHANGES = 4  # penalties, biases, a grammar


class Ask(NamedTuple):
    """A row of logits: which token follows the request's tokens, and ``after`` those, tokens that it may yet get."""

    request: Request
    after: tuple[int, ...] = ()


class Sampled(NamedTuple):
    """token [R]; and, if asked for, its log-probability [R] and the best ones [R, 20], best first."""

    token: Int[Array, " R"]
    logprob: Float[Array, " R"] | None = None
    top_tokens: Int[Array, "R n"] | None = None
    top_logprobs: Float[Array, "R n"] | None = None


def _kind(params: SamplingParams) -> Kind:
    if params.penalised or params.logit_bias or params.constrained:
        return Kind.CHANGES
    if params.logprobs is not None:
        return Kind.LOGPROBS
    if params.temperature == 0:
        return Kind.GREEDY
    cut = params.top_p < 1 or params.top_k > 0 or params.min_p > 0
    return Kind.CUTS if cut else Kind.DRAWS


def kind_of(asks: Sequence[Ask]) -> Kind:
    """The least that serves all ``asks``."""
    return max((_kind(ask.request.sampling) for ask in asks), default=Kind.GREEDY)


def settings_of(asks: Sequence[Ask], rows: int, keys: np.ndarray) -> Settings:
    """Arrays for ``asks``, padded to ``rows`` with greedy ones.

    Args:
      asks: in the order of the logits' rows.
      rows: R.
      keys: key data [len(asks), 2] uint32 of each request's seed.
    """
    params = [ask.request.sampling for ask in asks]
    pad = rows - len(params)

    def column(name: str, fill: float, dtype: type) -> np.ndarray:
        return np.asarray([getattr(p, name) for p in params] + [fill] * pad, dtype)

    data = np.zeros((rows, *keys.shape[1:]), np.uint32)
    data[: len(params)] = keys
    index = [len(ask.request.output) + len(ask.after) for ask in asks] + [0] * pad
    return Settings(
        column("temperature", 0, np.float32),
        column("top_p", 1, np.float32),
        column("top_k", 0, np.int32),
        column("min_p", 0, np.float32),
        column("repetition_penalty", 1, np.float32),
        column("presence_penalty", 0, np.float32),
        column("frequency_penalty", 0, np.float32),
        data,
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
      settings: of the rows; not read for greedy ones.
      seen: tokens in prompt or output; only read for ``Kind.CHANGES``, like the next two.
      counts: occurrences in the output.
      bias: added to the logits, -inf for tokens that a grammar forbids.
      kind: static.
    """
    raw = logits
    if kind >= Kind.CHANGES:
        logits = _penalise(logits, settings, seen, counts) + bias
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if kind >= Kind.DRAWS:
        scaled = logits / jnp.maximum(settings.temperature, 1e-6)[:, None]
        if kind >= Kind.CUTS:
            scaled = _cut(scaled, settings)
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(settings.key), settings.index)
        drawn = jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)
        token = jnp.where(settings.temperature > 0, drawn, token)
    if kind < Kind.LOGPROBS:
        return Sampled(token)
    logprobs = jax.nn.log_softmax(raw, axis=-1)
    own = jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
    values, tokens = lax.top_k(logprobs, min(TOP_LOGPROBS, logits.shape[-1]))
    return Sampled(token, own, tokens.astype(jnp.int32), values)


def histories(asks: Sequence[Ask], rows: int, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """(seen [R, V] bool, counts [R, V] int32) of requests with penalties; the other rows stay empty."""
    seen, counts = np.zeros((rows, vocab), bool), np.zeros((rows, vocab), np.int32)
    for row, (request, after) in enumerate(asks):
        if not request.sampling.penalised:
            continue
        np.add.at(counts[row], [*request.output, *after], 1)
        seen[row] = counts[row] > 0
        seen[row, list(request.prompt)] = True
    return seen, counts


def _biases(asks: Sequence[Ask], rows: int, vocab: int) -> np.ndarray:
    """[R, V] float32: logit biases, and -inf for what a grammar forbids."""
    bias = np.zeros((rows, vocab), np.float32)
    for row, (request, after) in enumerate(asks):
        for token, value in request.sampling.logit_bias:
            bias[row, token] += value
        if request.progress is not None and request.progress.grammar is not None:
            request.progress.grammar.forbid(bias[row], after)
    return bias


_IDLE = Ask(Request((0,)))  # fills rows that nobody asks for, greedily


class Inputs(NamedTuple):
    """What ``choose`` takes besides logits."""

    kind: Kind
    settings: Settings | None = None
    seen: Bool[np.ndarray, "R V"] | None = None
    counts: Int[np.ndarray, "R V"] | None = None
    bias: Float[np.ndarray, "R V"] | None = None


def prepare(asking: list[list[Ask]], rows: int, vocab: int) -> Inputs | None:
    """What sampling the logits of all ranks takes; None if nobody asks.

    Args:
      asking: by rank, for its first rows.
      rows: of each rank.
      vocab: V.
    """
    flat = [ask for rank in asking for ask in rank]
    kind = kind_of(flat)
    if not flat:
        return None
    if kind == Kind.GREEDY:
        return Inputs(kind)
    padded = [ask for rank in asking for ask in [*rank, *[_IDLE] * (rows - len(rank))]]
    keys = [key_data(0) if ask is _IDLE else ask.request.progress.key for ask in padded]
    total = len(padded)
    settings = settings_of(padded, total, np.stack(keys))
    if kind < Kind.CHANGES:
        return Inputs(kind, settings)
    return Inputs(kind, settings, *histories(padded, total, vocab), _biases(padded, total, vocab))


def finish(
    logits: Float[Array, "R V"],
    best: Int[Array, " R"],
    inputs: Inputs | None,
    program: Callable[..., Sampled] = choose,
) -> Sampled | None:
    """The next token of every row of logits, on the host; None (after waiting for the step) if nobody asks.

    Args:
      logits: of the rows that ``inputs`` is for.
      best: the most probable token of every row.
      inputs: from ``prepare``.
      program: ``choose``, or something that gives the same.
    """
    if inputs is None:
        jax.block_until_ready(logits)
        return None
    kind, *operands = inputs
    if kind == Kind.GREEDY:
        return Sampled(np.asarray(best))
    return jax.device_get(program(logits, *operands, kind=kind))


def warm_up(logits: Float[Array, "R V"], program: Callable[..., Sampled] = choose) -> list[Kind]:
    """Compiles every kind of sampling for so many rows, but for the greedy one, which needs nothing; returns the kinds."""
    rows, vocab = logits.shape
    settings = settings_of([], rows, np.zeros((0, 2), np.uint32))
    changes = (*histories([], rows, vocab), _biases([], rows, vocab))
    kinds = [kind for kind in Kind if kind > Kind.GREEDY]
    for kind in kinds:
        program(logits, settings, *(changes if kind >= Kind.CHANGES else (None,) * 3), kind=kind)
    return kinds
