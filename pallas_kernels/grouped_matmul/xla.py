"""Grouped matmul in plain JAX: a loop over row blocks, each multiplied by its group's matrix.

``jax.lax.ragged_dot`` on CPU is a dense expansion (every row times every group). Here the groups are cut
into blocks of ``block`` rows and a loop with a data-dependent trip count multiplies one block by one
matrix, so that the work is that of the useful rows plus less than one block per group. A block may run
past the end of its group; what it writes there belongs to the next group, whose own block overwrites it
afterwards, since blocks are visited in row order. So no row is copied into padded storage.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul import config


def _schedule(
    group_sizes: jax.Array, rows: int, block: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Group and first row of every block, and the number of blocks in use.

    The static bound follows from sum(ceil(n/b)) <= floor(rows/b) + (non-empty groups).
    """
    groups = group_sizes.shape[0]
    bound = min(groups, rows) + rows // block
    blocks = -(-group_sizes // block)
    block_end = jnp.cumsum(blocks)
    index = jnp.arange(bound, dtype=jnp.int32)
    # How many groups end at or before this block: its group. Compare-and-sum beats searchsorted at these sizes.
    group = (index[:, None] >= block_end[None]).sum(1, dtype=jnp.int32)
    group = jnp.minimum(group, groups - 1)
    first_row = (jnp.cumsum(group_sizes) - group_sizes)[group] + (
        index - (block_end - blocks)[group]
    ) * block
    return group, first_row, block_end[-1]


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _rows_times_groups(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array | int,
    *,
    transpose: bool,
) -> jax.Array:
    """y[r] = x[r] @ w[group of r] (or its transpose); rows past the last group are zero."""
    rows, out = x.shape[0], w.shape[1] if transpose else w.shape[2]
    block = config.block_rows(rows, group_sizes.shape[0])
    group, first_row, used = _schedule(group_sizes, rows, block)
    x = jnp.pad(x, ((0, block), (0, 0)))

    def body(i: jax.Array, y: jax.Array) -> jax.Array:
        w_block = lax.dynamic_index_in_dim(w, group_offset + group[i], 0, keepdims=False)
        x_block = lax.dynamic_slice_in_dim(x, first_row[i], block)
        y_block = _dot(x_block, w_block, (1, 1 if transpose else 0)).astype(y.dtype)
        return lax.dynamic_update_slice_in_dim(y, y_block, first_row[i], 0)

    y = lax.fori_loop(0, used, body, jnp.zeros((rows + block, out), x.dtype))[:rows]
    # The last block's overhang is the one that no later block overwrites.
    return jnp.where((jnp.arange(rows) < group_sizes.sum())[:, None], y, jnp.zeros((), y.dtype))


def _groups_outer(
    x: jax.Array, dy: jax.Array, group_sizes: jax.Array, group_offset: jax.Array | int, w: jax.Array
) -> jax.Array:
    """dw[g] = x[rows of g].T @ dy[rows of g], accumulated in float32."""
    rows = x.shape[0]
    block = config.block_rows(rows, group_sizes.shape[0])
    group, first_row, used = _schedule(group_sizes, rows, block)
    ends = jnp.cumsum(group_sizes)
    x = jnp.pad(x, ((0, block), (0, 0)))
    dy = jnp.pad(dy, ((0, block), (0, 0)))

    def body(i: jax.Array, dw: jax.Array) -> jax.Array:
        # Both factors are masked, not one: what lies past the group may be inf or NaN.
        inside = (first_row[i] + jnp.arange(block) < ends[group[i]])[:, None]
        x_block = jnp.where(
            inside, lax.dynamic_slice_in_dim(x, first_row[i], block), jnp.zeros((), x.dtype)
        )
        dy_block = jnp.where(
            inside, lax.dynamic_slice_in_dim(dy, first_row[i], block), jnp.zeros((), dy.dtype)
        )
        g = group_offset + group[i]
        total = lax.dynamic_index_in_dim(dw, g, 0, keepdims=False) + _dot(x_block, dy_block, (0, 0))
        return lax.dynamic_update_index_in_dim(dw, total, g, 0)

    return lax.fori_loop(0, used, body, jnp.zeros(w.shape, jnp.float32)).astype(w.dtype)


@jax.custom_vjp
def grouped_matmul(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, group_offset: jax.Array | int
) -> jax.Array:
    """See ``api.grouped_matmul``."""
    return _rows_times_groups(x, w, group_sizes, group_offset, transpose=False)


def _forward(x, w, group_sizes, group_offset):
    return grouped_matmul(x, w, group_sizes, group_offset), (x, w, group_sizes, group_offset)


def _backward(residuals, dy):
    x, w, group_sizes, group_offset = residuals
    dx = _rows_times_groups(dy, w, group_sizes, group_offset, transpose=True)
    dw = _groups_outer(x, dy, group_sizes, group_offset, w)
    return dx, dw, None, None


grouped_matmul.defvjp(_forward, _backward)


def ragged_dot(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, group_offset: jax.Array | int
) -> jax.Array:
    """``jax.lax.ragged_dot`` behind this op's contract: the accelerator default until kernels are measured."""
    w = lax.dynamic_slice_in_dim(w, group_offset, group_sizes.shape[0])
    y = lax.ragged_dot(x, w, group_sizes, preferred_element_type=jnp.float32).astype(x.dtype)
    # Zeros after the last group are this op's contract, not ragged_dot's on every backend.
    inside = jnp.arange(x.shape[0]) < group_sizes.sum()
    return jnp.where(inside[:, None], y, jnp.zeros((), y.dtype))
