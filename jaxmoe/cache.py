"""The decode cache and its commit.

A step reads the cache and returns new entries; ``commit`` writes them. Only commit may donate
(architecture, idea 2): a step that fails leaves the cache as it was.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxmoe.config import ModelConfig
from jaxmoe.layers.attention import Entries, entry_sizes
from pallas_kernels import paged


@struct.dataclass
class Cache:
    """Cached rows of a batch of sequences.

    Attributes:
      entries: by name, [L, P, S, size], P pages of S rows: "latent" (normalised latent, then rotated key) and "index_k"
        for MLA, "k" and "v" for grouped-query attention. L counts the layers that have the entry.
      lengths: [B] int32, valid rows per sequence.
      pages: [B, W] int32, each sequence's pages in order, -1 after the last; None: sequence b has page b to itself.
    """

    entries: Entries
    lengths: jax.Array
    pages: jax.Array | None = None

    @property
    def capacity(self) -> int:
        """The rows each sequence can hold."""
        return paged.capacity_of(next(iter(self.entries.values())), self.pages)


def entry_layers(config: ModelConfig) -> dict[str, int]:
    """How many layers cache each entry: layers that share a selection have no index keys of their own."""
    full = sum(kind.indexer == "full" for kind in config.layer_kinds)
    return {
        name: full if name == "index_k" else config.num_hidden_layers
        for name in entry_sizes(config)
    }


def init_cache(
    config: ModelConfig,
    batch: int,
    capacity: int,
    dtype: Any = jnp.float32,
    *,
    mtp: bool = False,
) -> Cache:
    """An empty cache for ``batch`` sequences of up to ``capacity`` tokens: the model's, or an MTP module's one layer."""
    layers = entry_layers(config)
    entries = {
        name: jnp.zeros((1 if mtp else layers[name], batch, capacity, size), dtype)
        for name, size in entry_sizes(config).items()
    }
    return Cache(entries, jnp.zeros(batch, jnp.int32))


def bytes_per_token(config: ModelConfig, dtype: Any = jnp.bfloat16) -> int:
    """Cache bytes per token over all layers."""
    layers = entry_layers(config)
    return (
        sum(size * layers[name] for name, size in entry_sizes(config).items())
        * jnp.dtype(dtype).itemsize
    )


def write(entries: Entries, new: Entries, pages: jax.Array | None, positions: jax.Array) -> Entries:
    """Writes a step's rows to their places. Free of collectives; the only thing that may donate ``entries``.

    Args:
      entries: the cache's rows by name, [L, P, S, size].
      new: by name, [L, B, T, size], from a step.
      pages: [B, W] as in ``Cache``.
      positions: [B, T] int32, each row's position in its sequence; rows at a negative one, beyond the capacity or on
        page -1 are dropped.
    """
    page_size = next(iter(entries.values())).shape[2]
    table = paged.table_of(pages, positions.shape[0])
    column = jnp.where(positions >= 0, positions // page_size, table.shape[1])
    page = jax.vmap(lambda row, i: row.at[i].get(mode="fill", fill_value=-1))(table, column)
    offset = positions % page_size

    def put(stored: jax.Array, rows: jax.Array) -> jax.Array:
        # Negative indices would count from the end.
        place = jnp.where(page >= 0, page, stored.shape[1])
        return stored.at[:, place, offset].set(
            rows.astype(stored.dtype), mode="drop", unique_indices=True
        )

    return {name: put(stored, new[name]) for name, stored in entries.items()}


def commit(cache: Cache, entries: Entries, counts: jax.Array) -> Cache:
    """Appends the first ``counts`` of a step's T rows to each sequence; see ``write``.

    Rows past ``counts`` are written too, where their sequence has a place, and lie beyond the new length, where
    nothing reads them.

    Args:
      cache: the cache.
      entries: by name, [L, B, T, size], from a step.
      counts: [B] int32, rows to keep per sequence (<= T).
    """
    tokens = next(iter(entries.values())).shape[2]
    positions = cache.lengths[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None]
    written = write(cache.entries, entries, cache.pages, positions)
    return cache.replace(entries=written, lengths=cache.lengths + counts)
