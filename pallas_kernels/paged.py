"""What the queries of a step see: cached rows through a page table, and rows of the step itself.

A cache is [L, P, S, size]: P pages of S rows per layer. Row r of sequence b is row r % S of page pages[b, r // S]. Without a
table sequence b has page b to itself. The step's own rows are [Bo, O, size]: per sequence (Bo = B), or shared (Bo = 1),
where the tokens of all sequences lie behind each other. They are numbered from the capacity on.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def check(op: str, q_shape: tuple[int, ...], cached, own, pages) -> None:
    """Raises ValueError unless a step's cache, own rows and pages fit queries [B, T, heads, size]."""
    batch, size = q_shape[0], q_shape[-1]
    shapes = f"q {q_shape}, cached {cached.shape}, own {own.shape}"
    if cached.ndim != 4 or own.ndim != 3 or cached.shape[3] != size or own.shape[2] != size:
        raise ValueError(
            f"{op}: cached must be [L, P, S, size] and own [B or 1, O, size], with q's last size; got {shapes}."
        )
    if own.shape[0] not in (1, batch):
        raise ValueError(f"{op}: own must be one per sequence or [1, O, size]; got {shapes}.")
    if pages is None and cached.shape[1] != batch:
        raise ValueError(
            f"{op}: without pages the cache must hold a page per sequence; got {shapes}."
        )
    if pages is not None and (pages.ndim != 2 or pages.shape[0] != batch):
        raise ValueError(f"{op}: pages must be [B, W] with q's B; got {pages.shape} and {shapes}.")


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
    rows = jax.lax.dynamic_index_in_dim(cached, layer, 0, keepdims=False)
    if pages is None:
        return rows
    rows = rows.at[jnp.maximum(pages, 0)].get(mode="clip")
    return rows.reshape(pages.shape[0], -1, cached.shape[3])
