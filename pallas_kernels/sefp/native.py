"""C++ backend for CPU: a few rows of x against the stored bits, in place."""

import jax
import jax.numpy as jnp

from pallas_kernels import native
from pallas_kernels.sefp.format import Sefp
from pallas_kernels.sefp.xla import groups_of_rows

_ROWS = 16  # beyond, decoding once and a dense product take less


def sefp_matmul(x: jax.Array, s: Sefp) -> jax.Array:
    """See ``api.sefp_matmul``."""
    native.require(x)
    rows, columns = x.shape[0], s.shape[1]
    if rows > _ROWS:
        raise NotImplementedError(f"the C++ kernel is for up to {_ROWS} rows of x; got {rows}")
    result = jax.ShapeDtypeStruct((rows, columns), jnp.float32)
    return native.call(
        "jaxmoe_sefp_matmul", result, groups_of_rows(x, s), s.exponent, s.base, *s.planes
    )
