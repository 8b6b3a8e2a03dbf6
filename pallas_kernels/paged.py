"""What the queries of a step see: cached rows through a page table, and rows of the step itself.

A cache is [L, P, S, size]: P pages of S rows per layer, stored in a format of ``pallas_kernels.cache_rows``. Row r of
sequence b is row r % S of page pages[b, r // S]. Without a table sequence b has page b to itself. The step's own rows are
[Bo, O, size], stored alike: per sequence (Bo = B), or shared (Bo = 1), where the tokens of all sequences lie behind each
other. They are numbered from the capacity on.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels import _checks, cache_rows

BLOCK_ROWS = 2048  # cached rows of a sequence that XLA's backends copy at a time


def check(op: str, q_shape: tuple[int, ...], cached, layer, own, pages, values: int) -> None:
    """Raises ValueError or TypeError unless a step's cache, own rows and pages fit queries [B, T, heads, size].

    Args:
      op: for the message.
      q_shape: shape of the queries.
      cached: the cache.
      layer: which of its layers.
      own: the step's own rows.
      pages: or None.
      values: of a row, as in ``cache_rows``.
    """
    batch = q_shape[0]
    _checks.arrays(op, cached=cached, own=own)
    _checks.integers(op, pages=pages)
    if cached.dtype != jnp.uint8 and not jnp.issubdtype(cached.dtype, jnp.floating):
        raise TypeError(
            f"{op}: cached must be stored in {', '.join(cache_rows.FORMATS)} (uint8); got {cached.dtype}. Use cache_rows.encode."
        )
    size = cache_rows.stored_size(q_shape[-1], values, cached.dtype)
    shapes = f"q {q_shape}, cached {cached.dtype}{cached.shape}, own {own.dtype}{own.shape}"
    ranks = cached.ndim == 4 and own.ndim == 3
    if not ranks or cached.shape[3] != size or own.shape[2] != size or not cached.shape[0]:
        raise ValueError(
            f"{op}: cached must be [L, P, S, {size}] and own [B or 1, O, {size}], for rows of q's last size and at least one layer; got {shapes}."
        )
    if own.dtype != cached.dtype:
        raise ValueError(
            f"{op}: own rows must be stored like the cached ones; got {shapes}. Use cache_rows.encode."
        )
    if own.shape[0] not in (1, batch):
        raise ValueError(f"{op}: own must be one per sequence or [1, O, size]; got {shapes}.")
    if pages is None and cached.shape[1] != batch:
        raise ValueError(
            f"{op}: without pages the cache must hold a page per sequence; got {shapes}."
        )
    if pages is not None and (pages.ndim != 2 or pages.shape[0] != batch):
        raise ValueError(f"{op}: pages must be [B, W] with q's B; got {pages.shape} and {shapes}.")
    _checks.scalar_int(op, "layer", layer, 0, cached.shape[0] - 1, "Layers count from 0.")


def capacity_of(cached: jax.Array, pages: jax.Array | None) -> int:
    """Rows that a sequence can have in the cache."""
    return cached.shape[2] * (1 if pages is None else pages.shape[1])


def table_of(pages: jax.Array | None, batch: int) -> Int[Array, "B W"]:
    """``pages``, or page b for sequence b."""
    if pages is None:
        return jnp.arange(batch, dtype=jnp.int32)[:, None]
    return pages.astype(jnp.int32)


def spans_of(spans: jax.Array | None, batch: int, tokens: int) -> Int[Array, "B T 2"]:
    """``spans``, or for query t own rows 0..t of its sequence."""
    if spans is not None:
        return spans.astype(jnp.int32)
    end = jnp.arange(1, tokens + 1, dtype=jnp.int32)
    return jnp.broadcast_to(jnp.stack([jnp.zeros_like(end), end], -1)[None], (batch, tokens, 2))


def own_mask(spans: jax.Array | None, batch: int, tokens: int, own: int) -> jax.Array:
    """[B, T, O] bool: which of the step's own rows each query sees."""
    spans = spans_of(spans, batch, tokens)
    row = jnp.arange(own, dtype=jnp.int32)[None, None]
    return (row >= spans[..., :1]) & (row < spans[..., 1:])


def layer_rows(cached: jax.Array, layer: jax.Array | int, pages: jax.Array | None) -> jax.Array:
    """[B, capacity, size]: every row that each sequence can have, of one layer. A copy."""
    if pages is None:
        return jax.lax.dynamic_index_in_dim(cached, layer, 0, keepdims=False)
    rows = cached.at[layer, jnp.maximum(pages, 0)].get(mode="clip")
    return rows.reshape(pages.shape[0], -1, cached.shape[3])


def fold_rows(
    body: Callable[[Any, jax.Array | int, list[jax.Array]], Any],
    start: Any,
    caches: Sequence[jax.Array],
    layer: jax.Array | int,
    lengths: jax.Array,
    pages: jax.Array | None,
) -> Any:
    """Folds over a layer's cached rows, a block of rows of every sequence at a time, as far as the longest one reaches.

    So time follows the lengths and memory the block, neither the capacity.

    Args:
      body: (carry, first row, [B, block, size] of each cache) -> carry. Rows past a sequence's length hold anything.
      start: the first carry.
      caches: each [L, P, S, size].
      layer: which layer; may be traced.
      lengths: [B] int32.
      pages: [B, W] or None.
    """
    size, blocks = blocks_of(caches[0], pages)
    if blocks == 1:
        return body(start, 0, [layer_rows(cached, layer, pages) for cached in caches])
    if pages is not None:
        width = size // caches[0].shape[2]
        pages = jnp.pad(pages, ((0, 0), (0, blocks * width - pages.shape[1])), constant_values=-1)

    def rows_of(cached: jax.Array, i: jax.Array) -> jax.Array:
        if pages is not None:
            block = jax.lax.dynamic_slice_in_dim(pages, i * width, width, axis=1)
            return layer_rows(cached, layer, block)
        sequence = jnp.arange(cached.shape[1], dtype=jnp.int32)[:, None]
        row = i * size + jnp.arange(size, dtype=jnp.int32)[None]
        return cached.at[layer, sequence, row].get(mode="clip")

    def step(i: jax.Array, carry: Any) -> Any:
        return body(carry, i * size, [rows_of(cached, i) for cached in caches])

    used = jnp.minimum((lengths.max() + size - 1) // size, blocks)
    return jax.lax.fori_loop(0, used, step, start)


def blocks_of(cached: jax.Array, pages: jax.Array | None) -> tuple[int, int]:
    """(rows of a block, how many blocks) in ``fold_rows``; the last one may reach beyond the capacity."""
    capacity = capacity_of(cached, pages)
    page = cached.shape[2] if pages is not None else 1
    size = min(capacity, max(1, BLOCK_ROWS // page) * page)
    return size, -(-capacity // size)
