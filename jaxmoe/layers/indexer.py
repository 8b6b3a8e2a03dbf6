"""The lightning indexer: per query, an inexpensive score of every earlier token (spec 3.1)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.config import ModelConfig
from jaxmoe.layers.linear import linear, whole
from jaxmoe.layers.norm import layer_norm
from jaxmoe.layers.rope import Rotation, rotate

# The indexer's own norm constant; config.rms_norm_eps does not apply to it.
KEY_NORM_EPS = 1e-6


class IndexInputs(NamedTuple):
    """What ``pallas_kernels.index_topk`` needs: q [B, T, I, K], k [B, T, K], weights [B, T, I] float32."""

    q: jax.Array
    k: jax.Array
    weights: jax.Array


def _rotate_head(x: jax.Array, config: ModelConfig, r: Rotation) -> jax.Array:
    # Rotary part first, the reverse of MLA's order; half-split pairs, unlike MLA's (spec 11, traps 1 and 2).
    rotary, rest = jnp.split(x, [config.qk_rope_head_dim], axis=-1)
    return jnp.concatenate(
        [rotate(rotary, r, interleave=config.indexer_rope_interleave), rest], axis=-1
    )


def index_inputs(
    p: dict, config: ModelConfig, x: jax.Array, q_latent: jax.Array, r: Rotation
) -> IndexInputs:
    """Index queries, keys and head weights.

    Both scale factors (key dimension and head count) are multiplied into the weights: they do not change the
    selection, but set the temperature of softmax(I) in the training loss. The Hadamard rotation of the release is
    orthogonal, so it matters only where keys are rounded to fp8 (spec 3.3): see ``spread``.

    Args:
      p: indexer parameters.
      config: the model.
      x: [B, T, D], the attention layer's normalised input.
      q_latent: [B, T, Cq], the normalised query latent.
      r: rotation at the tokens' positions.
    """
    q = _rotate_head(linear(q_latent, p["q_b"]), config, r)
    k = _rotate_head(layer_norm(linear(x, p["k"]), p["k_norm"], KEY_NORM_EPS), config, r)
    weights = linear(x.astype(jnp.float32), p["head_weights"])
    return IndexInputs(
        q, k, weights * jnp.float32((config.index_n_heads * config.index_head_dim) ** -0.5)
    )


def spread(index: IndexInputs) -> IndexInputs:
    """Queries and keys turned by the orthonormal Hadamard matrix, if their size is a power of two (spec 3.1, step 3).

    No score changes, but outliers of a few dimensions spread over all of them: keys then lose less in 8 bits.
    """
    size = index.k.shape[-1]
    if size & (size - 1):
        return index
    p = {"weight": whole(jnp.asarray(_hadamard(size), index.k.dtype))}
    return index._replace(q=linear(index.q, p), k=linear(index.k, p))


def _hadamard(size: int) -> np.ndarray:
    """[size, size], rows in Sylvester's order."""
    i = np.arange(size)
    odd = np.bitwise_count(i[:, None] & i[None]) % 2
    return np.where(odd == 1, -(size**-0.5), size**-0.5)
