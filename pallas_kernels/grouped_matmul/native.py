"""C++ backend for CPU, for few rows per group: reads each weight matrix once, in place."""

import jax
import jax.numpy as jnp

from pallas_kernels import native
from pallas_kernels.grouped_matmul import config, xla


@jax.custom_vjp
def _grouped_matmul(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, group_offset: jax.Array
) -> jax.Array:
    result = jax.ShapeDtypeStruct((x.shape[0], w.shape[2]), x.dtype)
    return native.call("jaxmoe_grouped_matmul", result, x, w, group_sizes, group_offset)


def _forward(x, w, group_sizes, group_offset):
    return _grouped_matmul(x, w, group_sizes, group_offset), (x, w, group_sizes, group_offset)


_grouped_matmul.defvjp(_forward, xla.backward)


def grouped_matmul(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, group_offset: jax.Array | int
) -> jax.Array:
    """See ``api.grouped_matmul``. Refuses many rows per group, where XLA's matmul is faster."""
    native.require(x, w)
    rows, groups = x.shape[0], group_sizes.shape[0]
    if rows > config.NATIVE_ROWS_PER_GROUP * groups:
        raise NotImplementedError(
            f"the C++ kernel is for at most {config.NATIVE_ROWS_PER_GROUP} rows per group on average; "
            f"got {rows} rows in {groups} groups"
        )
    return _grouped_matmul(x, w, group_sizes, jnp.asarray(group_offset, jnp.int32))
