"""XLA backend and oracle of the two data movements under dispatch and combine."""

import jax
import jax.numpy as jnp


def gather_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """out[r] = x[index[r]]; a negative index gives a row of zeros."""
    rows = x.at[jnp.maximum(index, 0)].get(mode="promise_in_bounds")
    return jnp.where((index >= 0)[:, None], rows, jnp.zeros((), x.dtype))


def weighted_sum(rows: jax.Array, position: jax.Array, weights: jax.Array) -> jax.Array:
    """out[t] = sum_k weights[t, k] * rows[position[t, k]], added in the order of k, in float32.

    The fixed order makes the result independent of where an expert runs (DESIGN: combining in rank order
    changes bits). A negative position contributes nothing.
    """
    total = jnp.zeros((position.shape[0], rows.shape[1]), jnp.float32)
    for k in range(position.shape[1]):
        row = gather_rows(rows, position[:, k]).astype(jnp.float32)
        weight = jnp.where(position[:, k] >= 0, weights[:, k].astype(jnp.float32), 0.0)
        total = total + weight[:, None] * row
    return total.astype(rows.dtype)
