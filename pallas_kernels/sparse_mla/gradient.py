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
        if isinstance(scale, jax.core.Tracer):  # XLA's, whose gradient may be asked for as well
            return kernel(q, kv, indices, scale, value_dim)

        @jax.custom_vjp
        def run(q, kv, indices):
            return kernel(q, kv, indices, scale, value_dim)

        def forward(q, kv, indices):
            out, lse = checkpoint_name(run(q, kv, indices), SAVED)
            return (out, lse), (q, kv, indices, out, lse)

        def backward(residuals, cotangents):
            q, kv, indices, out, lse = residuals
            if 0 in (*q.shape, *kv.shape):
                return jnp.zeros_like(q), jnp.zeros_like(kv), None
            table = addresses.of_sequences(kv, indices)
            dq, d_kv, _ = _backward(q, table, out, lse, cotangents, scale, value_dim)
            return dq, d_kv.reshape(kv.shape).astype(kv.dtype), None

        run.defvjp(forward, backward)
        return run(q, kv, indices)

    return op


def differentiable_step(kernel: Callable[..., tuple[jax.Array, jax.Array]]) -> Callable[..., Any]:
    """Gives a backend of ``sparse_mla_step`` its gradient in q and, unless they are stored as bytes, in both kinds of rows."""

    @functools.wraps(kernel)
    def op(q, cached, layer, own, rows, pages, scale, value_dim):
        if isinstance(scale, jax.core.Tracer):
            return kernel(q, cached, layer, own, rows, pages, scale, value_dim)

        @jax.custom_vjp
        def run(*operands):
            return kernel(*operands, scale, value_dim)

        def forward(*operands):
            out, lse = checkpoint_name(run(*operands), SAVED)
            return (out, lse), (operands, out, lse)

        def backward(residuals, cotangents):
            (q, *step), out, lse = residuals
            table = addresses.of_step(*step)
            dq, d_cached, d_own = _backward(q, table, out, lse, cotangents, scale, value_dim)
            cached, _, own, _, _ = step
            if d_cached is not None:
                d_cached = d_cached.reshape(cached.shape).astype(cached.dtype)
                d_own = d_own.reshape(own.shape).astype(own.dtype)
            return dq, d_cached, None, d_own, None, None

        run.defvjp(forward, backward)
        return run(q, cached, layer, own, rows, pages)

    return op


def _backward(
    q: jax.Array,
    table: addresses.Rows,
    out: jax.Array,
    lse: jax.Array,
    cotangents: tuple[jax.Array, jax.Array],
    scale: float,
    value_dim: int,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Gradients of q, of ``table.cached`` and of ``table.own``, the latter two in float32; None of rows stored as bytes.

    With P the softmax, D the gradient of a logit: D = P (d_out . v - d_out . out + d_lse).
    """
    d_out, d_lse = cotangents
    size = q.shape[3]
    columns = table.address.shape[1]
    floating = jnp.issubdtype(table.cached.dtype, jnp.floating)
    # Without rows of its own a step's table has none, and no address reaches them.
    tables = (table.cached, table.own[:0] if table.own is table.cached else table.own)
    dot = functools.partial(
        jnp.einsum, precision=precision_of(q.dtype), preferred_element_type=jnp.float32
    )

    def body(d_tables, arrays):
        q, address, lse, d_out, shift = arrays
        rows, valid = chunks.gather(table, address, value_dim, q.dtype)
        logits = dot("qhc,qkc->qhk", q, rows) * jnp.float32(scale)
        weights = jnp.where(valid[:, None], jnp.exp(logits - lse[..., None]), 0.0)
        d_weights = dot("qhv,qkv->qhk", d_out, rows[..., :value_dim])
        d_logits = weights * (d_weights + shift[..., None]) * jnp.float32(scale)
        d_logits, weights = d_logits.astype(q.dtype), weights.astype(q.dtype)
        dq = dot("qhk,qkc->qhc", d_logits, rows).astype(q.dtype)
        if not floating:
            return d_tables, dq
        d_rows = dot("qhk,qhc->qkc", d_logits, q)
        d_rows = d_rows.at[..., :value_dim].add(dot("qhk,qhv->qkv", weights, d_out))
        return _added(d_tables, address, d_rows), dq

    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    shift = d_lse - (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    # Without rows there is no weight, whatever takes the place of lse; infinity would make it NaN.
    has_rows = jnp.isfinite(lse)
    lse, shift = jnp.where(has_rows, lse, 0.0), jnp.where(has_rows, shift, 0.0)
    arrays = (flat(q), table.address, flat(lse), flat(d_out.astype(q.dtype)), flat(shift))
    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in tables) if floating else (None, None)
    chunk = chunks.size(arrays[0].shape[0], 4 * columns * size)
    (d_cached, d_own), dq = chunks.scan(body, start, arrays, (0, -1, 0, 0, 0), chunk)
    return dq.reshape(q.shape), d_cached, d_own


def _added(
    d_tables: tuple[jax.Array, jax.Array], address: jax.Array, d_rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of both tables with those of rows [Q, K, C] at addresses [Q, K]."""
    d_cached, d_own = d_tables
    total = d_cached.shape[0]
    # What isn't there goes past the end, where it is dropped.
    places = jnp.where((address >= 0) & (address < total), address, total)
    d_cached = d_cached.at[places].add(d_rows, mode="drop")
    if d_own.shape[0]:
        places = jnp.where(address >= total, address - total, d_own.shape[0])
        d_own = d_own.at[places].add(d_rows, mode="drop")
    return d_cached, d_own
