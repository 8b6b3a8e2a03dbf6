"""TPU kernel: a few queries score all keys into vector memory, and select there; only the selection's bits leave it. Forward only.

The k-th largest is found bit by bit, by counting, and ties are settled by a search for the position before which enough of them
lie. XLA makes positions of the bits, and scores the selected keys once more to put the best first.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _checks, _pallas
from pallas_kernels.index_topk import xla
from pallas_kernels.index_topk.selection import (
    BITS,
    LOWEST,
    best_first,
    ordered_keys,
    pack,
    positions_of,
)
from pallas_kernels.numerics import dot, precision_of

QUERIES = 8  # that share a reading of the keys: the height of a register
BLOCK = 512  # keys of one product
LANES = 128  # the width of a register
# Scores of a query that a pass over them holds in registers: those of one register of bits.
CHUNK = BITS * LANES
SCORES_BYTES = 8 * 2**20  # of vector memory, half of what the smallest chips let a kernel have


def index_topk(
    q: jax.Array, k: jax.Array, weights: jax.Array, topk: int, visible: jax.Array
) -> jax.Array:
    """See ``api.index_topk``."""
    interpret = _pallas.interpret_tpu()
    keys, size = k.shape[1:]
    _checks.not_empty(q=q, k=k)
    if 4 * QUERIES * _padded(keys) > SCORES_BYTES:
        most = SCORES_BYTES // (4 * QUERIES)
        raise NotImplementedError(f"vector memory holds the scores of {most} keys; got {keys}")
    topk = min(topk, keys)

    def select(q: jax.Array, weights: jax.Array, visible: jax.Array) -> jax.Array:
        words = select_bits(q, k, weights, visible, topk, interpret)
        positions = positions_of(words, topk)
        chosen = ordered_keys(_chosen_scores(q, k, weights, positions))
        rank = lax.broadcasted_iota(jnp.int32, positions.shape, positions.ndim - 1)
        rank = best_first(chosen, jnp.where(positions < 0, -1, rank))
        return jnp.where(rank < 0, -1, jnp.take_along_axis(positions, jnp.maximum(rank, 0), -1))

    # A query costs the selected keys' rows, or, if these are more, passes over a bit for each key.
    each = max(keys, topk * size)
    return xla.over_tiles(select, each, xla.scores_at_once(), q, weights, visible, multiple=QUERIES)


def index_topk_step(*_: Any) -> jax.Array:
    """Refuses: see ``api.index_topk_step``."""
    raise NotImplementedError("the kernel reads keys of one array, neither pages nor a step's own")


def select_bits(
    q: jax.Array,
    k: jax.Array,
    weights: jax.Array,
    visible: jax.Array,
    topk: int,
    interpret: Any = False,
) -> jax.Array:
    """The selection of each query as bits, like ``selection.select_words``.

    Args:
      q: [B, T, I, K].
      k: [B, S, K] of the same dtype.
      weights: [B, T, I].
      visible: [B, T] int32.
      topk: how many to select, at most S.
      interpret: of ``pallas_call``.

    Returns:
      [B, T, 128 ceil(S / 4096)] uint32.
    """
    (batch, tokens, heads, size), keys = q.shape, k.shape[1]
    tiles, padded = pl.cdiv(tokens, QUERIES), _padded(keys)

    def pad(x: jax.Array) -> jax.Array:
        more = tiles * QUERIES - tokens
        return jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2)) if more else x

    visible = pad(jnp.clip(visible, 0, keys))
    seen = visible.reshape(batch, tiles, QUERIES).max(-1).reshape(-1)  # by any query of a tile

    def key_block(b: jax.Array, t: jax.Array, j: jax.Array, seen: Any) -> tuple[Any, ...]:
        # Past the last block that is needed it stays the same, which is not fetched again.
        last = jnp.maximum(seen[b * tiles + t] - 1, 0) // BLOCK
        return b, jnp.minimum(j, last), 0

    per_query = lambda rows, columns: pl.BlockSpec(  # noqa: E731
        (1, rows, columns), lambda b, t, j, seen: (b, t, 0)
    )
    words = pl.pallas_call(
        functools.partial(_body, heads=heads, topk=topk),
        out_shape=jax.ShapeDtypeStruct((batch, tiles * QUERIES, padded // BITS), jnp.int32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, tiles, pl.cdiv(keys, BLOCK)),
            in_specs=[
                per_query(QUERIES * heads, size),
                pl.BlockSpec((1, BLOCK, size), key_block),
                per_query(QUERIES * heads, 1),
                per_query(QUERIES, 1),
            ],
            out_specs=per_query(QUERIES, padded // BITS),
            scratch_shapes=[pltpu.VMEM((QUERIES, padded), jnp.int32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="index_topk",
    )(
        seen,
        pad(q).reshape(batch, -1, size),
        k,
        pad(weights.astype(jnp.float32)).reshape(batch, -1, 1),
        visible[..., None],
    )
    # The kernel moves nothing across lanes: bit j of a chunk's word w is its position 128 j + w.
    words = words[:, :tokens].reshape(batch, tokens, -1, 1, LANES)
    bits = words >> lax.broadcasted_iota(jnp.int32, (1, 1, 1, BITS, 1), 3)
    return pack((bits & 1 == 1).reshape(batch, tokens, padded))


def _body(seen, q, k, weights, visible, words, scores, *, heads, topk):
    """Scores one block of keys; after the last, selects."""
    j = pl.program_id(2)
    here = seen[pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)]

    @pl.when(j == 0)
    def _():
        def clear(c: jax.Array, _: None) -> None:
            scores[:, _chunk(c)] = jnp.full((QUERIES, CHUNK), LOWEST, jnp.int32)

        lax.fori_loop(0, scores.shape[1] // CHUNK, clear, None)

    @pl.when(j * BLOCK < here)
    def _():
        dots = dot(q[0], k[0], (1, 1))
        dots = jnp.where(dots < 0, 0.0, dots)  # Not a maximum: that may lose NaN, as on CPU.
        sums = (dots * weights[0]).reshape(QUERIES, heads, BLOCK).sum(1)
        position = j * BLOCK + lax.broadcasted_iota(jnp.int32, sums.shape, 1)
        ordered = jnp.where(position < visible[0], ordered_keys(sums), LOWEST)
        scores[:, pl.ds(pl.multiple_of(j * BLOCK, BLOCK), BLOCK)] = ordered

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        kth, end = _threshold(scores, pl.cdiv(here, CHUNK), topk)
        _store_bits(scores, kth, end, words)


def _threshold(scores: Any, chunks: jax.Array, topk: int) -> tuple[jax.Array, jax.Array]:
    """The k-th largest of each row, [rows, 1], and the position before which those equal to it are selected."""
    rows, size = scores.shape

    def count(which: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
        def add(c: jax.Array, total: jax.Array) -> jax.Array:
            position = c * CHUNK + lax.broadcasted_iota(jnp.int32, (rows, CHUNK), 1)
            some = which(scores[:, _chunk(c)], position).astype(jnp.int32)
            return total + some.sum(1, keepdims=True, dtype=jnp.int32)

        return lax.fori_loop(0, chunks, add, jnp.zeros((rows, 1), jnp.int32))

    def digit(i: jax.Array, kth: jax.Array) -> jax.Array:
        candidate = kth + (jnp.int32(1) << (31 - i))  # wraps: from LOWEST up
        return jnp.where(count(lambda x, _: x >= candidate) >= topk, candidate, kth)

    kth = lax.fori_loop(0, 32, digit, jnp.full((rows, 1), LOWEST, jnp.int32))
    room = topk - count(lambda x, _: x > kth)

    def place(i: jax.Array, end: jax.Array) -> jax.Array:
        candidate = end + (jnp.int32(1) << (size.bit_length() - 1 - i))
        fits = count(lambda x, position: (x == kth) & (position < candidate)) <= room
        return jnp.where(fits, candidate, end)

    return kth, lax.fori_loop(0, size.bit_length(), place, jnp.zeros((rows, 1), jnp.int32))


def _store_bits(scores: Any, kth: jax.Array, end: jax.Array, words: Any) -> None:
    rows, size = scores.shape

    def store(c: jax.Array, _: None) -> None:
        x = scores[:, _chunk(c)]
        position = c * CHUNK + lax.broadcasted_iota(jnp.int32, x.shape, 1)
        chosen = (x > kth) | ((x == kth) & (x > LOWEST) & (position < end))
        bits = chosen.astype(jnp.int32)
        word = jnp.zeros((rows, LANES), jnp.int32)
        for j in range(BITS):
            word = word | (bits[:, j * LANES : (j + 1) * LANES] << j)
        words[0, :, pl.ds(pl.multiple_of(c * LANES, LANES), LANES)] = word

    lax.fori_loop(0, size // CHUNK, store, None)


def _chunk(c: jax.Array) -> Any:
    return pl.ds(pl.multiple_of(c * CHUNK, CHUNK), CHUNK)


def _chosen_scores(
    q: jax.Array, k: jax.Array, weights: jax.Array, positions: jax.Array
) -> jax.Array:
    """Scores [B, T, N] of each query's own keys."""
    rows = jax.vmap(lambda k, position: k[position])(k, jnp.maximum(positions, 0))
    dots = jnp.einsum(
        "btik,btnk->btin",
        q,
        rows,
        precision=precision_of(q.dtype),
        preferred_element_type=jnp.float32,
    )
    return (jax.nn.relu(dots) * weights.astype(jnp.float32)[..., None]).sum(2)


def _padded(keys: int) -> int:
    return pl.cdiv(keys, CHUNK) * CHUNK
