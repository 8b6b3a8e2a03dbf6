"""Public dispatch and combine."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import _checks, _implementation
from pallas_kernels.moe_dispatch import config, mosaic_gpu, mosaic_tpu, reference
from pallas_kernels.moe_dispatch.payload import Encoded, Payload, payload_of

_GATHER = {
    "xla": reference.gather_rows,
    "mosaic_gpu": mosaic_gpu.gather_rows,
    "mosaic_tpu": mosaic_tpu.gather_rows,
}
_SUM = {
    "xla": reference.weighted_sum,
    "mosaic_gpu": mosaic_gpu.weighted_sum,
    "mosaic_tpu": mosaic_tpu.weighted_sum,
}
_PREFERENCE = {"cpu": ("xla",), "gpu": ("mosaic_gpu", "xla"), "tpu": ("xla",)}

# Up to this many (token, expert) pairs, ranking by all-pairs comparison beats a sort on every backend tried.
_PAIRWISE_LIMIT = 256


class Dispatched(NamedTuple):
    """Tokens in expert order.

    Attributes:
      rows: [T*A, D], or ``Encoded(values, scales)``; pair (t, a) is row ``position[t, a]``. Rows after the last group belong to
        ids of -1 and are zeros.
      group_sizes: [E] int32, rows per expert.
      position: [T, A] int32, the row of each pair; -1 where the id was -1.
    """

    rows: Float[Array, "R D"] | Encoded
    group_sizes: Int[Array, " E"]
    position: Int[Array, "T A"]


def _order(ids: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Pairs [N] in stable order of their experts, -1 last: (pair of each row, row of each pair, rows per expert)."""
    n = ids.shape[0]
    keys = jnp.where(ids >= 0, ids, num_experts)
    index, experts = jnp.arange(n, dtype=jnp.int32), jnp.arange(num_experts, dtype=jnp.int32)
    if n <= _PAIRWISE_LIMIT:
        before = (keys[None] < keys[:, None]) | (
            (keys[None] == keys[:, None]) & (index[None] < index[:, None])
        )
        row = before.sum(1, dtype=jnp.int32)
        order = jnp.zeros(n, jnp.int32).at[row].set(index, unique_indices=True)
        return order, row, (keys[None] == experts[:, None]).sum(1, dtype=jnp.int32)
    sorted_keys, order = _sorted(keys, num_experts)
    row = jnp.zeros(n, jnp.int32).at[order].set(index, unique_indices=True)
    # Unrolled: as a loop, each of its 20 comparisons would be a launch on GPU.
    ends = jnp.searchsorted(sorted_keys, experts, side="right", method="scan_unrolled")
    return order, row, jnp.diff(ends.astype(jnp.int32), prepend=jnp.int32(0))


def _sorted(keys: jax.Array, highest: int) -> tuple[jax.Array, jax.Array]:
    """(keys [N] from 0 to ``highest`` in order, where each came from), stable."""
    index, bits = jnp.arange(keys.shape[0], dtype=jnp.int32), (keys.shape[0] - 1).bit_length()
    if (highest + 1) << bits > 2**32:
        return tuple(lax.sort((keys, index), num_keys=1, is_stable=True))
    # Both in one word: half the bytes to sort, and no two are equal.
    words = lax.sort(keys.astype(jnp.uint32) << bits | index.astype(jnp.uint32))
    return (words >> bits).astype(jnp.int32), (words & jnp.uint32(2**bits - 1)).astype(jnp.int32)


def _choose(
    implementation: _implementation.Implementation, moved_bytes: int
) -> _implementation.Implementation:
    """The default for a movement of this size."""
    return "xla" if implementation is None and moved_bytes < config.SMALL else implementation


def _gather(implementation, x, index, target, payload):
    chosen = _choose(implementation, index.shape[0] * x.shape[1] * x.dtype.itemsize)
    return _implementation.call("dispatch", _GATHER, _PREFERENCE, chosen, x, index, target, payload)


