"""Exact selection of the k largest scores of each row, in XLA: as a mask, as positions, or best first.

Ties go to the lower position. A score of -inf or NaN is never chosen. Scores tie often: ReLU makes the score exactly 0 for
every key that all heads reject (spec 3.5). A selection is a row of bits, 32 to a word, so that everything after one pass over
the scores works on a 32nd of their number.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._implementation import on_accelerator

LOWEST = -(2**31)  # the key of what is never chosen
BITS = 32

# On accelerators (docs/log.md, First GPU run):
SORTED = 2**19  # up to so many scores a sort selects faster than passes over them


def ordered_keys(scores: jax.Array) -> jax.Array:
    """float32 -> int32 in the same order: +0 and -0 equal, -inf and NaN ``LOWEST``."""
    # Not ``scores + 0.0``: XLA drops that addition.
    bits = lax.bitcast_convert_type(jnp.where(scores == 0, jnp.float32(0), scores), jnp.int32)
    keys = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
    return jnp.where(scores > -jnp.inf, keys, LOWEST)


def select_mask(scores: jax.Array, k: int) -> jax.Array:
    """True at the k largest scores of each row (at all that can be chosen, if fewer).

    Args:
      scores: [..., S] float32; -inf where the key is not visible.
      k: how many to select.

    Returns:
      [..., S] bool.
    """
    if k >= scores.shape[-1]:
        return scores > -jnp.inf
    words = select_words(ordered_keys(scores), k)
    bits = (words[..., None] >> _lanes(words.shape)) & jnp.uint32(1)
    return bits.reshape(*words.shape[:-1], -1)[..., : scores.shape[-1]] == 1


def select_indices(scores: jax.Array, k: int) -> jax.Array:
    """Positions of the k largest scores, best first; -1 where there are fewer.

    Args:
      scores: [..., S] float32; -inf where the key is not visible.
      k: how many; the result has min(k, S) columns.

    Returns:
      [..., min(k, S)] int32.
    """
    keys, k = ordered_keys(scores), min(k, scores.shape[-1])
    if _sorts(keys):
        return _sorted_indices(keys, k)
    return best_first(keys, select_positions(scores, k))


def select_positions(scores: jax.Array, k: int) -> jax.Array:
    """``select_indices`` in ascending order of position.

    Args:
      scores: [..., S] float32; -inf where the key is not visible.
      k: how many; the result has min(k, S) columns.

    Returns:
      [..., min(k, S)] int32, ascending, -1 after the last.
    """
    keys, size = ordered_keys(scores), scores.shape[-1]
    k = min(k, size)
    if not _sorts(keys):
        return positions_of(select_words(keys, k), k)
    index = _sorted_indices(keys, k)
    ascending = jnp.sort(jnp.where(index < 0, size, index), axis=-1)
    return jnp.where(ascending == size, -1, ascending)


def select_words(keys: jax.Array, k: int) -> jax.Array:
    """The selection as bits: bit j of word w is position 32 w + j.

    Args:
      keys: [..., S] int32, of ``ordered_keys``.
      k: how many to select.

    Returns:
      [..., ceil(S / 32)] uint32.
    """
    kth = _kth_largest(keys, k)
    above, equal = pack(keys > kth), pack((keys == kth) & (kth > LOWEST))
    room = k - lax.population_count(above).sum(-1, keepdims=True, dtype=jnp.uint32).astype(
        jnp.int32
    )
    number = lax.population_count(equal).astype(jnp.int32)
    room = room - (jnp.cumsum(number, -1) - number)  # what is left at each word
    some = (jnp.uint32(1) << _nth_bit(equal, room).astype(jnp.uint32)) - jnp.uint32(1)
    return above | jnp.where(room >= number, equal, jnp.where(room > 0, equal & some, 0))


def positions_of(words: jax.Array, k: int) -> jax.Array:
    """Positions of the bits that are set, ascending.

    Args:
      words: [..., W] uint32, of ``select_words``; at most k bits are set in a row.
      k: columns of the result.

    Returns:
      [..., k] int32, -1 after the last.
    """
    number = lax.population_count(words).astype(jnp.int32).reshape(-1, words.shape[-1])
    ends = jnp.cumsum(number, -1)
    # Rank r is in the first word that ends after r; before it are those that end at r or earlier.
    passed = jax.vmap(lambda end: jnp.zeros(k + 1, jnp.int32).at[end].add(1))(ends)
    word = jnp.cumsum(passed, -1)[:, :k]
    rank = jnp.arange(k, dtype=jnp.int32)[None]
    used = rank < ends[:, -1:]
    word = jnp.where(used, word, 0)
    bits = jnp.take_along_axis(words.reshape(number.shape), word, -1)
    rank = rank - jnp.take_along_axis(ends - number, word, -1)
    positions = jnp.where(used, word * BITS + _nth_bit(bits, rank), -1)
    return positions.reshape(*words.shape[:-1], k)


def best_first(keys: jax.Array, positions: jax.Array) -> jax.Array:
    """Sorts a selection's ascending positions [..., k] by falling key; -1 stays last."""
    chosen = jnp.take_along_axis(keys, jnp.maximum(positions, 0), -1)
    order = jnp.where(positions < 0, jnp.int32(2**31 - 1), ~chosen)  # ~ turns the order round
    return lax.sort((order, positions), num_keys=1, is_stable=True)[1]


