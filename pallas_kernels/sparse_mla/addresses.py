"""Which rows of memory each query attends to: one table, and one list of row numbers per query.

Callers number the rows of a sequence (``Chosen``); memory has them on pages (``Rows``). XLA turns the one into the other, and the
Hopper kernel does it itself (``_numbers_ptx``).
"""

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Numbering:
    """What row numbers mean.

    Attributes:
      queries: T, of a sequence.
      page_size: rows of a page.
      layer_pages: pages of a layer of the cache, whose layers lie behind each other.
      capacity: rows that a sequence can have in the cache; from this number on they are the step's own.
      own: rows of the step that a sequence sees.
      own_stride: how far a sequence's own rows lie behind those of the sequence before; 0 if all see the same.
    """

    queries: int
    page_size: int
    layer_pages: int
    capacity: int
    own: int = 0
    own_stride: int = 0


class Chosen(NamedTuple):
    """Chosen rows by their numbers.

    Attributes:
      cached, own: as in ``Rows``.
      numbers: [Q, K] int32; negative for none.
      pages: [B, W] int32, of each sequence.
      layer: [] int32, of the cache.
      numbering: what the numbers mean.
    """

    cached: jax.Array
    own: jax.Array
    numbers: jax.Array
    pages: jax.Array
    layer: jax.Array
    numbering: Numbering

    def own_begin(self, sequence: jax.Array) -> jax.Array:
        """Address of a sequence's first own row."""
        return self.cached.shape[0] + sequence * self.numbering.own_stride

    def rows(self) -> Rows:
        """The same with addresses."""
        batch = self.pages.shape[0]
        begin = self.own_begin(jnp.arange(batch, dtype=jnp.int32))
        of_sequence = lambda *x: address_of(*x, self.layer, self.numbering)  # noqa: E731
        address = jax.vmap(of_sequence)(self.numbers.reshape(batch, -1), self.pages, begin)
        return Rows(self.cached, self.own, address.reshape(self.numbers.shape))


def address_of(
    numbers: jax.Array,
    pages: jax.Array,
    own_begin: jax.Array,
    layer: jax.Array,
    numbering: Numbering,
) -> jax.Array:
    """Addresses of a sequence's rows, of any shape; -1 for negative numbers.

    Args:
      numbers: int32.
      pages: [W] int32, of the sequence; a negative one, whose rows nothing should name, counts as 0.
      own_begin: address of its first own row.
      layer, numbering: of ``Chosen``.
    """
    size, capacity = numbering.page_size, numbering.capacity
    past = jnp.clip(numbers, 0, capacity - 1)
    page = layer * numbering.layer_pages + jnp.maximum(pages[past // size], 0)
    address = page * size + past % size
    if numbering.own:
        place = jnp.clip(numbers - capacity, 0, numbering.own - 1)
        address = jnp.where(numbers >= capacity, own_begin + place, address)
    return jnp.where(numbers >= 0, address, -1)


def chosen_of_sequences(kv: jax.Array, indices: jax.Array) -> Chosen:
    """Of ``api.sparse_mla``'s kv [B, S, C] and indices [B, T, K]; Q = B * T.

    Raises:
      NotImplementedError: if 32 bits do not number all rows.
    """
    batch, length, size = kv.shape
    _check_count(batch * length)
    table = kv.reshape(batch * length, size)
    numbering = Numbering(indices.shape[1], length, batch, length)
    pages = paged.table_of(None, batch)
    return Chosen(table, table, _flat(indices), pages, jnp.int32(0), numbering)


def chosen_of_step(
    cached: jax.Array,
    layer: jax.Array | int,
    own: jax.Array,
    rows: jax.Array,
    pages: jax.Array | None,
) -> Chosen:
    """Of ``api.sparse_mla_step``'s arguments.

    Raises:
      NotImplementedError: if 32 bits do not number all rows.
    """
    layers, number, page_size, size = cached.shape
    total = layers * number * page_size
    _check_count(total + own.shape[0] * own.shape[1])
    table, layer = cached.reshape(total, size), jnp.asarray(layer, jnp.int32)
    capacity = paged.capacity_of(cached, pages)
    pages = paged.table_of(pages, rows.shape[0])
    count = own.shape[1]
    stride = count if own.shape[0] > 1 else 0
    numbering = Numbering(rows.shape[1], page_size, number, capacity, count, stride)
    own = own.reshape(-1, size) if count else table
    return Chosen(table, own, _flat(rows), pages, layer, numbering)


def of_sequences(kv: jax.Array, indices: jax.Array) -> Rows:
    """``chosen_of_sequences`` with addresses."""
    return chosen_of_sequences(kv, indices).rows()


def of_step(
    cached: jax.Array,
    layer: jax.Array | int,
    own: jax.Array,
    rows: jax.Array,
    pages: jax.Array | None,
) -> Rows:
    """``chosen_of_step`` with addresses."""
    return chosen_of_step(cached, layer, own, rows, pages).rows()


def _check_count(rows: int) -> None:
    if rows >= 2**31:
        raise NotImplementedError(f"rows are numbered in 32 bits; got {rows} of them")


def _flat(numbers: jax.Array) -> jax.Array:
    return jax.lax.collapse(numbers.astype(jnp.int32), 0, -1)
