"""The pipeline that the Hopper products share: tiles of a result, each a sum of products of blocks that come from memory in steps.

A persistent grid walks over the tiles. In each block of threads one warpgroup copies operands to shared memory (TMA) as far ahead as
it has room, across the ends of tiles; the others multiply (wgmma) and store.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _pallas
from pallas_kernels.grouped_matmul.config import Tiling

STEP = 64  # of the contracted dimension: one swizzled row of 128 bytes
ALIGNED = 8  # Copies address rows by this many.


class Tile(NamedTuple):
    """What a block works on next.

    Attributes:
      matrix: index of the group's matrix.
      steps: of the contraction; with none the result is zero.
      row: the first of the result's.
      column: which column tile.
      more: what else the schedule says.
    """

    matrix: jax.Array
    steps: jax.Array
    row: jax.Array
    column: jax.Array
    more: Any = None


class Buffers(NamedTuple):
    """Shared memory of one block of threads, and the barriers of its ring of ``stages`` slots."""

    left: Any  # [stages, warpgroups, ...]
    right: Any  # [stages, ...]
    out: Any  # ([warpgroups, 2, 64, 64] swizzled, the same plain): one or the other at a time
    loaded: Any
    released: Any


def walk(
    tiling: Tiling,
    buffers: Buffers,
    tiles: jax.Array,
    tile_at: Callable[[jax.Array], Tile],
    load: Callable[[Tile, jax.Array, jax.Array], None],
    operands: Callable[[jax.Array, jax.Array], tuple[Any, Any]],
    busy: Callable[[Tile, jax.Array], jax.Array | bool],
    store: Callable[[Tile, jax.Array, jax.Array], None],
) -> None:
    """The pipeline: ``load`` fills slots that ``operands`` names, in the order in which tiles and their steps come.

    Every warpgroup counts the steps of all tiles, so that all agree on the slot without talking. A warpgroup that is not ``busy``
    with a tile only lets its slots go.
    """
    warpgroup, stages = lax.axis_index("warpgroup"), tiling.stages
    slot_of = lambda count: lax.rem(count, jnp.int32(stages))  # noqa: E731

    def each_tile(work: Callable[[Tile, jax.Array], None]) -> jax.Array:
        @plgpu.nd_loop((tiles,), collective_axes="sm", init_carry=jnp.int32(0))
        def steps(info: plgpu.NDLoopInfo, carry: jax.Array) -> jax.Array:
            tile = tile_at(info.index[0])
            work(tile, carry)
            return carry + tile.steps

        return steps

    @pl.when(warpgroup == tiling.warpgroups)
    def _():
        if tiling.warpgroups > 1:  # One alone has as many as there can be.
            plgpu.set_max_registers(40, action="decrease")

        def fill(tile: Tile, before: jax.Array) -> None:
            def step(k: jax.Array, _) -> None:
                slot = slot_of(before + k)

                @pl.when(before + k >= stages)
                def _():
                    plgpu.barrier_wait(buffers.released.at[slot])

                load(tile, k, slot)

            lax.fori_loop(0, tile.steps, step, None)

        steps = each_tile(fill)

        @pl.loop(jnp.maximum(steps - stages, 0), steps)
        def _(step: jax.Array) -> None:  # So that no barrier is left with an arrival.
            plgpu.barrier_wait(buffers.released.at[slot_of(step)])

    @pl.when(warpgroup < tiling.warpgroups)
    def _():
        if tiling.warpgroups > 1:
            plgpu.set_max_registers(232, action="increase")

        def multiply(tile: Tile, before: jax.Array) -> None:
            def accumulate(sums: Any) -> None:
                def step(k: jax.Array, _) -> None:
                    slot = slot_of(before + k)
                    plgpu.barrier_wait(buffers.loaded.at[slot])
                    plgpu.wgmma(sums, *operands(slot, warpgroup))
                    plgpu.wgmma_wait(1)  # The product before this one is done: its slot is free.

                    @pl.when(k > 0)
                    def _():
                        plgpu.barrier_arrive(buffers.released.at[slot_of(before + k - 1)])

                lax.fori_loop(0, tile.steps, step, None)
                result = sums[...]

                @pl.when(tile.steps > 0)
                def _():
                    plgpu.barrier_arrive(buffers.released.at[slot_of(before + tile.steps - 1)])

                store(tile, warpgroup, result)

            pl.run_scoped(
                accumulate, plgpu.ACC((tiling.block_rows, tiling.block_columns), jnp.float32)
            )

        def skip(tile: Tile, before: jax.Array) -> None:
            def step(k: jax.Array, _) -> None:
                slot = slot_of(before + k)
                plgpu.barrier_wait(buffers.loaded.at[slot])
                plgpu.barrier_arrive(buffers.released.at[slot])

            lax.fori_loop(0, tile.steps, step, None)

        def work(tile: Tile, before: jax.Array) -> None:
            mine = busy(tile, warpgroup)
            if mine is True:
                multiply(tile, before)
            else:
                lax.cond(mine, lambda: multiply(tile, before), lambda: skip(tile, before))

        each_tile(work)
        plgpu.wait_smem_to_gmem(0)


def store_rows(
    tiling: Tiling,
    out: Any,
    y: Any,
    warpgroup: jax.Array,
    result: jax.Array,
    start: jax.Array,
    column: jax.Array,
    within: tuple[jax.Array, jax.Array] | None = None,
) -> None:
    """Stores ``result`` to ``y`` from row ``start`` on: all of it, or its rows ``within[0] <= row < within[1]``.

    In pieces that take turns in two buffers; before the first, those of the tile before have left both.
    """
    swizzled, plain = out
    result = result.astype(y.dtype)
    pieces = [
        (r, c)
        for r in range(0, tiling.block_rows, STEP)
        for c in range(0, tiling.block_columns, STEP)
    ]

    def store(buffers: Any, copy: Callable[[Any, Any, int], None]) -> None:
        for i, (r, c) in enumerate(pieces):
            plgpu.wait_smem_to_gmem(min(i, 1), wait_read_only=True)
            buffer = buffers.at[warpgroup, i % 2]
            buffer[...] = result[r : r + STEP, c : c + STEP]
            plgpu.commit_smem()
            copy(buffer, y.at[:, pl.ds(column + c, STEP)], r)
            plgpu.commit_smem_to_gmem_group()

    def whole(buffer: Any, y: Any, r: int) -> None:
        place = y.at[pl.ds(start + r, STEP)]
        plgpu.copy_smem_to_gmem(buffer, place, commit_group=False)

    def part(buffer: Any, y: Any, r: int) -> None:
        begin, end = (jnp.clip(w - r, 0, STEP) for w in within)
        # Copies have constant sizes: one for each binary digit of how many rows there are.
        for size in (64, 32, 16, 8, 4, 2, 1):
            has = (end - begin) & size != 0

            @pl.when(has)
            def _(size=size, begin=begin):
                place = y.at[pl.ds(start + r + begin, size)]
                plgpu.copy_smem_to_gmem(buffer.at[pl.ds(begin, size)], place, commit_group=False)

            begin = begin + jnp.where(has, size, 0)

    if within is None:
        store(swizzled, whole)
    else:
        lax.cond(
            within[1] - within[0] == tiling.block_rows,
            lambda: store(swizzled, whole),
            lambda: store(plain, part),
        )


def kernel(
    body: Callable[..., None], tiling: Tiling, result: jax.ShapeDtypeStruct, left, right, interpret
) -> Callable[..., jax.Array]:
    """``body(*inputs, output, buffers)`` on every multiprocessor; ``left`` and ``right`` are the shapes of one slot's operands."""
    dtype, stages, warpgroups = result.dtype, tiling.stages, tiling.warpgroups
    stored = plgpu.SMEM((warpgroups, 2, STEP, STEP), dtype, transforms=_pallas.SWIZZLED)
    plain = plgpu.SMEM((warpgroups, 2, STEP, STEP), dtype)

    def with_buffers(*refs: Any) -> None:
        pl.run_scoped(
            lambda *scratch: body(*refs, Buffers(*scratch)),
            plgpu.SMEM((stages, warpgroups, *left), dtype, transforms=_pallas.SWIZZLED),
            plgpu.SMEM((stages, *right), dtype, transforms=_pallas.SWIZZLED),
            # Not every JAX's simulator has unions.
            plgpu.RefUnion(stored, plain) if interpret is None else (stored, plain),
            plgpu.Barrier(num_arrivals=warpgroups + 1, num_barriers=stages),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
            collective_axes="warpgroup",
        )

    return plgpu.kernel(
        with_buffers,
        out_type=result,
        grid=(_pallas.multiprocessors(),),
        grid_names=("sm",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=_pallas.WARPGROUP),
        interpret=interpret,
    )
