"""XLA backend: gather the chosen latent rows, then one softmax over them."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import paged
from pallas_kernels.numerics import precision_of
from pallas_kernels.sparse_mla import addresses, chunks, gradient


class Part(NamedTuple):
    """Keys and values that one softmax covers together with other parts.

    Attributes:
      k: [..., S, K]; or [..., T, S, K], own keys per query.
      v: [..., S, V] or [..., T, S, V], like k.
      valid: [..., T, S] bool.
    """

    k: jax.Array
    v: jax.Array
    valid: jax.Array


class Softmax(NamedTuple):
    """A softmax over the parts so far: out [..., T, H, V] before division by total, peak and total [..., T, H, 1]; float32."""

    out: jax.Array
    peak: jax.Array
    total: jax.Array


def accumulate(
    before: Softmax | None, q: jax.Array, part: Part, scale: float | jax.Array
) -> Softmax:
    """The softmax of ``before`` and one more part; rows of it that are not valid must still be finite."""
    precision = precision_of(q.dtype)
    dot = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    rows = "...ts" if part.k.ndim == q.ndim else "...s"
    logits = dot(f"...thk,{rows}k->...ths", q, part.k) * jnp.float32(scale)
    logits = jnp.where(part.valid[..., None, :], logits, -jnp.inf)
    # A row without keys would have peak -inf, or none; the finite floor keeps its exponentials at exp(-inf) = 0, not NaN.
    peak = logits.max(-1, keepdims=True, initial=jnp.finfo(jnp.float32).min)
    if before is not None:
        peak = jnp.maximum(peak, before.peak)
    weights = jnp.exp(logits - peak)
    out = dot(f"...ths,{rows}v->...thv", weights.astype(q.dtype), part.v)
    total = weights.sum(-1, keepdims=True)
    if before is not None:
        share = jnp.exp(before.peak - peak)
        out, total = before.out * share + out, before.total * share + total
    return Softmax(out, peak, total)


def finish(softmax: Softmax, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """``attend``'s result."""
    total = softmax.total
    safe_total = jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, jnp.log(safe_total) + softmax.peak, -jnp.inf)
    return (softmax.out / safe_total).astype(dtype), lse[..., 0]


def attend(
    q: jax.Array, parts: Sequence[Part], scale: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of H heads that share their keys and values, over all parts jointly.

    Args:
      q: [..., T, H, K].
      parts: disjoint key sets; never copied into one. Rows that are not valid must still be finite.
      scale: softmax scale.

    Returns:
      out [..., T, H, V] in q's dtype and lse [..., T, H] float32 (natural log). A query with no valid
      key gives zeros and -inf.
    """
    softmax = None
    for part in parts:
        softmax = accumulate(softmax, q, part, scale)
    return finish(softmax, q.dtype)


def sparse_mla(
    q: jax.Array, kv: jax.Array, indices: jax.Array, scale: float | jax.Array, value_dim: int
) -> tuple[jax.Array, jax.Array]:
    """See ``api.sparse_mla``."""
    if 0 in (*q.shape, *kv.shape):
        return _nothing(q, value_dim)
    return _attend_rows(q, addresses.of_sequences(kv, indices), scale, value_dim)


def sparse_mla_step(
    q: jax.Array,
    cached: jax.Array,
    layer: jax.Array | int,
    own: jax.Array,
    rows: jax.Array,
    pages: jax.Array | None,
    scale: float | jax.Array,
    value_dim: int,
) -> tuple[jax.Array, jax.Array]:
    """See ``api.sparse_mla_step``."""
    if 0 in q.shape:
        return _nothing(q, value_dim)
    if 0 in cached.shape or not paged.capacity_of(cached, pages):  # only own rows are numbered
        return _over_own(q, own, rows, scale, value_dim)
    return _over_cache(q, cached, layer, own, rows, pages, scale, value_dim)


@gradient.differentiable_step
def _over_cache(q, cached, layer, own, rows, pages, scale, value_dim):
    # Address rows of the whole stacked cache, so that only the selected ones are read; the step's own rows
    # take their places in the gathered set, so that one softmax covers both.
    table = addresses.of_step(cached, layer, own, rows, pages)
    return _attend_rows(q, table, scale, value_dim)


def _over_own(
    q: jax.Array, own: jax.Array, rows: jax.Array, scale: float | jax.Array, value_dim: int
) -> tuple[jax.Array, jax.Array]:
    """``sparse_mla_step`` without a cache."""
    if 0 in own.shape:
        return _nothing(q, value_dim)
    own = jnp.broadcast_to(own, (q.shape[0], *own.shape[1:]))
    return _attend_rows(q, addresses.of_sequences(own, rows), scale, value_dim)


def _nothing(q: jax.Array, value_dim: int) -> tuple[jax.Array, jax.Array]:
    """The result where there are no rows, or no queries."""
    out = jnp.zeros((*q.shape[:3], value_dim), q.dtype)
    return out, jnp.full(q.shape[:3], -jnp.inf, jnp.float32)


def _attend_rows(
    q: jax.Array, table: addresses.Rows, scale: float | jax.Array, value_dim: int
) -> tuple[jax.Array, jax.Array]:
    """Gathers and attends, as many queries at a time as ``chunks`` allows."""

    def body(carry: None, arrays: tuple[jax.Array, ...]) -> tuple[None, Any]:
        q, address = arrays
        rows, valid = chunks.gather(table, address, value_dim, q.dtype)
        # The values are the first entries of the rows. Whole rows are summed and the result is cut: cutting
        # the rows would copy them all.
        out, lse = attend(q[:, None], [Part(rows, rows, valid[:, None])], scale)
        return carry, (out[:, 0, :, :value_dim], lse[:, 0])

    row_bytes = table.address.shape[1] * q.shape[3] * q.dtype.itemsize
    chunk = chunks.size(q.shape[0] * q.shape[1], row_bytes)
    arrays = (q.reshape(-1, *q.shape[2:]), table.address)
    _, (out, lse) = chunks.scan(body, None, arrays, (0, -1), chunk)
    return out.reshape(*q.shape[:3], value_dim), lse.reshape(q.shape[:3])
