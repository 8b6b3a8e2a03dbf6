"""Working on some queries at a time, so that the rows gathered for them stay bounded."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import cache_rows
from pallas_kernels._implementation import on_accelerator
from pallas_kernels.sparse_mla import addresses

GATHERED_BYTES = 2**28  # of a chunk's rows
# On CPU, where what was gathered should still be in the cache when it is used, and pages that are new to the process cost more
# than all arithmetic: gradients took 5 to 8 times as long with 2**28 (docs/log.md, 2026-11-27).
CACHED_BYTES = 2**20


def size(queries: int, row_bytes: int) -> int:
    """Queries of a chunk, for gathered rows of ``row_bytes`` a query."""
    limit = GATHERED_BYTES if on_accelerator() else CACHED_BYTES
    return max(1, min(queries, limit // max(row_bytes, 1)))


def gather(
    table: addresses.Rows, address: jax.Array, value_dim: int, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Rows [..., K, C] in ``dtype`` of addresses [..., K], and which of them there are; the others are zeros."""
    count, valid = table.cached.shape[0], address >= 0
    rows = table.cached.at[jnp.clip(address, 0, count - 1)].get(mode="promise_in_bounds")
    if table.own is not table.cached:
        own = table.own.at[jnp.maximum(address - count, 0)].get(mode="promise_in_bounds")
        rows = jnp.where((address >= count)[..., None], own, rows)
    rows = cache_rows.decode(rows, value_dim, dtype)
    return jnp.where(valid[..., None], rows, jnp.zeros((), rows.dtype)), valid


def scan(
    body: Callable[[Any, tuple[jax.Array, ...]], tuple[Any, Any]],
    carry: Any,
    arrays: tuple[jax.Array, ...],
    fill: tuple[Any, ...],
    chunk: int,
) -> tuple[Any, Any]:
    """``lax.scan`` of ``body`` over ``chunk`` queries at a time.

    Args:
      body: (carry, arrays [chunk, ...]) -> (carry, results [chunk, ...]).
      carry: the first.
      arrays: each [Q, ...].
      fill: what pads each of them to whole chunks.
      chunk: queries of a chunk.

    Returns:
      (carry, results [Q, ...]).
    """
    queries = arrays[0].shape[0]
    if queries <= chunk:
        return body(carry, arrays)
    count = -(-queries // chunk)

    def cut(x: jax.Array, value: Any) -> jax.Array:
        widths = [(0, count * chunk - queries)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, widths, constant_values=value).reshape(count, chunk, *x.shape[1:])

    pieces = tuple(cut(x, value) for x, value in zip(arrays, fill, strict=True))
    carry, results = jax.lax.scan(body, carry, pieces)
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:queries], results)