def _sum(implementation, rows, position, weights):
    chosen = _choose(implementation, position.size * rows.shape[1] * rows.dtype.itemsize)
    return _implementation.call("combine", _SUM, _PREFERENCE, chosen, rows, position, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _permute(implementation, payload, x, index, target):
    values, *scales = _gather(implementation, x, index, target, payload)
    return Encoded(values, *scales) if scales else values


def _permute_forward(implementation, payload, x, index, target):
    rows = _permute(implementation, payload, x, index, target)
    if isinstance(rows, Encoded):
        raise NotImplementedError(
            "dispatch: rows with scales are forward only; dispatch without dtype, and encode behind a gradient of your own."
        )
    return rows, (target, jnp.zeros(0, x.dtype))


def _permute_backward(implementation, payload, residuals, d_rows):
    del payload
    target, like = residuals
    # The transpose of "copy token t to its rows" is "add token t's rows": combine with unit weights.
    ones = jnp.ones(target.shape, jnp.float32)
    return _sum(implementation, d_rows.astype(like.dtype), target, ones), None, None


_permute.defvjp(_permute_forward, _permute_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unpermute(implementation, rows, position, weights):
    return _sum(implementation, rows, position, weights)


def _unpermute_forward(implementation, rows, position, weights):
    return _unpermute(implementation, rows, position, weights), (rows, position, weights)


def _unpermute_backward(implementation, residuals, dy):
    # XLA's gathers whatever the implementation: they fuse with the products that read them, and a kernel's rows would be
    # written and read once more.
    del implementation
    rows, position, weights = residuals
    tokens, active = position.shape
    if not position.size:
        return jnp.zeros_like(rows), None, jnp.zeros_like(weights)
    # Scatter the pairs' indices once (cheap integers), then move rows by gathers only.
    flat = jnp.where(position >= 0, position, rows.shape[0]).reshape(-1)
    pair = jnp.full(rows.shape[0] + 1, -1, jnp.int32)
    pair = pair.at[flat].set(jnp.arange(tokens * active, dtype=jnp.int32))[:-1]
    row_weight = jnp.where(
        pair >= 0, weights.reshape(-1)[jnp.maximum(pair, 0)], jnp.zeros((), weights.dtype)
    )
    d_rows = reference.gather(dy, jnp.where(pair >= 0, pair // active, -1)).astype(jnp.float32)
    d_rows = d_rows * row_weight[:, None].astype(jnp.float32)
    chosen = (reference.gather(rows, position[:, k]).astype(jnp.float32) for k in range(active))
    d_weights = jnp.stack([(row * dy.astype(jnp.float32)).sum(-1) for row in chosen], axis=1)
    return d_rows.astype(rows.dtype), None, d_weights.astype(weights.dtype)


_unpermute.defvjp(_unpermute_forward, _unpermute_backward)


def dispatch(
    x: Float[Array, "T D"],
    expert_ids: Int[Array, "T A"],
    num_experts: int,
    *,
    dtype: Any | Payload | None = None,
    implementation: _implementation.Implementation = None,
) -> Dispatched:
    """Copies every token to one row per chosen expert, rows sorted by expert and stable in (token, choice).

    Nothing is dropped and nothing is padded: there are exactly T*A rows. Differentiable in ``x``, unless rows get scales.

    Args:
      x: tokens.
      expert_ids: chosen experts in [0, num_experts); -1, and any other number, for no expert (padding).
      num_experts: E.
      dtype: what rows become on their way: None for x's dtype, a floating dtype, float8_e4m3fn for values with a float32 scale per
        128 of them (the smallest power of two that is at least 1e-4 and 1/448 of the largest magnitude), or a ``Payload``.
      implementation: None, "xla", "mosaic_gpu" (Hopper), "mosaic_tpu" (both simulated on CPU), or a sequence.

    Returns:
      ``Dispatched(rows, group_sizes, position)``; with scales, rows are ``Encoded(values, scales)``.

    Raises:
      ValueError, TypeError: for shapes or types that don't fit, naming them.

    Example:
      >>> import jax.numpy as jnp
      >>> d = dispatch(jnp.array([[1.0], [2.0]]), jnp.array([[1], [0]]), 2)
      >>> d.rows.tolist(), d.group_sizes.tolist(), d.position.tolist()
      ([[2.0], [1.0]], [1, 1], [[1], [0]])
    """
    _checks.arrays("dispatch", x=x)
    _checks.integers("dispatch", expert_ids=expert_ids)
    num_experts = _checks.static_int("dispatch", "num_experts", num_experts, 1)
    if x.ndim != 2 or expert_ids.ndim != 2 or x.shape[0] != expert_ids.shape[0]:
        raise ValueError(
            f"dispatch: x must be [T, D] and expert_ids [T, A] with one T; got {x.shape} and {expert_ids.shape}."
        )
    ids = expert_ids.reshape(-1).astype(jnp.int32)
    ids = jnp.where(ids < num_experts, ids, -1)
    pair_of_row, row_of_pair, group_sizes = _order(ids, num_experts)
    used = jnp.arange(ids.shape[0]) < group_sizes.sum()
    index = jnp.where(used, pair_of_row // max(expert_ids.shape[1], 1), -1)
    target = jnp.where(ids >= 0, row_of_pair, ~row_of_pair).reshape(expert_ids.shape)
    implementation = _implementation.hashable(implementation)
    rows = _permute(implementation, payload_of(dtype, x.dtype), x, index, target)
    return Dispatched(rows, group_sizes, jnp.maximum(target, -1))


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
      implementation: None, "xla", "mosaic_gpu", "mosaic_tpu", or a sequence.

    Returns:
      [T, D] in rows' dtype.

    Raises:
      ValueError, TypeError: for shapes or types that don't fit, naming them.
    """
    if isinstance(rows, Encoded):
        raise TypeError("combine: rows must be an array; got Encoded. Call decode_rows first.")
    _checks.arrays("combine", rows=rows, weights=weights)
    _checks.integers("combine", position=position)
    if rows.ndim != 2 or position.shape != weights.shape or position.ndim != 2:
        raise ValueError(
            "combine: rows must be [R, D], position and weights both [T, A]; got "
            f"{rows.shape}, {position.shape} and {weights.shape}."
        )
    implementation = _implementation.hashable(implementation)
    return _unpermute(implementation, rows, position.astype(jnp.int32), weights)
