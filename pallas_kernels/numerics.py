"""How every matmul here rounds: float32 operands as float32, sums in float32."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def precision_of(dtype: Any) -> lax.Precision | None:
    """float32 means float32: TPUs and tensor-float GPUs would otherwise round the inputs (spec 11, trap 25)."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """float32 product of two matrices along ``contract[0]`` of a and ``contract[1]`` of b."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    precision = precision_of(a.dtype)
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
