"""Joining attention over disjoint rows."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def merge_partials(
    parts: list[tuple[Float[Array, "*S V"], Float[Array, "*S"]]],
) -> tuple[Float[Array, "*S V"], Float[Array, "*S"]]:
    """Joins attention outputs over disjoint key sets by the split-softmax rule.

    Args:
      parts: (out [..., V], lse [...] float32 natural log) of each part.

    Returns:
      (out, lse) as if the softmax had run over all keys at once.

    Raises:
      ValueError: if there is no part.
    """
    if not parts:
        raise ValueError("merge_partials: parts must hold at least one (out, lse); got none.")
    lse = jnp.stack([part_lse for _, part_lse in parts])
    peak = jnp.maximum(lse.max(0), jnp.finfo(jnp.float32).min)
    share = jnp.exp(lse - peak[None])
    total = share.sum(0)
    weight = share / jnp.where(total > 0, total, 1.0)[None]
    out = sum(w[..., None] * o.astype(jnp.float32) for w, (o, _) in zip(weight, parts, strict=True))
    return out.astype(parts[0][0].dtype), jnp.where(total > 0, jnp.log(total) + peak, -jnp.inf)
