"""XLA backend and oracle of the two data movements under dispatch and combine."""

import jax
import jax.numpy as jnp

from pallas_kernels.moe_dispatch.payload import Payload, encode


def gather_rows(
    x: jax.Array, index: jax.Array, target: jax.Array, payload: Payload | None = None
) -> tuple[jax.Array, ...]:
    """out[r] = x[index[r]], encoded; a negative index gives a row of zeros.

    Tokens are encoded before they are copied: that reads and rounds each of them once.

    Args:
      x: [T, D].
      index: [R] int32.
      target: the same movement from the tokens' side, for backends that prefer it: [T, A] int32, where pair (t, a) is row
        ``target[t, a]`` if that is not negative, and otherwise row ``~target[t, a]`` is zeros. Every row occurs once.
      payload: what rows are stored as; None for as they are.

    Returns:
      (rows [R, D],), or (values, scales).
    """
    del target
    return tuple(gather(part, index) for part in encode(x, payload))


def gather(x: jax.Array, index: jax.Array) -> jax.Array:
    """out[r] = x[index[r]] of one array; a negative index gives zeros."""
    if not x.shape[0]:  # so every index is negative
        return jnp.zeros((index.shape[0], x.shape[1]), x.dtype)
    rows = x.at[jnp.maximum(index, 0)].get(mode="promise_in_bounds")
    return jnp.where((index >= 0)[:, None], rows, jnp.zeros((), x.dtype))


def weighted_sum(rows: jax.Array, position: jax.Array, weights: jax.Array) -> jax.Array:
    """out[t] = sum_k weights[t, k] * rows[position[t, k]], added in the order of k, in float32.

    The fixed order makes the result independent of where an expert runs (DESIGN: combining in rank order
    changes bits). A negative position contributes nothing.
    """
    total = jnp.zeros((position.shape[0], rows.shape[1]), jnp.float32)
    for k in range(position.shape[1]):
        row = gather(rows, position[:, k]).astype(jnp.float32)
        weight = jnp.where(position[:, k] >= 0, weights[:, k].astype(jnp.float32), 0.0)
        total = total + weight[:, None] * row
    return total.astype(rows.dtype)
