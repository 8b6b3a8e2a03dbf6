"""XLA backend: gather the chosen latent rows, then one softmax over them."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import cache_rows, paged
from pallas_kernels.numerics import precision_of


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


def accumulate(before: Softmax | None, q: jax.Array, part: Part, scale: float) -> Softmax:
    """The softmax of ``before`` and one more part; rows of it that are not valid must still be finite."""
    precision = precision_of(q.dtype)
    dot = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    rows = "...ts" if part.k.ndim == q.ndim else "...s"
    logits = dot(f"...thk,{rows}k->...ths", q, part.k) * jnp.float32(scale)
    logits = jnp.where(part.valid[..., None, :], logits, -jnp.inf)
    # A row without keys has peak -inf; the finite floor keeps its exponentials at exp(-inf) = 0, not NaN.
    floor = jnp.finfo(jnp.float32).min
    peak = jnp.maximum(logits.max(-1, keepdims=True), floor if before is None else before.peak)
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


def attend(q: jax.Array, parts: Sequence[Part], scale: float) -> tuple[jax.Array, jax.Array]:
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
    q: jax.Array, kv: jax.Array, indices: jax.Array, scale: float, value_dim: int
) -> tuple[jax.Array, jax.Array]:
    """See ``api.sparse_mla``."""
    rows = jax.vmap(lambda kv_b, i: kv_b.at[i].get(mode="clip"))(kv, jnp.maximum(indices, 0))
    rows = jnp.where((indices >= 0)[..., None], rows, jnp.zeros((), rows.dtype))
    # The values are the first entries of the rows. Whole rows are summed and the result is cut: cutting
    # the rows would copy them all.
    out, lse = attend(q, [Part(rows, rows, indices >= 0)], scale)
    return out[..., :value_dim], lse


def sparse_mla_step(
    q: jax.Array,
    cached: jax.Array,
    layer: jax.Array | int,
    own: jax.Array,
    rows: jax.Array,
    pages: jax.Array | None,
    scale: float,
    value_dim: int,
) -> tuple[jax.Array, jax.Array]:
    """See ``api.sparse_mla_step``."""
    layers, number, page_size, size = cached.shape
    capacity = paged.capacity_of(cached, pages)
    # Address rows of the whole stacked cache, so that only the selected ones are read; the step's own rows
    # take their places in the gathered set, so that one softmax covers both.
    past = jnp.clip(rows, 0, capacity - 1)
    page = jax.vmap(lambda table, i: table[i])(paged.table_of(pages, q.shape[0]), past // page_size)
    address = (layer * number + jnp.maximum(page, 0)) * page_size + past % page_size
    flat = cached.reshape(layers * number * page_size, size)
    kv = flat.at[address].get(mode="promise_in_bounds")
    place = jnp.maximum(rows - capacity, 0)
    if own.shape[0] == 1:
        new = own[0].at[place].get(mode="clip")
    else:
        new = jax.vmap(lambda x, i: x.at[i].get(mode="clip"))(own, place)
    kv = jnp.where((rows >= capacity)[..., None], new, kv)
    kv = cache_rows.decode(kv, value_dim, q.dtype)
    valid = rows >= 0
    kv = jnp.where(valid[..., None], kv, jnp.zeros((), kv.dtype))
    out, lse = attend(q, [Part(kv, kv, valid)], scale)
    return out[..., :value_dim], lse
