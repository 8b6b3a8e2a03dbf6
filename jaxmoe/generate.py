"""Text generation from a notebook or script: prefill once, then a compiled decode loop.

Shapes are bucketed, so that any prompt length and any number of new tokens run in a few executables.
For many concurrent requests of different lengths use the engine; this is the simple path and the oracle.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.cache import Cache, commit, init_cache
from jaxmoe.config import ModelConfig
from jaxmoe.model import check_tokens
from jaxmoe.moe import MoeOptions
from jaxmoe.params import Params
from jaxmoe.steps import run_step, step, unembed_step
from quant import at_width

DECODE_CHUNK = (
    64  # tokens per call of the decode loop, and with a callback the most between two calls of it
)
CALLBACK_CHUNK = 8
PREFILL_CHUNK = 256  # tokens of each prompt per step


def bucket(n: int, *, smallest: int = 16) -> int:
    """The smallest of 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, ... that is >= n: four sizes per doubling."""
    if n <= smallest:
        return smallest
    quarter = max(1 << (n - 1).bit_length() - 3, 1)
    return -(-n // quarter) * quarter


class Sampling(NamedTuple):
    """Per-sequence sampling parameters, as arrays: temperature [B], top_p [B], key [B]."""

    temperature: jax.Array
    top_p: jax.Array
    key: jax.Array


class _State(NamedTuple):
    """token [B] sampled but not yet fed; index: tokens sampled so far; done [B]: has produced a stop token."""

    cache: Cache
    token: jax.Array
    index: jax.Array
    done: jax.Array


def nucleus_mask(logits: Float[Array, "B V"], top_p: Float[Array, " B"]) -> Bool[Array, "B V"]:
    """The smallest set of tokens of mass >= top_p; the best token always belongs to it."""
    order = jnp.argsort(logits, axis=-1, descending=True)
    probability = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    keep_sorted = (before < top_p[:, None]).at[:, 0].set(True)
    return jnp.put_along_axis(
        jnp.zeros_like(keep_sorted), order, keep_sorted, axis=-1, inplace=False
    )


def sample(
    logits: Float[Array, "B V"],
    sampling: Sampling | None,
    index: Int[Array, ""],
    *,
    nucleus: bool = True,
) -> Int[Array, " B"]:
    """The next token of each sequence.

    Args:
      logits: float32.
      sampling: parameters; None means greedy. A temperature of 0 is greedy for that sequence.
      index: how many tokens each sequence has sampled; together with its own key it fixes the draw, so a
        sequence's tokens do not depend on what else is in the batch.
      nucleus: whether any top_p is below 1 (static: it costs a sort).
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if sampling is None:
        return greedy
    scaled = logits / jnp.maximum(sampling.temperature, 1e-6)[:, None]
    if nucleus:
        scaled = jnp.where(nucleus_mask(scaled, sampling.top_p), scaled, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in, (0, None))(sampling.key, index)
    drawn = jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)
    return jnp.where(sampling.temperature > 0, drawn, greedy)


@functools.partial(jax.jit, static_argnames=("config", "moe"), donate_argnums=(3, 4))
def _fill(params, config, tokens, cache, last, lengths, *, moe):
    """One chunk of the prompts into the cache; ``last`` [B, D] gets the hidden state of every prompt that ends in it."""
    before, size = cache.lengths, tokens.shape[1]
    output = run_step(params, config, tokens, cache, moe=moe)
    cache = commit(cache, output.entries, jnp.clip(lengths - before, 0, size))
    at = lengths - 1 - before
    here = jnp.take_along_axis(output.hidden, jnp.clip(at, 0, size - 1)[:, None, None], axis=1)[
        :, 0
    ]
    return cache, jnp.where(((at >= 0) & (at < size))[:, None], here, last)


@functools.partial(jax.jit, static_argnames="nucleus")
def _first(params, last, sampling, stop, *, nucleus):
    token = sample(unembed_step(params, last), sampling, jnp.zeros((), jnp.int32), nucleus=nucleus)
    return token, (token[:, None] == stop[None]).any(-1)


