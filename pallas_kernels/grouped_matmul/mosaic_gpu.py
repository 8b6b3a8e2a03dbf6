"""Hopper kernels: y = x @ w[group], dx = dy @ w[group]^T and dw[group] = x^T @ dy, one pipeline for all three.

A tile belongs to one group and is one *block* of rows for each multiplying warpgroup. Copies address rows by eights, so the first
block of a group may begin with up to seven rows of the group before, and the last, which ends where the group ends and repeats rows
of its neighbour bit for bit, may end with as many of the next: those are multiplied, each on its own, and not stored.

Quantised weights become an array of x's dtype first, those of all groups at once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _pallas
from pallas_kernels.grouped_matmul import config, weights
from pallas_kernels.grouped_matmul._pipeline import (
    ALIGNED,
    STEP,
    Buffers,
    Tile,
    kernel,
    store_rows,
    walk,
)
from pallas_kernels.grouped_matmul.config import Tiling
from pallas_kernels.grouped_matmul.weights import Weights

# That quantised matrices may take once they are decoded; 7168 x 2048, as of DeepSeek-V3's experts, 146 of them.
_DECODED_BYTES = 2**32
_Shaped = jax.Array | jax.ShapeDtypeStruct


def rows_schedule(
    group_sizes: jax.Array, group_offset: jax.Array, rows: int, tile_rows: int
) -> tuple[jax.Array, jax.Array]:
    """Cuts groups, and what lies past the last as one more, into tiles of ``tile_rows`` rows from a multiple of eight on.

    Returns:
      int32 [tiles, 4]: matrix (-1 past the last group), first row of the tile, first and end row of its group; and
      int32 [1], how many tiles there are.
    """
    groups = group_sizes.shape[0]
    some = min(groups + 1, rows)  # that are not empty, at most
    bound = (rows + (ALIGNED - 1) * some) // tile_rows + some
    index = jnp.arange(groups + 1, dtype=jnp.int32)
    sizes = jnp.concatenate([group_sizes, (rows - group_sizes.sum())[None]])
    # Sums over all pairs are two small kernels on a GPU; scans and lookups would be several each.
    before = index[None, :] < index[:, None]
    start = jnp.where(before, sizes[None], 0).sum(1, dtype=jnp.int32)
    aligned = start // ALIGNED * ALIGNED
    count = jnp.where(sizes > 0, -((aligned - start - sizes) // tile_rows), 0)
    first_tile = jnp.where(before, count[None], 0).sum(1, dtype=jnp.int32)
    matrix = jnp.where(index < groups, index + group_offset, -1)
    tile = jnp.arange(bound, dtype=jnp.int32)[:, None]
    mine = (tile >= first_tile[None]) & (tile < (first_tile + count)[None])
    of_group = lambda values: jnp.where(mine, values, 0).sum(1, dtype=jnp.int32)  # noqa: E731
    table = [
        of_group(matrix[None]),
        of_group(aligned[None] + (tile - first_tile[None]) * tile_rows),
        of_group(start[None]),
        of_group((start + sizes)[None]),
    ]
    return jnp.stack(table, axis=1), count.sum(dtype=jnp.int32)[None]


def _padded(rows: jax.Array, least: int) -> jax.Array:
    """With zeros after the last row: copies address rows by eights."""
    size = max(least, -(-rows.shape[0] // ALIGNED) * ALIGNED)
    more = size - rows.shape[0]
    return jnp.pad(rows, ((0, more), (0, 0))) if more else rows


def rows_times_groups(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    *,
    transpose: bool,
    tiling: Tiling,
    interpret: Any = None,
) -> jax.Array:
    """y[r] = x[r] @ w[group of r] (or its transpose); rows past the last group are zero."""
    rows, inner = x.shape
    columns = w.shape[1 if transpose else 2]
    height, width = tiling.block_rows, tiling.block_columns
    table, used = rows_schedule(group_sizes, group_offset, rows, tiling.tile_rows)
    x = _padded(x, height)
    last = x.shape[0] - height

    def body(x_ref, w_ref, table_ref, used_ref, y_ref, buffers: Buffers) -> None:
        row_tiles = used_ref[0]

        def tile_at(index: jax.Array) -> Tile:
            row, column = plgpu.planar_snake(
                index, (row_tiles, columns // width), 1, tiling.panel_columns // width
            )
            matrix, first, begin, end = (table_ref[row, i] for i in range(4))
            steps = jnp.where(matrix < 0, 0, inner // STEP)
            return Tile(matrix, steps, first, column, (begin, end))

        def start_of(tile: Tile, warpgroup: jax.Array | int) -> jax.Array:
            """Of this warpgroup's block: within the group as far as that fills one, and within x."""
            begin, end = tile.more
            latest = jnp.maximum((end + ALIGNED - 1) // ALIGNED * ALIGNED - height, begin)
            start = jnp.minimum(tile.row + warpgroup * height, jnp.minimum(latest, last))
            return pl.multiple_of(start // ALIGNED * ALIGNED, ALIGNED)

        def load(tile: Tile, k: jax.Array, slot: jax.Array) -> None:
            loaded = buffers.loaded.at[slot]
            along = pl.ds(pl.multiple_of(k * STEP, STEP), STEP)
            across = pl.ds(pl.multiple_of(tile.column * width, STEP), width)
            for warpgroup in range(tiling.warpgroups):
                mine = pl.ds(start_of(tile, warpgroup), height)
                left = buffers.left.at[slot, warpgroup]
                plgpu.copy_gmem_to_smem(x_ref.at[mine, along], left, loaded)
            place = (tile.matrix, across, along) if transpose else (tile.matrix, along, across)
            plgpu.copy_gmem_to_smem(w_ref.at[place], buffers.right.at[slot], loaded)

        def operands(slot: jax.Array, warpgroup: jax.Array) -> tuple[Any, Any]:
            right = buffers.right.at[slot]
            right = right.transpose((1, 0)) if transpose else right
            return buffers.left.at[slot, warpgroup], right

        def busy(tile: Tile, warpgroup: jax.Array) -> jax.Array:
            return tile.row + warpgroup * height < tile.more[1]

        def store(tile: Tile, warpgroup: jax.Array, result: jax.Array) -> None:
            begin, end = tile.more
            start = start_of(tile, warpgroup)
            within = jnp.maximum(begin - start, 0), jnp.minimum(end - start, height)
            column = pl.multiple_of(tile.column * width, STEP)
            store_rows(tiling, buffers.out, y_ref, warpgroup, result, start, column, within)

        tiles = row_tiles * (columns // width)
        walk(tiling, buffers, tiles, tile_at, load, operands, busy, store)

    result = jax.ShapeDtypeStruct((x.shape[0], columns), x.dtype)
    right = (width, STEP) if transpose else (STEP, width)
    run = kernel(body, tiling, result, (height, STEP), right, interpret)
    return run(x, w, table, used)[:rows]


def _edges(
    rows: jax.Array, start: jax.Array, first: jax.Array, end: jax.Array, full: jax.Array
) -> jax.Array:
    """[E * 2 * STEP, size]: of each group the rows before ``first`` and those past its full steps, then zeros."""
    index = start[:, None] + jnp.arange(2 * STEP, dtype=jnp.int32)[None]
    index = jnp.where(index < first[:, None], index, index + full[:, None] * STEP).reshape(-1)
    inside = index < jnp.repeat(end, 2 * STEP)
    taken = rows[jnp.where(inside, index, 0)]
    return jnp.where(inside[:, None], taken, jnp.zeros((), rows.dtype))


def groups_outer(
    x: jax.Array,
    dy: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    matrices: int,
    *,
    tiling: Tiling,
    interpret: Any = None,
) -> jax.Array:
    """dw[g] = x[rows of g].T @ dy[rows of g], accumulated in float32; [matrices, K, N], zero where there is no group.

    Rows are contracted, so none of another group may be read, not even times zero: the few rows at both ends of a group that do not
    fill a step of aligned rows are taken from a small copy, which is zero beyond them.
    """
    groups = group_sizes.shape[0]
    inner, columns = x.shape[1], dy.shape[1]
    height, width = tiling.block_rows, tiling.block_columns
    end = jnp.cumsum(group_sizes)
    start = end - group_sizes
    first = jnp.minimum(-(-start // ALIGNED) * ALIGNED, end)
    full = (end - first) // STEP
    steps = full - (full * STEP - group_sizes) // STEP
    x, dy = _padded(x, STEP), _padded(dy, STEP)
    x_edges, dy_edges = (_edges(a, start, first, end, full) for a in (x, dy))
    row_tiles, column_tiles = inner // tiling.tile_rows, columns // width

    def body(x_ref, x_edges_ref, dy_ref, dy_edges_ref, table_ref, dw_ref, buffers: Buffers):
        def tile_at(index: jax.Array) -> Tile:
            per_matrix = jnp.int32(row_tiles * column_tiles)
            matrix = lax.div(index, per_matrix)
            row, column = plgpu.planar_snake(
                lax.rem(index, per_matrix),
                (row_tiles, column_tiles),
                1,
                tiling.panel_columns // width,
            )
            group, steps, full, first = (table_ref[matrix, i] for i in range(4))
            return Tile(matrix, steps, row * tiling.tile_rows, column, (group, full, first))

        def load(tile: Tile, k: jax.Array, slot: jax.Array) -> None:
            group, full, first = tile.more
            loaded = buffers.loaded.at[slot]
            across = pl.ds(pl.multiple_of(tile.column * width, STEP), width)

            def copy(x_ref: Any, dy_ref: Any, row: jax.Array) -> None:
                along = pl.ds(pl.multiple_of(row, ALIGNED), STEP)
                for warpgroup in range(tiling.warpgroups):
                    mine = pl.ds(pl.multiple_of(tile.row + warpgroup * height, STEP), height)
                    left = buffers.left.at[slot, warpgroup]
                    plgpu.copy_gmem_to_smem(x_ref.at[along, mine], left, loaded)
                plgpu.copy_gmem_to_smem(dy_ref.at[along, across], buffers.right.at[slot], loaded)

            lax.cond(
                k < full,
                lambda: copy(x_ref, dy_ref, first + k * STEP),
                lambda: copy(x_edges_ref, dy_edges_ref, (2 * group + k - full) * STEP),
            )

        def operands(slot: jax.Array, warpgroup: jax.Array) -> tuple[Any, Any]:
            left = buffers.left.at[slot, warpgroup]
            return left.transpose((1, 0)), buffers.right.at[slot]

        def store(tile: Tile, warpgroup: jax.Array, result: jax.Array) -> None:
            start = pl.multiple_of(tile.row + warpgroup * height, STEP)
            column = pl.multiple_of(tile.column * width, STEP)
            y = dw_ref.at[tile.matrix]
            store_rows(tiling, buffers.out, y, warpgroup, result, start, column)

        tiles = jnp.int32(matrices * row_tiles * column_tiles)
        walk(tiling, buffers, tiles, tile_at, load, operands, lambda *_: True, store)

    table = jnp.stack([jnp.arange(groups, dtype=jnp.int32), steps, full, first], axis=1)
    table = lax.dynamic_update_slice_in_dim(
        jnp.zeros((matrices, 4), jnp.int32), table, group_offset, 0
    )
    result = jax.ShapeDtypeStruct((matrices, inner, columns), x.dtype)
    run = kernel(body, tiling, result, (STEP, height), (STEP, width), interpret)
    return run(x, x_edges, dy, dy_edges, table)


def _tilings(
    x: _Shaped, w: _Shaped | weights.Quantised, groups: int
) -> tuple[Tiling, Tiling, Tiling]:
    """For the product, the gradient of the rows and that of the matrices.

    Raises:
      NotImplementedError: for what the kernels don't do.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the kernel multiplies bfloat16 or float16; got {x.dtype}")
    _, inner, columns = w.shape
    if inner % STEP or columns % STEP:
        raise NotImplementedError(
            f"w's K and N must be multiples of {STEP}; got {inner} and {columns}"
        )
    rows = x.shape[0]
    if 0 in (rows, groups, inner, columns):
        raise NotImplementedError(
            f"nothing to do; got {groups} groups, x {x.shape} and w {w.shape}"
        )
    return (
        config.rows_tiling(rows, groups, inner, columns),
        config.rows_tiling(rows, groups, columns, inner, "rows transposed"),
        config.outer_tiling(rows, groups, inner, columns),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _grouped_matmul(x, w, group_sizes, group_offset, tilings, interpret) -> jax.Array:
    return rows_times_groups(
        *(x, w, group_sizes, group_offset),
        transpose=False,
        tiling=tilings[0],
        interpret=interpret,
    )


def _forward(x, w, group_sizes, group_offset, tilings, interpret):
    y = _grouped_matmul(x, w, group_sizes, group_offset, tilings, interpret)
    return y, (x, w, group_sizes, group_offset)


def _backward(tilings, interpret, residuals, dy):
    x, w, group_sizes, group_offset = residuals
    where = (group_sizes, group_offset)
    dx = rows_times_groups(dy, w, *where, transpose=True, tiling=tilings[1], interpret=interpret)
    dw = groups_outer(x, dy, *where, w.shape[0], tiling=tilings[2], interpret=interpret)
    return dx, dw, None, None


_grouped_matmul.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _grouped_quantised(x, w, group_sizes, group_offset, tilings, interpret) -> jax.Array:
    """Decodes the groups' matrices ahead, and again for dx, so that nothing but what is stored is kept between."""
    return _rows_times_decoded(
        x, w, group_sizes, group_offset, transpose=False, tiling=tilings[0], interpret=interpret
    )


def _rows_times_decoded(x, w, group_sizes, group_offset, **how) -> jax.Array:
    w = weights.matrices(w, group_offset, group_sizes.shape[0], x.dtype)
    return rows_times_groups(x, w, group_sizes, jnp.int32(0), **how)


def _quantised_forward(x, w, group_sizes, group_offset, tilings, interpret):
    y = _grouped_quantised(x, w, group_sizes, group_offset, tilings, interpret)
    return y, (w, group_sizes, group_offset)


def _quantised_backward(tilings, interpret, residuals, dy):
    dx = _rows_times_decoded(dy, *residuals, transpose=True, tiling=tilings[1], interpret=interpret)
    return dx, None, None, None


_grouped_quantised.defvjp(_quantised_forward, _quantised_backward)


def _check_quantised(x: jax.Array, w: weights.Quantised, groups: int) -> None:
    """Refuses where decoding all groups' matrices would cost more than XLA's loop, which decodes those in use one by one.

    Raises:
      NotImplementedError: with the reason.
    """
    if x.shape[0] < groups:
        raise NotImplementedError(
            f"all matrices are decoded, which {x.shape[0]} rows for {groups} groups are too few for"
        )
    needed = groups * w.shape[1] * w.shape[2] * x.dtype.itemsize
    if needed > _DECODED_BYTES:
        raise NotImplementedError(
            f"the matrices are decoded to at most {_DECODED_BYTES} bytes; {groups} of {w.shape[1:]} need {needed}"
        )


def grouped_matmul(
    x: jax.Array, w: Weights, group_sizes: jax.Array, group_offset: jax.Array | int
) -> jax.Array:
    """See ``api.grouped_matmul``."""
    quantised = isinstance(w, weights.Quantised)
    if quantised:
        _check_quantised(x, w, group_sizes.shape[0])
    interpret = _pallas.interpret_gpu()
    tilings = _tilings(x, w, group_sizes.shape[0])
    run = _grouped_quantised if quantised else _grouped_matmul
    return run(x, w, group_sizes, jnp.asarray(group_offset, jnp.int32), tilings, interpret)
