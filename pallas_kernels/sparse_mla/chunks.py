"""Working on some queries at a time, so that the rows gathered for them stay bounded."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._implementation import on_accelerator

GATHERED_BYTES = 2**28  # of a chunk's rows
# On CPU, where what was gathered should still be in the cache when it is used, and pages that are new to the process cost more
# than all arithmetic: gradients took 5 to 8 times as long with 2**28 (docs/log.md, 2026-11-27).
CACHED_BYTES = 2**20


def size(queries: int, row_bytes: int) -> int:
    """Queries of a chunk, for gathered rows of ``row_bytes`` a query."""
    limit = GATHERED_BYTES if on_accelerator() else CACHED_BYTES
    return max(1, min(queries, limit // max(row_bytes, 1)))


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