def _prefill(params, config, tokens, cache, lengths, sampling, stop, *, moe, nucleus):
    """The prompts as steps of at most PREFILL_CHUNK tokens: the same arithmetic as decoding and as the engine."""
    dtype = params["embed"]["weight"].dtype
    batch, length = tokens.shape
    last = jnp.zeros((batch, config.hidden_size), dtype)
    lengths = jnp.asarray(lengths)
    for start in range(0, length, PREFILL_CHUNK):
        piece = tokens[:, start : start + PREFILL_CHUNK]
        short = bucket(piece.shape[1]) - piece.shape[1]
        piece = jnp.pad(piece, ((0, 0), (0, short)))
        cache, last = _fill(params, config, piece, cache, last, lengths, moe=moe)
    token, done = _first(params, last, sampling, stop, nucleus=nucleus)
    return _State(cache, token, jnp.ones((), jnp.int32), done)


@functools.partial(
    jax.jit, static_argnames=("config", "chunk", "moe", "nucleus"), donate_argnums=(2,)
)
def _decode(params, config, state, sampling, stop, steps, *, chunk, moe, nucleus):
    """Up to ``steps`` (<= chunk) more tokens; ends early when every sequence is done. Returns state, tokens, count."""

    def body(carry):
        state, tokens = carry
        logits, entries = step(params, config, state.token[:, None], state.cache, moe=moe)
        ones = jnp.ones_like(state.cache.lengths)
        token = sample(logits[:, 0], sampling, state.index, nucleus=nucleus)
        token = jnp.where(state.done, state.token, token)
        done = state.done | (token[:, None] == stop[None]).any(-1)
        column = state.index - first
        tokens = lax.dynamic_update_slice_in_dim(tokens, token[:, None], column, 1)
        return _State(commit(state.cache, entries, ones), token, state.index + 1, done), tokens

    def more(carry):
        state, _ = carry
        return (state.index - first < steps) & ~state.done.all()

    first = state.index
    tokens = jnp.zeros((state.token.shape[0], chunk), jnp.int32)
    state, tokens = lax.while_loop(more, body, (state, tokens))
    return state, tokens, state.index - first


def _per_sequence(value: Any, batch: int, name: str) -> np.ndarray:
    """A scalar or [B] argument as float32 [B]."""
    value = np.asarray(value, np.float32)
    if value.shape not in ((), (batch,)):
        raise ValueError(
            f"{name} must be one number or one per sequence ({batch}); got shape {value.shape}."
        )
    return np.broadcast_to(value, (batch,))


def _sampling(
    temperature: Any, top_p: Any, key: jax.Array | None, batch: int
) -> tuple[Sampling | None, bool]:
    """Checked sampling parameters, and whether any sequence needs the nucleus sort."""
    temperature = _per_sequence(temperature, batch, "temperature")
    top_p = _per_sequence(top_p, batch, "top_p")
    if not (np.isfinite(temperature).all() and (temperature >= 0).all()):
        raise ValueError(
            f"temperature must be finite and >= 0; got {temperature.min()}. Use 0 for greedy."
        )
    if not ((top_p > 0) & (top_p <= 1)).all():
        raise ValueError(
            f"top_p must be in (0, 1]; got {top_p.min()}..{top_p.max()}. Use 1.0 for no cut."
        )
    if not (temperature > 0).any():
        return None, False
    if key is None:
        raise ValueError("temperature > 0 needs a random key; pass key=jax.random.key(seed).")
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(f"key must be a JAX PRNG key; got {key!r}. Use jax.random.key(seed).")
    if key.ndim == 0:
        key = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    if key.shape != (batch,):
        raise ValueError(
            f"key must be one key or one per sequence ({batch}); got shape {key.shape}."
        )
    return Sampling(jnp.asarray(temperature), jnp.asarray(top_p), key), bool((top_p < 1).any())


