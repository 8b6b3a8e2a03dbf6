"""How every matmul here rounds: float32 operands as float32, sums in float32; and exact powers of two."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def precision_of(dtype: Any) -> lax.Precision | None:
    """float32 means float32: TPUs and tensor-float GPUs would otherwise round the inputs (spec 11, trap 25)."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def power_of_two(exponent: jax.Array) -> jax.Array:
    """2^exponent in float32, exact; int32, -126 <= exponent <= 127. (exp2 need not be.)"""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """float32 product of two matrices along ``contract[0]`` of a and ``contract[1]`` of b."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    precision = precision_of(a.dtype)
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
