"""XLA backend: gather the chosen latent rows, then one softmax over them."""

import jax
import jax.numpy as jnp


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of H heads that share their keys and values.

    Args:
      q: [..., T, H, K].
      k: [..., S, K]; or [..., T, S, K], own keys per query.
      v: [..., S, V] or [..., T, S, V], like k.
      valid: [..., T, S] bool.
      scale: softmax scale.

    Returns:
      out [..., T, H, V] in q's dtype and lse [..., T, H] float32 (natural log). A query with no valid
      key gives zeros and -inf.
    """
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    keys = "...ts" if k.ndim == q.ndim else "...s"
    logits = jnp.einsum(
        f"...thk,{keys}k->...ths", q, k, precision=precision, preferred_element_type=jnp.float32
    )
    logits = jnp.where(valid[..., None, :], logits * jnp.float32(scale), -jnp.inf)
    # A row without keys has peak -inf; the finite floor keeps its exponentials at exp(-inf) = 0, not NaN.
    peak = jnp.maximum(logits.max(-1, keepdims=True), jnp.finfo(jnp.float32).min)
    weight = jnp.exp(logits - peak)
    total = weight.sum(-1)
    out = jnp.einsum(
        f"...ths,{keys}v->...thv",
        weight.astype(q.dtype),
        v,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    safe_total = jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, jnp.log(safe_total) + peak[..., 0], -jnp.inf)
    return (out / safe_total[..., None]).astype(q.dtype), lse


def sparse_mla(
    q: jax.Array, kv: jax.Array, indices: jax.Array, scale: float, value_dim: int
) -> tuple[jax.Array, jax.Array]:
    """See ``api.sparse_mla``."""
    rows = jax.vmap(lambda kv_b, i: kv_b.at[i].get(mode="clip"))(kv, jnp.maximum(indices, 0))
    return attend(q, rows, rows[..., :value_dim], indices >= 0, scale)
