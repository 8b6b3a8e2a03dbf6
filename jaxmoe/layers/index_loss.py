"""The indexer's training loss: how far softmax(index scores) is from the attention it should imitate (spec 4.1).

Loss and gradient are computed together, some queries at a time: the per-head dot products [queries, index heads,
keys] are the largest array of training, and exist for ``ROWS`` queries only (for all, if their number is not a
multiple of that, which a whole block of queries is).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxmoe.layers.indexer import IndexInputs
from pallas_kernels.numerics import precision_of

ROWS = 16  # queries at once; their dot products should fit the cache
SAVED = "index_loss"


class _Part(NamedTuple):
    """Some queries: target [B, R, S], q [B, R, I, K], weights [B, R, I], mask [B, R, S]."""

    target: jax.Array
    q: jax.Array
    weights: jax.Array
    mask: jax.Array


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    dims = (((contract[0],), (contract[1],)), ((0,), (0,)))
    return lax.dot_general(
        a, b, dims, precision=precision_of(a.dtype), preferred_element_type=jnp.float32
    )


def _loss(part: _Part, k: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Loss, dot products [B, R, I, S] and log softmax of the scores [B, R, S]."""
    batch, rows, heads, dim = part.q.shape
    dots = _dot(part.q.reshape(batch, rows * heads, dim), k, (2, 2))
    dots = dots.reshape(batch, rows, heads, k.shape[1])
    scores = (jax.nn.relu(dots) * part.weights[..., None].astype(jnp.float32)).sum(2)
    log_model = jax.nn.log_softmax(jnp.where(part.mask, scores, jnp.finfo(jnp.float32).min))
    log_target = jnp.log(jnp.maximum(part.target, jnp.finfo(jnp.float32).tiny))
    loss = jnp.where(part.mask, part.target * (log_target - log_model), 0.0).sum()
    return loss, dots, log_model


def _loss_and_gradient(part: _Part, k: jax.Array):
    """Loss and its gradients with respect to q, weights and k; the last [B, K, S] float32."""
    loss, dots, log_model = _loss(part, k)
    batch, rows, heads, dim = part.q.shape
    target = jnp.where(part.mask, part.target, 0.0)
    d_scores = jnp.exp(log_model) * target.sum(-1, keepdims=True) - target
    d_scores = jnp.where(part.mask, d_scores, 0.0)
    # d loss / d (w relu(q k)) through the ReLU; the factor w is applied to the small arrays instead.
    active = jnp.where(dots > 0, d_scores[:, :, None], 0.0).astype(part.q.dtype)
    active = active.reshape(batch, rows * heads, -1)
    q, weights = part.q.astype(jnp.float32), part.weights[..., None].astype(jnp.float32)
    through = _dot(active, k, (2, 1)).reshape(q.shape)
    d_weights = (through * q).sum(-1)  # sum_s d_scores relu(q k) = q . sum_s active k
    weighted = (q * weights).astype(part.q.dtype).reshape(batch, rows * heads, dim)
    d_k = _dot(weighted, active, (1, 1))
    return loss, (through * weights).astype(part.q.dtype), d_weights, d_k


def _parts(target: jax.Array, index: IndexInputs, mask: jax.Array) -> _Part:
    """All queries, cut into parts along a new leading axis."""
    rows = ROWS if target.shape[1] % ROWS == 0 else target.shape[1]
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, rows, *x.shape[2:]), 1, 0),
        _Part(target, index.q, index.weights, mask),
    )


def _joined(x: jax.Array) -> jax.Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


@jax.custom_vjp
def indexer_kl(target: jax.Array, index: IndexInputs, mask: jax.Array) -> jax.Array:
    """Sum over queries of KL(target || softmax of index scores).

    The target is a constant to autodiff; detaching the indexer's inputs is the caller's duty, so that the two
    losses never mix.

    Args:
      target: [B, T, S] float32, head-mean attention probabilities.
      index: q [B, T, I, K], k [B, S, K], weights [B, T, I].
      mask: [B, T, S] keys over which both distributions live; an all-False row adds nothing.

    Returns:
      float32 scalar.
    """
    return lax.map(lambda part: _loss(part, index.k)[0], _parts(target, index, mask)).sum()


def _forward(target, index, mask):
    def body(d_k, part):
        loss, d_q, d_weights, d_k_part = _loss_and_gradient(part, index.k)
        return d_k + d_k_part, (loss, d_q, d_weights)

    batch, keys, dim = index.k.shape
    empty = jnp.zeros((batch, dim, keys), jnp.float32)
    d_k, (loss, d_q, d_weights) = lax.scan(body, empty, _parts(target, index, mask))
    gradient = IndexInputs(
        _joined(d_q),
        d_k.swapaxes(1, 2).astype(index.k.dtype),
        _joined(d_weights).astype(index.weights.dtype),
    )
    return loss.sum(), checkpoint_name(gradient, SAVED)


def _backward(gradient, d_loss):
    return (
        None,
        jax.tree.map(lambda g: (g.astype(jnp.float32) * d_loss).astype(g.dtype), gradient),
        None,
    )


indexer_kl.defvjp(_forward, _backward)