def _sorts(keys: jax.Array) -> bool:
    return on_accelerator() and keys.size <= SORTED


def _sorted_indices(keys: jax.Array, k: int) -> jax.Array:
    values, index = lax.top_k(keys, k)
    return jnp.where(values > LOWEST, index.astype(jnp.int32), -1)


def _kth_largest(keys: jax.Array, k: int) -> jax.Array:
    """The k-th largest key of each row, [..., 1], found digit by digit from the top; ``LOWEST`` if there are fewer keys.

    Passes of compare-and-count over the row, which vectorise and stay in cache: several times faster on CPU than a sort or
    ``lax.top_k`` (docs/log.md, 2026-11-23), and the same for any k. On accelerators 16 passes of two bits each, unrolled: a
    loop's iterations cost more than its work there (docs/log.md, First GPU run).
    """
    width = 2 if on_accelerator() else 1

    def digit(i: jax.Array | int, kth: jax.Array) -> jax.Array:
        shift = jnp.asarray(32 - width - width * i, jnp.int32)
        best = kth
        for value in range(1, 1 << width):
            candidate = kth + (jnp.int32(value) << shift)  # wraps: from LOWEST up
            count = (keys >= candidate).sum(-1, keepdims=True, dtype=jnp.int32)
            best = jnp.where(count >= k, candidate, best)
        return best

    start = jnp.full((*keys.shape[:-1], 1), LOWEST, jnp.int32)
    return lax.fori_loop(0, 32 // width, digit, start, unroll=on_accelerator())


def _lanes(words: tuple[int, ...]) -> jax.Array:
    """[*words, 32]: the number of each bit."""
    return lax.broadcasted_iota(jnp.uint32, (*words, BITS), len(words))


def pack(mask: jax.Array) -> jax.Array:
    """[..., S] bool -> [..., ceil(S / 32)] uint32."""
    short = -mask.shape[-1] % BITS
    mask = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, short)])
    bits = mask.reshape(*mask.shape[:-1], -1, BITS).astype(jnp.uint32)
    return (bits << _lanes(bits.shape[:-1])).sum(-1, dtype=jnp.uint32)


def _nth_bit(words: jax.Array, n: jax.Array) -> jax.Array:
    """Where the n-th bit that is set lies, from 0; anything if there is none. int32."""
    place = jnp.zeros_like(n)
    for half in (16, 8, 4, 2, 1):
        low = words & jnp.uint32((1 << half) - 1)
        number = lax.population_count(low).astype(jnp.int32)
        beyond = n >= number
        n = jnp.where(beyond, n - number, n)
        words = jnp.where(beyond, words >> jnp.uint32(half), low)
        place = place + jnp.where(beyond, half, 0)
    return place
