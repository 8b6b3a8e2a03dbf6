"""TPU kernel: tiles of rows, each multiplied by the matrix of every group that has rows in it. dw is the XLA backend's.

A prefetched schedule names the tile and the group of each *visit*. The visits of a tile come one after another, so that its result
stays in vector memory until all of its groups have stored their rows.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _pallas
from pallas_kernels.grouped_matmul import weights, xla
from pallas_kernels.grouped_matmul.weights import Weights
from pallas_kernels.numerics import dot

LANES = 128
BLOCK = 512  # of the contracted dimension and of the result's columns, at most


class _Visits(NamedTuple):
    """int32 [V] each; what lies past the last group counts as one more.

    Attributes:
      matrix: of the group; -1 past the last.
      tile: of rows.
      begin, end: rows of the group.
    """

    matrix: jax.Array
    tile: jax.Array
    begin: jax.Array
    end: jax.Array


def _schedule(
    group_sizes: jax.Array, group_offset: jax.Array, rows: int, tile_rows: int
) -> tuple[_Visits, jax.Array]:
    """All visits in order of rows, and how many there are.

    Not ``mosaic_gpu.rows_schedule``: blocks of a TPU's pipeline begin at multiples of their size, so that groups share tiles.
    """
    groups = group_sizes.shape[0]
    sizes = jnp.concatenate([group_sizes, (rows - group_sizes.sum())[None]])
    end = jnp.cumsum(sizes)
    begin = end - sizes
    first_tile = begin // tile_rows
    count = jnp.where(sizes > 0, (end - 1) // tile_rows - first_tile + 1, 0)
    last_visit = jnp.cumsum(count)
    # Each group that is not empty, but the first, can share its first tile with the one before.
    bound = pl.cdiv(rows, tile_rows) + min(groups, rows - 1)
    visit = jnp.arange(bound, dtype=jnp.int32)
    group = (visit[:, None] >= last_visit[None]).sum(1, dtype=jnp.int32)
    group = jnp.minimum(group, groups)
    tile = first_tile[group] + visit - (last_visit - count)[group]
    matrix = jnp.where(group < groups, group + group_offset, -1)
    return _Visits(matrix, tile, begin[group], end[group]), last_visit[-1]


def _tile_rows(rows: int, groups: int) -> int:
    """Near a group's size: rows of other groups are multiplied for nothing, and a matrix is read once for each tile."""
    per_group = 1 << (max(1, rows // groups) - 1).bit_length()
    return min(rows, max(LANES, min(BLOCK, per_group)))


def _block(size: int) -> int:
    """The largest that divides ``size`` and that a register's width divides; all of it, if that is little.

    Raises:
      NotImplementedError: if there is none.
    """
    if size <= BLOCK:
        return size
    if size % LANES:
        raise NotImplementedError(
            f"K and N must be at most {BLOCK} or multiples of {LANES}; got {size}"
        )
    return max(b for b in range(LANES, BLOCK + 1, LANES) if size % b == 0)


def rows_times_groups(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    *,
    transpose: bool,
    interpret: Any = False,
) -> jax.Array:
    """y[r] = x[r] @ w[group of r] (or its transpose); rows past the last group are zero."""
    rows, inner = x.shape
    columns = w.shape[1 if transpose else 2]
    height, depth, width = _tile_rows(rows, group_sizes.shape[0]), _block(inner), _block(columns)
    visits, used = _schedule(group_sizes, group_offset, rows, height)

    def body(matrix, tile, begin, end, x_ref, w_ref, y_ref, sums):
        visit, step = pl.program_id(1), pl.program_id(2)

        @pl.when(step == 0)
        def _():
            sums[...] = jnp.zeros_like(sums)

        sums[...] += dot(x_ref[...], w_ref[0], (1, 1 if transpose else 0))

        @pl.when(step == pl.num_programs(2) - 1)
        def _():
            row = tile[visit] * height + lax.broadcasted_iota(jnp.int32, sums.shape, 0)
            mine = (row >= begin[visit]) & (row < end[visit])
            # Selected, not multiplied by zero: what lies in other rows may be inf or NaN.
            y = jnp.where(matrix[visit] >= 0, sums[...], 0.0).astype(y_ref.dtype)
            y_ref[...] = jnp.where(mine, y, y_ref[...])

    def w_block(n, i, k, matrix, *_):
        place = (n, k) if transpose else (k, n)
        return jnp.maximum(matrix[i], 0), *place

    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((rows, columns), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(columns // width, used, inner // depth),
            in_specs=[
                pl.BlockSpec((height, depth), lambda n, i, k, matrix, tile, *_: (tile[i], k)),
                pl.BlockSpec((1, *((width, depth) if transpose else (depth, width))), w_block),
            ],
            out_specs=pl.BlockSpec((height, width), lambda n, i, k, matrix, tile, *_: (tile[i], n)),
            scratch_shapes=[pltpu.VMEM((height, width), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        interpret=interpret,
        name="grouped_matmul",
    )(*visits, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _grouped_matmul(x, w, group_sizes, group_offset, interpret) -> jax.Array:
    return rows_times_groups(x, w, group_sizes, group_offset, transpose=False, interpret=interpret)


def _forward(x, w, group_sizes, group_offset, interpret):
    y = _grouped_matmul(x, w, group_sizes, group_offset, interpret)
    return y, (x, w, group_sizes, group_offset)


def _backward(interpret, residuals, dy):
    x, w, group_sizes, group_offset = residuals
    where = (group_sizes, group_offset)
    dx = rows_times_groups(dy, w, *where, transpose=True, interpret=interpret)
    return dx, xla.groups_outer(x, dy, *where, w), None, None


_grouped_matmul.defvjp(_forward, _backward)


def grouped_matmul(
    x: jax.Array, w: Weights, group_sizes: jax.Array, group_offset: jax.Array | int
) -> jax.Array:
    """See ``api.grouped_matmul``."""
    weights.require_array(w)
    interpret = _pallas.interpret_tpu()
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"x must be float32 or bfloat16; got {x.dtype}")
    if 0 in (*x.shape, *w.shape, *group_sizes.shape):
        raise NotImplementedError(f"nothing to do; got x {x.shape}, w {w.shape}")
    return _grouped_matmul(x, w, group_sizes, jnp.asarray(group_offset, jnp.int32), interpret)
