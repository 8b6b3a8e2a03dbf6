"""The gradient that every backend shares: from out and log denominator, over some queries at a time.

The rows of all queries together are K / S times the cache, gigabytes at real sizes; so both the gathered rows and their gradients
exist for a chunk of queries at a time (``chunks``). Rows' gradients are added up in float32 by XLA's scatter: in order on CPU and
TPU; on GPU in any order unless --xla_gpu_deterministic_ops is set.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.numerics import precision_of
from pallas_kernels.sparse_mla import addresses, chunks

SAVED = (
    "sparse_mla"  # the name of what a rematerialised caller should keep: out and log denominator
)


def differentiable(kernel: Callable[..., tuple[jax.Array, jax.Array]]) -> Callable[..., Any]:
    """Gives a backend of ``sparse_mla`` its gradient in q and kv."""

    @functools.wraps(kernel)
    def op(q, kv, indices, scale, value_dim):
        @jax.custom_vjp
        def run(q, kv, indices):
            return kernel(q, kv, indices, scale, value_dim)

        def forward(q, kv, indices):
            out, lse = checkpoint_name(run(q, kv, indices), SAVED)
            return (out, lse), (q, kv, indices, out, lse)

        def backward(residuals, cotangents):
            return (*_backward(residuals, cotangents, scale, value_dim), None)

        run.defvjp(forward, backward)
        return run(q, kv, indices)

    return op


def of_oracle(
    oracle: Callable[..., Any],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a kernel the gradient of ``oracle``, which has its signature: operands, then scale and value_dim."""

    def decorate(kernel: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(kernel)
        def op(*arguments: Any) -> tuple[jax.Array, jax.Array]:
            operands, static = arguments[:-2], arguments[-2:]

            @jax.custom_vjp
            def run(*operands):
                return kernel(*operands, *static)

            def forward(*operands):
                return run(*operands), operands

            def backward(operands, cotangents):
                return jax.vjp(lambda *x: oracle(*x, *static), *operands)[1](cotangents)

            run.defvjp(forward, backward)
            return run(*operands)

        return op

    return decorate


def _backward(residuals, cotangents, scale, value_dim) -> tuple[jax.Array, jax.Array]:
    """(dq, dkv). With P the softmax, D the gradient of a logit: D = P (d_out . v - d_out . out + d_lse)."""
    q, kv, indices, out, lse = residuals
    if 0 in (*q.shape, *kv.shape):
        return jnp.zeros_like(q), jnp.zeros_like(kv)
    d_out, d_lse = cotangents
    heads, size = q.shape[2:]
    table = addresses.of_sequences(kv, indices)
    total, columns = table.cached.shape[0], table.address.shape[1]
    dot = functools.partial(
        jnp.einsum, precision=precision_of(q.dtype), preferred_element_type=jnp.float32
    )

    def body(d_rows, arrays):
        q, address, lse, d_out, shift = arrays
        valid = (address >= 0)[..., None]
        rows = table.cached.at[jnp.maximum(address, 0)].get(mode="promise_in_bounds")
        rows = jnp.where(valid, rows, jnp.zeros((), rows.dtype))
        logits = dot("qhc,qkc->qhk", q, rows) * jnp.float32(scale)
        weights = jnp.where(valid[:, None, :, 0], jnp.exp(logits - lse[..., None]), 0.0)
        d_weights = dot("qhv,qkv->qhk", d_out, rows[..., :value_dim])
        d_logits = weights * (d_weights + shift[..., None]) * jnp.float32(scale)
        d_logits, weights = d_logits.astype(q.dtype), weights.astype(q.dtype)
        d_row = dot("qhk,qhc->qkc", d_logits, q)
        d_row = d_row.at[..., :value_dim].add(dot("qhk,qhv->qkv", weights, d_out))
        # An address past the end drops what would else be added to the last row.
        d_rows = d_rows.at[jnp.where(address >= 0, address, total)].add(d_row, mode="drop")
        return d_rows, dot("qhk,qkc->qhc", d_logits, rows).astype(q.dtype)

    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    shift = d_lse - (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    # Without rows there is no weight, whatever takes the place of lse; infinity would make it NaN.
    has_rows = jnp.isfinite(lse)
    lse, shift = jnp.where(has_rows, lse, 0.0), jnp.where(has_rows, shift, 0.0)
    arrays = (flat(q), table.address, flat(lse), flat(d_out.astype(q.dtype)), flat(shift))
    start = jnp.zeros(table.cached.shape, jnp.float32)
    chunk = chunks.size(arrays[0].shape[0], 4 * columns * size)
    d_rows, dq = chunks.scan(body, start, arrays, (0, -1, 0, 0, 0), chunk)
    return dq.reshape(q.shape), d_rows.reshape(kv.shape).astype(kv.dtype)
