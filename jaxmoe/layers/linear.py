"""Matrix multiplication that dispatches on the type of the weight leaf."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def precision_of(dtype: Any) -> lax.Precision | None:
    """float32 means float32: TPUs and tensor-float GPUs would otherwise round the inputs (spec 11, trap 25)."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """``x [..., K] @ w [K, N]``, accumulated in float32, in x's dtype."""
    y = lax.dot_general(
        x,
        w.astype(x.dtype),
        (((x.ndim - 1,), (0,)), ((), ())),
        precision=precision_of(x.dtype),
        preferred_element_type=jnp.float32,
    )
    return y.astype(x.dtype)


def linear(x: jax.Array, p: dict[str, jax.Array], *, contract: int = 1) -> jax.Array:
    """Applies ``p["weight"]`` [*in, *out] to the last ``contract`` axes of x and adds ``p["bias"]`` if present.

    Args:
      x: [..., *in].
      p: weight with its input axes first, optional bias of the output's shape.
      contract: number of input axes.

    Returns:
      [..., *out] in x's dtype.
    """
    w = p["weight"]
    inputs, outputs = w.shape[:contract], w.shape[contract:]
    lead = x.shape[: x.ndim - contract]
    y = matmul(
        x.reshape(*lead, math.prod(inputs)), w.reshape(math.prod(inputs), math.prod(outputs))
    )
    y = y.reshape(*lead, *outputs)
    if "bias" in p:
        y = y + jnp.expand_dims(p["bias"].astype(y.dtype), tuple(range(len(lead))))
    return y
