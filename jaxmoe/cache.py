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


@struct.dataclass
class Cache:
    """Cached rows of a batch of sequences.

    Attributes:
      entries: by name, [L, B, S, size]: "latent" (normalised latent, then rotated key) and "index_k" for MLA, "k" and
        "v" for grouped-query attention. L counts the layers that have the entry.
      lengths: [B] int32, valid rows per sequence.
    """

    entries: Entries
    lengths: jax.Array

    @property
    def capacity(self) -> int:
        """S, the rows each sequence can hold."""
        return next(iter(self.entries.values())).shape[2]


def entry_layers(config: ModelConfig) -> dict[str, int]:
    """How many layers cache each entry: layers that share a selection have no index keys of their own."""
    full = sum(kind.indexer == "full" for kind in config.layer_kinds)
    return {
        name: full if name == "index_k" else config.num_hidden_layers
        for name in entry_sizes(config)
    }


def init_cache(config: ModelConfig, batch: int, capacity: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache for ``batch`` sequences of up to ``capacity`` tokens."""
    layers = entry_layers(config)
    entries = {
        name: jnp.zeros((layers[name], batch, capacity, size), dtype)
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


def commit(cache: Cache, entries: Entries, counts: jax.Array) -> Cache:
    """Appends the first ``counts`` of a step's T rows to each sequence.

    Rows past ``counts`` are written too and lie beyond the new length, where nothing reads them; the caller
    guarantees ``lengths + T <= capacity``. Free of collectives; donate ``cache`` when calling under jit.

    Args:
      cache: the cache.
      entries: by name, [L, B, T, size], from a step.
      counts: [B] int32, rows to keep per sequence (<= T).
    """
    tokens = next(iter(entries.values())).shape[2]
    batch = cache.lengths.shape[0]
    row = cache.lengths[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None]
    sequence = jnp.arange(batch, dtype=jnp.int32)[:, None]

    def write(stored: jax.Array, new: jax.Array) -> jax.Array:
        return stored.at[:, sequence, row].set(
            new.astype(stored.dtype), mode="drop", unique_indices=True
        )

    written = {name: write(stored, entries[name]) for name, stored in cache.entries.items()}
    return Cache(written, cache.lengths + counts)
