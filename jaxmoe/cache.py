"""The decode cache and its commit.

A step reads the cache and returns new entries; ``commit`` writes them. Only commit may donate
(architecture, idea 2): a step that fails leaves the cache as it was.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxmoe.config import ModelConfig
from jaxmoe.layers.attention import Entries, entry_sizes
from pallas_kernels import cache_rows, paged


@struct.dataclass
class Cache:
    """Cached rows of a batch of sequences.

    Attributes:
      entries: by name, [L, P, S, size], P pages of S rows: "latent" (normalised latent, then rotated key) and "index_k"
        for MLA, "k" and "v" for grouped-query attention. L counts the layers that have the entry. All in one format of
        ``pallas_kernels.cache_rows``, which their dtype says.
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


def stored_dtype(config: ModelConfig, dtype: Any) -> np.dtype:
    """The dtype of a cache's arrays: ``dtype``, or uint8 for "fp8"."""
    if dtype == "fp8":
        if not config.is_mla:
            raise ValueError(
                'cache dtype "fp8" is for latent attention, and this model has grouped-query attention; use "bfloat16".'
            )
        return jnp.dtype(cache_rows.FORMATS[dtype])
    try:
        found = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating) or found.itemsize < 2:
        raise ValueError(
            f"cache dtype must be one of {', '.join(cache_rows.FORMATS)}; got {dtype!r}."
        )
    return found


def init_cache(
    config: ModelConfig,
    batch: int,
    capacity: int,
    dtype: Any = jnp.float32,
    *,
    mtp: bool = False,
) -> Cache:
    """An empty cache for ``batch`` sequences of up to ``capacity`` tokens.

    Args:
      config: the model.
      batch: sequences, or pages.
      capacity: tokens of each.
      dtype: "float32", "bfloat16" (or such a dtype), or "fp8" for rows of 8 bits with scales (``pallas_kernels.cache_rows``).
      mtp: for an MTP module's one layer instead of the model's.

    Raises:
      ValueError: for another dtype, or "fp8" without latent attention.
    """
    layers = entry_layers(config)
    dtype = stored_dtype(config, dtype)
    entries = {
        name: jnp.zeros((1 if mtp else layers[name], batch, capacity, size), dtype)
        for name, size in entry_sizes(config, dtype).items()
    }
    return Cache(entries, jnp.zeros(batch, jnp.int32))


def bytes_per_token(config: ModelConfig, dtype: Any = jnp.bfloat16) -> int:
    """Cache bytes per token over all layers; ``dtype`` as in ``init_cache``."""
    layers = entry_layers(config)
    dtype = stored_dtype(config, dtype)
    sizes = entry_sizes(config, dtype)
    return sum(size * layers[name] for name, size in sizes.items()) * dtype.itemsize


def write(entries: Entries, new: Entries, pages: jax.Array | None, positions: jax.Array) -> Entries:
    """Writes a step's rows to their places. Free of collectives; the only thing that may donate ``entries``.

    Args:
      entries: the cache's rows by name, [L, P, S, size].
      new: by name, [L, B, T, size], from a step over this cache, and so stored alike.
      pages: [B, W] as in ``Cache``.
      positions: [B, T] int32, each row's position in its sequence; rows at a negative one, beyond the capacity or on
        page -1 are dropped.

    Raises:
      ValueError: for rows stored in another format.
    """
    page_size = next(iter(entries.values())).shape[2]
    table = paged.table_of(pages, positions.shape[0])
    column = jnp.where(positions >= 0, positions // page_size, table.shape[1])
    page = jax.vmap(lambda row, i: row.at[i].get(mode="fill", fill_value=-1))(table, column)
    offset = positions % page_size

    def put(stored: jax.Array, rows: jax.Array) -> jax.Array:
        if rows.dtype != stored.dtype:
            raise ValueError(
                f"new rows must be stored as {stored.dtype}, like the cache's; got {rows.dtype}. Take them from a step over it."
            )
        # Negative indices would count from the end.
        place = jnp.where(page >= 0, page, stored.shape[1])
        return stored.at[:, place, offset].set(rows, mode="drop", unique_indices=True)

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