def _stop_ids(eos_token_id: int | Sequence[int] | None) -> np.ndarray:
    ids = [] if eos_token_id is None else np.atleast_1d(np.asarray(eos_token_id))
    return np.asarray(ids, np.int32)


def generate(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array | np.ndarray, "B T"],
    max_new_tokens: int,
    *,
    temperature: float | Float[Array | np.ndarray, " B"] = 0.0,
    top_p: float | Float[Array | np.ndarray, " B"] = 1.0,
    key: jax.Array | None = None,
    width: int | None = None,
    lengths: Int[Array | np.ndarray, " B"] | Sequence[int] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    on_tokens: Callable[[np.ndarray], None] | None = None,
    cache_dtype: str | None = None,
    moe: MoeOptions = MoeOptions(),
) -> Int[Array, "B max_new_tokens"]:
    """Continues every prompt by ``max_new_tokens`` tokens.

    Args:
      params: parameters.
      config: the model.
      tokens: prompts. Of different lengths: pad on the right and pass ``lengths``.
      max_new_tokens: how many tokens to add.
      temperature: 0 for greedy; a scalar or one per sequence.
      top_p: nucleus mass in (0, 1]; a scalar or one per sequence.
      key: one PRNG key (sequence i then uses ``fold_in(key, i)``) or one per sequence. A sequence's draws depend on its
        own key only, not on the rest of the batch.
      width: SEFP bit width at which ``quant.quantize_params`` weights are read; None for all that is stored.
      lengths: true prompt lengths; default all of ``tokens``.
      eos_token_id: stop id or ids. None (the default) never stops: exactly ``max_new_tokens`` tokens are sampled.
        A stopped sequence repeats its stop id to the end.
      on_tokens: called with int32 [B, n] as tokens appear, n <= 8; the pieces concatenate to the result.
      cache_dtype: "float32", "bfloat16" or "fp8", as in ``init_cache``; None for the parameters' own.
      moe: how experts are computed.

    Returns:
      int32 [B, max_new_tokens].

    Raises:
      ValueError, TypeError: for arguments out of range, naming them.
    """
    tokens = check_tokens(tokens, config)
    batch, length = tokens.shape
    if not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be an integer >= 1; got {max_new_tokens!r}.")
    if width is not None:
        params = at_width(params, width)
    lengths = np.full(batch, length, np.int32) if lengths is None else np.asarray(lengths, np.int32)
    if lengths.shape != (batch,) or lengths.min() < 1 or lengths.max() > length:
        raise ValueError(f"lengths must be {batch} numbers in 1..{length}; got {lengths}.")
    sampling, nucleus = _sampling(temperature, top_p, key, batch)
    stop = jnp.asarray(_stop_ids(eos_token_id))
    static = {"moe": moe, "nucleus": nucleus}

    capacity = bucket(length + max_new_tokens)
    dtype = params["embed"]["weight"].dtype if cache_dtype is None else cache_dtype
    cache = init_cache(config, batch, capacity, dtype)
    state = _prefill(params, config, tokens, cache, lengths, sampling, stop, **static)
    pieces = [np.asarray(state.token)[:, None]]
    if on_tokens is not None:
        on_tokens(pieces[0])
    produced, chunk = 1, DECODE_CHUNK if on_tokens is None else CALLBACK_CHUNK
    while produced < max_new_tokens and not (stop.size and np.asarray(state.done).all()):
        steps = min(chunk, max_new_tokens - produced)
        state, new, count = _decode(
            params, config, state, sampling, stop, steps, chunk=chunk, **static
        )
        piece = np.asarray(new)[:, : int(count)]
        pieces.append(piece)
        produced += piece.shape[1]
        if on_tokens is not None:
            on_tokens(piece)
    if produced < max_new_tokens:
        pieces.append(np.repeat(pieces[-1][:, -1:], max_new_tokens - produced, axis=1))
    return jnp.asarray(np.concatenate(pieces, axis=1))
