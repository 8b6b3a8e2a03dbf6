"""The oracle: every row against every group's matrix, in float32, masked. Slow and obvious."""

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import weights
from pallas_kernels.grouped_matmul.weights import Weights


def grouped_matmul(
    x: jax.Array, w: Weights, group_sizes: jax.Array, group_offset: jax.Array | int
) -> jax.Array:
    """See ``api.grouped_matmul``."""
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(x.shape[0], dtype=ends.dtype)
    member = (row[:, None] >= (ends - group_sizes)[None]) & (row[:, None] < ends[None])
    # Rows of no group are replaced, not only masked out of the result: their gradient would be 0 * NaN.
    x = jnp.where(member.any(1)[:, None], x, jnp.zeros((), x.dtype))
    w = weights.matrices(w, group_offset, group_sizes.shape[0], x.dtype)
    every = jnp.einsum(
        "mk,ekn->men",
        x.astype(jnp.float32),
        w.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.where(member[:, :, None], every, 0.0).sum(1).astype(x.dtype)
