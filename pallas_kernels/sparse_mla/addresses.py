"""Which rows of memory each query attends to, as the kernels take it: one table, one list of row numbers per query."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import paged


class Rows(NamedTuple):
    """Chosen rows, where they lie.

    Attributes:
      cached: [N, size], the whole cache without copying it.
      own: [O, size], stored alike; ``cached`` itself if no address reaches it.
      address: [Q, K] int32; below N a row of ``cached``, from N on one of ``own``, -1 for none.
    """

    cached: jax.Array
    own: jax.Array
    address: jax.Array


def of_sequences(kv: jax.Array, indices: jax.Array) -> Rows:
    """Of ``api.sparse_mla``'s kv [B, S, C] and indices [B, T, K]; Q = B * T.

    Raises:
      NotImplementedError: if 32 bits do not number all rows.
    """
    batch, length, size = kv.shape
    _check_count(batch * length)
    first = jnp.arange(batch, dtype=jnp.int32)[:, None, None] * length
    address = first + jnp.minimum(indices.astype(jnp.int32), length - 1)
    table = kv.reshape(batch * length, size)
    return Rows(table, table, _flat(address, indices))


def of_step(
    cached: jax.Array,
    layer: jax.Array | int,
    own: jax.Array,
    rows: jax.Array,
    pages: jax.Array | None,
) -> Rows:
    """Of ``api.sparse_mla_step``'s arguments.

    Raises:
      NotImplementedError: if 32 bits do not number all rows.
    """
    layers, number, page_size, size = cached.shape
    total = layers * number * page_size
    _check_count(total + own.shape[0] * own.shape[1])
    batch, capacity = rows.shape[0], paged.capacity_of(cached, pages)
    rows = rows.astype(jnp.int32)
    past = jnp.clip(rows, 0, capacity - 1)
    page = jax.vmap(lambda table, i: table[i])(paged.table_of(pages, batch), past // page_size)
    address = (layer * number + jnp.maximum(page, 0)) * page_size + past % page_size
    table = cached.reshape(total, size)
    if own.shape[1] == 0:
        return Rows(table, table, _flat(address, rows))
    place = jnp.clip(rows - capacity, 0, own.shape[1] - 1)
    if own.shape[0] > 1:
        place = place + jnp.arange(batch, dtype=jnp.int32)[:, None, None] * own.shape[1]
    address = jnp.where(rows >= capacity, total + place, address)
    return Rows(table, own.reshape(-1, size), _flat(address, rows))


def _check_count(rows: int) -> None:
    if rows >= 2**31:
        raise NotImplementedError(f"rows are numbered in 32 bits; got {rows} of them")


def _flat(address: jax.Array, chosen: jax.Array) -> jax.Array:
    """[Q, K] int32, -1 where nothing is chosen."""
    address = jnp.where(chosen >= 0, address, -1)
    return jax.lax.collapse(address.astype(jnp.int32), 0, -1)
