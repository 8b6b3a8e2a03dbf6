"""Matrix multiplication that dispatches on the type of the weight leaf."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def precision_of(dtype: Any) -> lax.Precision | None:
    """float32 means float32: TPUs and tensor-float GPUs would otherwise round the inputs (spec 11, trap 25)."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    precision = precision_of(a.dtype)
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _matmul_2d(x: jax.Array, w: jax.Array) -> jax.Array:
    return _dot(x, w, (1, 0)).astype(x.dtype)


def _matmul_2d_forward(x, w):
    return _matmul_2d(x, w), (x, w)


def _matmul_2d_backward(residuals, dy):
    x, w = residuals
    return _dot(dy, w, (1, 1)).astype(x.dtype), _dot(x, dy, (0, 0)).astype(w.dtype)


# JAX's own rule computes (dy.T @ x).T, for which XLA:CPU transposes dy and leaves its fast path: 7x slower.
_matmul_2d.defvjp(_matmul_2d_forward, _matmul_2d_backward)


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """``x [..., K] @ w [K, N]``, accumulated in float32, in x's dtype."""
    y = _matmul_2d(x.reshape(-1, x.shape[-1]), w.astype(x.dtype))
    return y.reshape(*x.shape[:-1], w.shape[1])


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
