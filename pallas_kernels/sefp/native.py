"""C++ backend for CPU: rows of x against the stored bits of one matrix or of many, in place."""

import jax
import jax.numpy as jnp

from pallas_kernels import _checks, native
from pallas_kernels.sefp.format import Sefp


def sefp_matmul(x: jax.Array, s: Sefp) -> jax.Array:
    """See ``api.sefp_matmul``."""
    _checks.not_empty(x=x, s=s)
    every_row = jnp.full(1, x.shape[0], jnp.int32)
    return rows_times_groups(x, jax.tree.map(lambda a: a[None], s), every_row, jnp.int32(0))


def rows_times_groups(
    x: jax.Array, s: Sefp, group_sizes: jax.Array, group_offset: jax.Array
) -> jax.Array:
    """y[r] = x[r] @ s[group_offset + group of r] for s [M, K, N]; a row's bits don't depend on the other rows.

    Raises:
      NotImplementedError: if the C++ kernels can't run here, with the reason.
    """
    native.require(x)
    result = jax.ShapeDtypeStruct((x.shape[0], s.shape[-1]), jnp.float32)
    operands = (x, s.exponent, s.base, group_sizes, group_offset, *s.planes)
    return native.call("jaxmoe_sefp_matmul", result, *operands)
