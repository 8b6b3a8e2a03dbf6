"""Grouped matmul in plain JAX: a loop over row blocks, each multiplied by its group's matrix.

``jax.lax.ragged_dot`` on CPU is a dense expansion (every row times every group). Here the groups are cut
into blocks of ``block`` rows and a loop with a data-dependent trip count multiplies one block by one
matrix, so that the work is that of the useful rows plus less than one block per group. A block may reach
beyond its group; there it keeps what other blocks wrote. So no row is copied into padded storage.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul import config, weights
from pallas_kernels.grouped_matmul.weights import Quantised, Weights
from pallas_kernels.numerics import dot, precision_of


class _Blocks(NamedTuple):
    """The schedule of a loop over row blocks.

    Attributes:
      size: rows per block.
      used: int32, how many blocks the loop visits.
      group: [N] int32, each block's group.
      start: [N] int32, first row that each block reads; within bounds by a whole block.
      first, last: [N] int32, the rows of the group in this block are first <= row < last.
    """

    size: int
    used: jax.Array
    group: jax.Array
    start: jax.Array
    first: jax.Array
    last: jax.Array

    def inside(self, i: jax.Array) -> jax.Array:
        """[size, 1] bool: which rows of block i belong to its group."""
        row = self.start[i] + jnp.arange(self.size, dtype=jnp.int32)
        return ((row >= self.first[i]) & (row < self.last[i]))[:, None]


def _blocks(group_sizes: jax.Array, rows: int) -> _Blocks:
    """Cuts every group into blocks. N is bounded: sum(ceil(n/b)) <= floor(rows/b) + (non-empty groups)."""
    groups = group_sizes.shape[0]
    size = min(config.block_rows(rows, groups), rows)
    bound = min(groups, rows) + rows // size
    count = -(-group_sizes // size)
    block_end, row_end = jnp.cumsum(count), jnp.cumsum(group_sizes)
    index = jnp.arange(bound, dtype=jnp.int32)
    # How many groups end at or before this block: its group. Compare-and-sum beats searchsorted at these sizes.
    group = (index[:, None] >= block_end[None]).sum(1, dtype=jnp.int32)
    group = jnp.minimum(group, groups - 1)
    first = (row_end - group_sizes)[group] + (index - (block_end - count)[group]) * size
    return _Blocks(
        size, block_end[-1], group, jnp.minimum(first, rows - size), first, row_end[group]
    )


def rows_times_groups(
    x: jax.Array,
    w: Weights,
    group_sizes: jax.Array,
    group_offset: jax.Array | int,
    *,
    transpose: bool,
) -> jax.Array:
    """y[r] = x[r] @ w[group of r] (or its transpose); rows past the last group are zero."""
    out = w.shape[1] if transpose else w.shape[2]
    if 0 in (*x.shape, *group_sizes.shape):
        return jnp.zeros((x.shape[0], out), x.dtype)
    blocks = _blocks(group_sizes, x.shape[0])

    def body(i: jax.Array, y: jax.Array) -> jax.Array:
        w_block = weights.matrix(w, group_offset + blocks.group[i], x.dtype)
        x_block = lax.dynamic_slice_in_dim(x, blocks.start[i], blocks.size)
        y_block = dot(x_block, w_block, (1, 1 if transpose else 0)).astype(y.dtype)
        before = lax.dynamic_slice_in_dim(y, blocks.start[i], blocks.size)
        y_block = jnp.where(blocks.inside(i), y_block, before)
        return lax.dynamic_update_slice_in_dim(y, y_block, blocks.start[i], 0)

    return lax.fori_loop(0, blocks.used, body, jnp.zeros((x.shape[0], out), x.dtype))


def groups_outer(
    x: jax.Array,
    dy: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array | int,
    w: jax.Array,
) -> jax.Array:
    """dw[g] = x[rows of g].T @ dy[rows of g], accumulated in float32."""
    if 0 in (*x.shape, *group_sizes.shape):
        return jnp.zeros_like(w)
    blocks = _blocks(group_sizes, x.shape[0])

    def body(i: jax.Array, dw: jax.Array) -> jax.Array:
        # Both factors are masked, not one: what lies past the group may be inf or NaN.
        x_block, dy_block = (
            jnp.where(
                blocks.inside(i),
                lax.dynamic_slice_in_dim(rows, blocks.start[i], blocks.size),
                jnp.zeros((), rows.dtype),
            )
            for rows in (x, dy)
        )
        g = group_offset + blocks.group[i]
        total = lax.dynamic_index_in_dim(dw, g, 0, keepdims=False)
        total = total + dot(x_block, dy_block, (0, 0))
        return lax.dynamic_update_index_in_dim(dw, total, g, 0)

    return lax.fori_loop(0, blocks.used, body, jnp.zeros(w.shape, jnp.float32)).astype(w.dtype)


@jax.custom_vjp
def grouped_matmul(
    x: jax.Array, w: Weights, group_sizes: jax.Array, group_offset: jax.Array | int
) -> jax.Array:
    """See ``api.grouped_matmul``."""
    return rows_times_groups(x, w, group_sizes, group_offset, transpose=False)


def _forward(x, w, group_sizes, group_offset):
    return grouped_matmul(x, w, group_sizes, group_offset), (x, w, group_sizes, group_offset)


def _backward(residuals, dy):
    x, w, group_sizes, group_offset = residuals
    dx = rows_times_groups(dy, w, group_sizes, group_offset, transpose=True)
    if isinstance(w, Quantised):
        return dx, None, None, None
    return dx, groups_outer(x, dy, group_sizes, group_offset, w), None, None


grouped_matmul.defvjp(_forward, _backward)


def ragged_dot(
    x: jax.Array, w: Weights, group_sizes: jax.Array, group_offset: jax.Array | int
) -> jax.Array:
    """``jax.lax.ragged_dot`` behind this op's contract.

    On CPU and GPU XLA multiplies every row by every group, so that NaN in a matrix reaches the rows of other groups.
    """
    weights.require_array(w)
    w = lax.dynamic_slice_in_dim(w, group_offset, group_sizes.shape[0])
    # Rows after the last group neither reach others nor are left undefined, which ragged_dot does not promise.
    inside = (jnp.arange(x.shape[0]) < group_sizes.sum())[:, None]
    x = jnp.where(inside, x, jnp.zeros((), x.dtype))
    precision = precision_of(x.dtype)
    y = lax.ragged_dot(
        x, w, group_sizes, precision=precision, preferred_element_type=jnp.float32
    ).astype(x.dtype)
    return jnp.where(inside, y, jnp.zeros((), y.dtype))
