"""Public dispatch and combine."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import _implementation
from pallas_kernels.moe_dispatch import pallas, reference

_GATHER = {"xla": reference.gather_rows, "pallas": pallas.gather_rows}
_SUM = {"xla": reference.weighted_sum, "pallas": pallas.weighted_sum}
_PREFERENCE = {"cpu": ("xla",), "gpu": ("xla",), "tpu": ("xla",)}

# Up to this many (token, expert) pairs, ranking by all-pairs comparison beats a sort on every backend tried.
_PAIRWISE_LIMIT = 256


class Dispatched(NamedTuple):
    """Tokens in expert order.

    Attributes:
      rows: [T*A, D]; pair (t, a) is row ``position[t, a]``. Rows after the last group belong to ids of -1.
      group_sizes: [E] int32, rows per expert.
      position: [T, A] int32, the row of each pair; -1 where the id was -1.
    """

    rows: Float[Array, "R D"]
    group_sizes: Int[Array, " E"]
    position: Int[Array, "T A"]


def _rank(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Stable order of ``keys`` [N]: (pair index of each row, row of each pair)."""
    n = keys.shape[0]
    index = jnp.arange(n, dtype=jnp.int32)
    if n <= _PAIRWISE_LIMIT:
        before = (keys[None] < keys[:, None]) | (
            (keys[None] == keys[:, None]) & (index[None] < index[:, None])
        )
        row = before.sum(1, dtype=jnp.int32)
        return jnp.zeros(n, jnp.int32).at[row].set(index, unique_indices=True), row
    _, order = lax.sort((keys, index), num_keys=1, is_stable=True)
    return order, jnp.zeros(n, jnp.int32).at[order].set(index, unique_indices=True)


def _gather(implementation, x, index):
    return _implementation.call("dispatch", _GATHER, _PREFERENCE, implementation, x, index)


def _sum(implementation, rows, position, weights):
    return _implementation.call(
        "combine", _SUM, _PREFERENCE, implementation, rows, position, weights
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _permute(implementation, x, pair_of_row, position):
    del position
    active = pair_of_row.shape[0] // max(x.shape[0], 1)
    return _gather(
        implementation, x, jnp.where(pair_of_row >= 0, pair_of_row // max(active, 1), -1)
    )


def _permute_forward(implementation, x, pair_of_row, position):
    return _permute(implementation, x, pair_of_row, position), position


def _permute_backward(implementation, position, d_rows):
    # The transpose of "copy token t to its rows" is "add token t's rows": combine with unit weights.
    return _sum(implementation, d_rows, position, jnp.ones(position.shape, jnp.float32)), None, None


_permute.defvjp(_permute_forward, _permute_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unpermute(implementation, rows, position, weights):
    return _sum(implementation, rows, position, weights)


def _unpermute_forward(implementation, rows, position, weights):
    return _unpermute(implementation, rows, position, weights), (rows, position, weights)


def _unpermute_backward(implementation, residuals, dy):
    rows, position, weights = residuals
    tokens, active = position.shape
    # Scatter the pairs' indices once (cheap integers), then move rows by gathers only.
    flat = jnp.where(position >= 0, position, rows.shape[0]).reshape(-1)
    pair = jnp.full(rows.shape[0] + 1, -1, jnp.int32)
    pair = pair.at[flat].set(jnp.arange(tokens * active, dtype=jnp.int32))[:-1]
    row_weight = jnp.where(
        pair >= 0, weights.reshape(-1)[jnp.maximum(pair, 0)], jnp.zeros((), weights.dtype)
    )
    d_rows = _gather(implementation, dy, jnp.where(pair >= 0, pair // active, -1))
    d_weights = jnp.stack(
        [
            (
                _gather(implementation, rows, position[:, k]).astype(jnp.float32)
                * dy.astype(jnp.float32)
            ).sum(-1)
            for k in range(active)
        ],
        axis=1,
    )
    d_rows = d_rows.astype(jnp.float32) * row_weight[:, None].astype(jnp.float32)
    return d_rows.astype(rows.dtype), None, d_weights.astype(weights.dtype)


_unpermute.defvjp(_unpermute_forward, _unpermute_backward)


def dispatch(
    x: Float[Array, "T D"],
    expert_ids: Int[Array, "T A"],
    num_experts: int,
    *,
    implementation: _implementation.Implementation = None,
) -> Dispatched:
    """Copies every token to one row per chosen expert, rows sorted by expert and stable in (token, choice).

    Nothing is dropped and nothing is padded: there are exactly T*A rows. Differentiable in ``x``.

    Args:
      x: tokens.
      expert_ids: chosen experts in [0, num_experts); -1 for no expert (padding).
      num_experts: E.
      implementation: None, "xla", "pallas" (interpret mode off TPU), or a sequence.

    Returns:
      ``Dispatched(rows, group_sizes, position)``.

    Raises:
      ValueError: if shapes disagree.

    Example:
      >>> import jax.numpy as jnp
      >>> d = dispatch(jnp.array([[1.0], [2.0]]), jnp.array([[1], [0]]), 2)
      >>> d.rows.tolist(), d.group_sizes.tolist(), d.position.tolist()
      ([[2.0], [1.0]], [1, 1], [[1], [0]])
    """
    if x.ndim != 2 or expert_ids.ndim != 2 or x.shape[0] != expert_ids.shape[0]:
        raise ValueError(
            f"dispatch: x must be [T, D] and expert_ids [T, A] with one T; got {x.shape} and {expert_ids.shape}."
        )
    ids = expert_ids.reshape(-1).astype(jnp.int32)
    pair_of_row, row_of_pair = _rank(jnp.where(ids >= 0, ids, num_experts))
    group_sizes = jax.nn.one_hot(ids, num_experts, dtype=jnp.int32).sum(0)
    position = jnp.where(ids >= 0, row_of_pair, -1).reshape(expert_ids.shape)
    pair_of_row = jnp.where(jnp.arange(ids.shape[0]) < group_sizes.sum(), pair_of_row, -1)
    return Dispatched(_permute(implementation, x, pair_of_row, position), group_sizes, position)


def combine(
    rows: Float[Array, "R D"],
    position: Int[Array, "T A"],
    weights: Float[Array, "T A"],
    *,
    implementation: _implementation.Implementation = None,
) -> Float[Array, "T D"]:
    """Weighted sum of each token's rows, added in the order of its choices, in float32.

    ``y[t] = sum_a weights[t, a] * rows[position[t, a]]``; a position of -1 adds nothing. Differentiable in
    ``rows`` and ``weights``; positions must be distinct where not -1 (they are a permutation).

    Args:
      rows: e.g. the experts' outputs in the order of ``Dispatched.rows``.
      position: ``Dispatched.position``.
      weights: routing weights.
      implementation: None, "xla", "pallas", or a sequence.

    Returns:
      [T, D] in rows' dtype.

    Raises:
      ValueError: if shapes disagree.
    """
    if rows.ndim != 2 or position.shape != weights.shape or position.ndim != 2:
        raise ValueError(
            "combine: rows must be [R, D], position and weights both [T, A]; got "
            f"{rows.shape}, {position.shape} and {weights.shape}."
        )
    return _unpermute(implementation, rows, position.astype(jnp.int32), weights)
