"""Mosaic GPU backend for Hopper: keys scored on the tensor cores, the k-th largest found by counting. Forward only.

Two kernels for a bounded tile of queries. ``score_keys`` multiplies 64 keys at a time with the heads of a few queries (keys are
the rows of the product, so that a score is a sum along one thread's registers), and writes scores as integers of the same order.
``thresholds`` gives each query a thread block that finds the k-th largest digit by digit, and settles ties by a search for the
position before which enough of them lie. XLA makes positions of that: one pass over the scores, and work on a 32nd of them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import paged
from pallas_kernels._pallas import (
    SHARED_MEMORY,
    SWIZZLED,
    WARPGROUP,
    interpret_gpu,
    multiprocessors,
)
from pallas_kernels.index_topk import xla
from pallas_kernels.index_topk.config import ROWS, Config, chosen
from pallas_kernels.index_topk.selection import (
    LOWEST,
    best_first,
    ordered_keys,
    pack,
    positions_of,
)


def score_keys(
    q: jax.Array,
    cached: jax.Array,
    layer: jax.Array,
    pages: jax.Array,
    weights: jax.Array,
    visible: jax.Array,
    width: int,
    config: Config,
    interpret: Any = None,
) -> jax.Array:
    """Ordered scores of cached keys.

    Args:
      q: [B, T, I, K] bfloat16, T a multiple of ``config.queries``.
      cached: [L, P, S, K] bfloat16, S a multiple of 64.
      layer: [1] int32.
      pages: [B, W] int32, 0 where there is none.
      weights: [B, T, I] float32.
      visible: [B, T] int32: each query scores that many leading keys, or more. At most W S.
      width: columns of the result, at least W S.
      config: sizes.
      interpret: of ``plgpu.kernel``.

    Returns:
      [B, T, width] int32, as ``selection.ordered_keys``; anything from ``visible`` on.
    """
    # Heads without weight add nothing to scores of finite keys.
    more = config.padded(q.shape[2]) - q.shape[2]
    if more:
        q = jnp.pad(q, ((0, 0), (0, 0), (0, more), (0, 0)))
        weights = jnp.pad(weights, ((0, 0), (0, 0), (0, more)))
    batch, tokens, heads, size = q.shape
    page = cached.shape[2]
    number, groups = config.queries, tokens // config.queries
    # [.., K, queries and heads]: the right side of the product as it is.
    q = q.reshape(batch, groups, number * heads, size).swapaxes(2, 3)
    # The most that a query of a group sees: read as one number by a thread block.
    ends = jnp.minimum(visible, pages.shape[1] * page).reshape(batch, groups, number).max(-1)

    def body(q_ref, cached_ref, layer_ref, pages_ref, weights_ref, ends_ref, out_ref, *scratch):
        q_smem, weights_smem, keys_smem, ready, arrived = scratch
        b, group, split, warpgroup = (
            lax.axis_index(name) for name in ("batch", "group", "split", "warpgroup")
        )
        tiles = config.split // ROWS
        first = split * tiles + warpgroup
        end = jnp.minimum((ends_ref[b, group] + ROWS - 1) // ROWS, (split + 1) * tiles)
        # Warpgroups take tiles in turn and have slots of their own: none waits for another.
        turns = jnp.maximum(end - first + config.warpgroups - 1, 0) // config.warpgroups

        def fetch(turn: jax.Array | int) -> None:
            tile = first + turn * config.warpgroups
            slot = warpgroup * config.depth + turn % config.depth
            # A product with ROWS, which the compiler sees to be a multiple of it.
            row = pl.ds(tile % (page // ROWS) * ROWS, ROWS)
            rows = cached_ref.at[layer_ref[0], pages_ref[b, tile // (page // ROWS)], row]
            plgpu.copy_gmem_to_smem(rows, keys_smem.at[slot], arrived.at[slot])

        @pl.when((warpgroup == 0) & (turns > 0))
        def _():
            plgpu.copy_gmem_to_smem(q_ref.at[b, group], q_smem, ready.at[0])
            plgpu.copy_gmem_to_smem(weights_ref.at[b, group], weights_smem, ready.at[1])

        for turn in range(config.depth):
            pl.when(turn < turns)(functools.partial(fetch, turn))

        @pl.when(turns > 0)
        def _():
            plgpu.barrier_wait(ready.at[0])
            plgpu.barrier_wait(ready.at[1])

        @pl.loop(0, turns)
        def _(turn: jax.Array) -> None:
            slot = warpgroup * config.depth + turn % config.depth
            plgpu.barrier_wait(arrived.at[slot])
            columns = pl.ds((first + turn * config.warpgroups) * ROWS, ROWS)
            for some in range(0, number, config.together):
                lines = pl.ds(some * heads, config.together * heads)

                def multiply(acc: Any, lines: Any = lines, slot: jax.Array = slot) -> jax.Array:
                    plgpu.wgmma(acc, keys_smem.at[slot], q_smem.at[:, lines])
                    return acc[...]

                dots = pl.run_scoped(
                    multiply, plgpu.ACC((ROWS, config.together * heads), jnp.float32)
                )
                for i in range(config.together):
                    weight = lax.broadcast_in_dim(weights_smem[some + i], (ROWS, heads), [1])
                    mine = jnp.maximum(dots[:, i * heads : (i + 1) * heads], 0.0) * weight
                    out_ref[b, group * number + some + i, columns] = ordered_keys(mine.sum(1))
            pl.when(turn + config.depth < turns)(functools.partial(fetch, turn + config.depth))

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, tokens, width), jnp.int32),
        grid=(batch, groups, -(-pages.shape[1] * page // config.split)),
        grid_names=("batch", "group", "split"),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((size, number * heads), jnp.bfloat16, transforms=SWIZZLED),
            plgpu.SMEM((number, heads), jnp.float32),
            plgpu.SMEM(
                (config.warpgroups * config.depth, ROWS, size), jnp.bfloat16, transforms=SWIZZLED
            ),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=config.warpgroups * config.depth),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=WARPGROUP),
        interpret=interpret,
    )(q, cached, layer, pages, weights.reshape(batch, groups, number, heads), ends)


def thresholds(
    keys: jax.Array, visible: jax.Array, k: int, config: Config, interpret: Any = None
) -> jax.Array:
    """Which keys of each row are the k largest: those above a value, and those equal to it before a position.

    Args:
      keys: [R, width] int32 of ``score_keys``; width a multiple of ``config.chunk``.
      visible: [R] int32, how many leading keys count.
      k: how many to select.
      config: sizes.
      interpret: of ``plgpu.kernel``.

    Returns:
      [R, 2] int32, the value and the position.
    """
    rows, width = keys.shape
    resident = width <= config.resident
    lowest = np.int32(LOWEST)

    def body(keys_ref, visible_ref, out_ref, *scratch):
        row = lax.axis_index("row")
        end = visible_ref[row]
        chunks = (end + config.chunk - 1) // config.chunk

        def places(i: jax.Array) -> jax.Array:
            return i * config.chunk + lax.broadcasted_iota(jnp.int32, (config.chunk,), 0)

        def seen(i: jax.Array) -> jax.Array:
            chunk = keys_ref[row, pl.ds(i * config.chunk, config.chunk)]
            return jnp.where(places(i) < end, chunk, lowest)

        if resident:  # every pass reads shared memory
            (row_smem,) = scratch

            @pl.loop(0, chunks)
            def _(i: jax.Array) -> None:
                row_smem[pl.ds(i * config.chunk, config.chunk)] = seen(i)

        def load(i: jax.Array) -> jax.Array:
            return row_smem[pl.ds(i * config.chunk, config.chunk)] if resident else seen(i)

        def count(*tests: Any) -> list[jax.Array]:
            """How many keys of the row pass each test of (keys, which chunk)."""

            def add(i: jax.Array, sums: Any) -> Any:
                chunk = load(i)
                passed = (test(chunk, i).astype(jnp.int32) for test in tests)
                return tuple(a + b for a, b in zip(sums, passed, strict=True))

            start = tuple(jnp.zeros((config.chunk,), jnp.int32) for _ in tests)
            return [total.sum() for total in lax.fori_loop(0, chunks, add, start)]

        def at_least(bound: Any) -> Any:
            return lambda chunk, i: chunk >= bound

        (total,) = count(at_least(lowest + 1))
        kept = jnp.minimum(total, k)

        # The kept-th largest key, digit by digit; done as soon as exactly that many are at or above it.
        def digit(state: Any) -> Any:
            shift, kth, number = state
            bounds = [kth + (jnp.int32(v) << shift) for v in range(1, 1 << config.digit)]
            for bound, passed in zip(bounds, count(*map(at_least, bounds)), strict=True):
                enough = passed >= kept
                kth, number = jnp.where(enough, bound, kth), jnp.where(enough, passed, number)
            return shift - config.digit, kth, number

        _, kth, number = lax.while_loop(
            lambda state: (state[0] >= 0) & (state[2] > kept),
            digit,
            (jnp.int32(32 - config.digit), jnp.int32(lowest), total),
        )

        # If more are, the last of them are equal: chosen are those of them before ``cut``.
        (above,) = count(at_least(kth + 1))
        tied = number > kept

        def halve(state: Any) -> Any:
            bit, cut = state
            bound = cut + (jnp.int32(1) << bit)
            (passed,) = count(lambda chunk, i: (chunk == kth) & (places(i) < bound))
            return bit - 1, jnp.where(passed <= kept - above, bound, cut)

        first = jnp.where(tied, jnp.int32(width.bit_length() - 1), jnp.int32(-1))
        _, cut = lax.while_loop(lambda state: state[0] >= 0, halve, (first, jnp.int32(0)))
        out_ref[row, 0] = jnp.maximum(kth, lowest + 1)
        out_ref[row, 1] = jnp.where(tied, cut, end)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, 2), jnp.int32),
        grid=(rows,),
        grid_names=("row",),
        scratch_types=[plgpu.SMEM((width,), jnp.int32)] if resident else [],
        compiler_params=plgpu.CompilerParams(lowering_semantics=WARPGROUP),
        interpret=interpret,
    )(keys, visible)


def index_topk(
    q: jax.Array,
    k: jax.Array,
    weights: jax.Array,
    topk: int,
    visible: jax.Array,
    config: Config | None = None,
) -> jax.Array:
    """See ``api.index_topk``; ``config`` replaces the sizes that would be chosen."""
    interpret = interpret_gpu()
    batch, size = k.shape[:2]
    cached = jnp.pad(k, ((0, 0), (0, -size % ROWS), (0, 0)))[None]
    config = _checked(q, cached, size, config)
    topk = min(topk, size)
    width = -(-size // config.chunk) * config.chunk
    layer = jnp.zeros(1, jnp.int32)

    def some(q: jax.Array, weights: jax.Array, visible: jax.Array, pages: jax.Array) -> jax.Array:
        def select(q: jax.Array, weights: jax.Array, visible: jax.Array) -> jax.Array:
            keys = score_keys(q, cached, layer, pages, weights, visible, width, config, interpret)
            positions = _positions(keys, visible, topk, config, interpret)
            return best_first(keys, positions)

        return _over_tiles(select, width, config, q, weights, visible)

    visible = jnp.clip(visible.astype(jnp.int32), 0, size)
    operands = (q, weights.astype(jnp.float32), visible, paged.table_of(None, batch))
    return xla.over_sequences(some, width, config.scores, *operands, multiple=config.queries)


def index_topk_step(
    q: jax.Array,
    cached: jax.Array,
    layer: jax.Array | int,
    own: jax.Array,
    weights: jax.Array,
    lengths: jax.Array,
    topk: int,
    pages: jax.Array | None,
    spans: jax.Array | None,
    config: Config | None = None,
) -> jax.Array:
    """See ``api.index_topk_step``; ``config`` replaces the sizes that would be chosen."""
    interpret = interpret_gpu()
    batch, tokens = q.shape[:2]
    capacity, extra = paged.capacity_of(cached, pages), own.shape[1]
    config = _checked(q, cached, capacity + extra, config)
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    width = -(-(capacity + extra) // config.chunk) * config.chunk

    def some(
        q: jax.Array,
        weights: jax.Array,
        spans: jax.Array,
        lengths: jax.Array,
        pages: jax.Array,
        *mine: jax.Array,
    ) -> jax.Array:
        (rows,) = mine or (own,)

        def select(q: jax.Array, weights: jax.Array, spans: jax.Array) -> jax.Array:
            past = jnp.broadcast_to(lengths[:, None], q.shape[:2])
            keys = score_keys(q, cached, layer, pages, weights, past, width, config, interpret)
            # The step's own keys follow a sequence's last cached one, so that a row ends where the sequence does.
            last = ordered_keys(xla.own_scores(q, rows, weights, spans))
            keys = jax.vmap(lambda a, b, n: lax.dynamic_update_slice(a, b, (0, n)))(
                keys, last, lengths
            )
            row = _positions(keys, past + extra, topk, config, interpret)
            return jnp.where(row < past[..., None], row, row - past[..., None] + capacity)

        return _over_tiles(select, width, config, q, weights, spans)

    spans, pages = paged.spans_of(spans, batch, tokens), paged.table_of(pages, batch)
    operands = (q, weights.astype(jnp.float32), spans, lengths.astype(jnp.int32))
    operands = (*operands, jnp.maximum(pages, 0), *(() if own.shape[0] == 1 else (own,)))
    return xla.over_sequences(some, width, config.scores, *operands, multiple=config.queries)


def _checked(q: jax.Array, cached: jax.Array, keys: int, config: Config | None) -> Config:
    """``config``, or the one for queries that score up to ``keys`` keys.

    Raises:
      NotImplementedError: if the kernels cannot take these arrays.
    """
    if 0 in q.shape or 0 in cached.shape or not keys:
        raise NotImplementedError(f"nothing to do; got q {q.shape} and keys {cached.shape}")
    if q.dtype != jnp.bfloat16 or cached.dtype != jnp.bfloat16:
        raise NotImplementedError(
            f"the kernel takes bfloat16 queries and keys; got {q.dtype} and {cached.dtype}"
        )
    heads, size = q.shape[2:]
    if size % 64 or size > 256:
        raise NotImplementedError(f"the kernel takes K of 64, 128, 192 or 256; got {size}")
    config = config or chosen(q.shape, keys, multiprocessors())
    padded = config.padded(heads)
    columns = config.together * padded
    if columns > 256 or padded > 2 * heads:
        raise NotImplementedError(
            f"the kernel multiplies 64, 128, 192 or 256 queries' heads at once, at least half of them real; "
            f"got {columns} ({heads} heads, padded to {padded})"
        )
    if cached.shape[2] % ROWS:
        raise NotImplementedError(
            f"the kernel reads {ROWS} keys of a page at once; got pages of {cached.shape[2]}"
        )
    if (needed := config.shared_bytes(heads, size)) > SHARED_MEMORY:
        raise NotImplementedError(
            f"a block has {SHARED_MEMORY} bytes of shared memory; {heads} heads of {size} need {needed} with {config}"
        )
    return config


def _positions(
    keys: jax.Array, visible: jax.Array, k: int, config: Config, interpret: Any
) -> jax.Array:
    """[B, T, k] ascending positions of the k largest of the leading ``visible`` [B, T] keys of [B, T, width]."""
    flat, ends = keys.reshape(-1, keys.shape[2]), visible.reshape(-1)
    kth, before = jnp.split(thresholds(flat, ends, k, config, interpret), 2, axis=1)
    place = jnp.arange(flat.shape[1], dtype=jnp.int32)[None]
    chosen = ((flat > kth) & (place < ends[:, None])) | ((flat == kth) & (place < before))
    return positions_of(pack(chosen), k).reshape(*keys.shape[:2], k)


def _over_tiles(select: Any, keys: int, config: Config, *per_token: jax.Array) -> jax.Array:
    """``xla.over_tiles`` of whole groups of queries; those that fill up the last group see nothing."""
    batch, tokens = per_token[0].shape[:2]
    short = -tokens % config.queries
    padded = [jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2)) for x in per_token]
    chosen = xla.over_tiles(select, keys, config.scores, *padded, multiple=config.queries)
    return chosen[:, :tokens]
