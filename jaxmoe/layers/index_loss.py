"""The indexer's training loss: how far softmax(index scores) is from the attention it should imitate (spec 4.1).

Loss and gradient are computed together, some queries at a time: the per-head dot products [queries, index heads,
keys] are the largest array of training, and exist for ``ROWS`` queries only (for all, if their number is not a
multiple of that, which a whole block of queries is).

Over the selected keys of the sparse stage the same is done with keys that are gathered per query (``selected_kl``): no
array has a row of all keys.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxmoe.layers.indexer import IndexInputs
from pallas_kernels.numerics import precision_of
from pallas_kernels.sparse_mla import addresses, chunks

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


# -- over selected keys ------------------------------------------------------------------------------


def _target(q, rows, lse, valid, scale, heads_axis) -> jax.Array:
    """Head-mean probabilities [Q, K] of q [Q, H, C] over rows [Q, K, C], whose softmax has the log denominators ``lse`` [Q, H]."""
    logits = _dot(q, rows, (2, 2)) * jnp.float32(scale)
    weight = jnp.where(valid[:, None], jnp.exp(logits - lse[..., None]), 0.0)
    mean = weight.mean(1)
    return mean if heads_axis is None else lax.pmean(mean, heads_axis)


def _over_chunks(body, start, operands, scale, heads_axis):
    """Folds ``body(carry, part [Q, 1, ...], keys [Q, K, D], addresses [Q, K])`` over some of ``selected_kl``'s queries at a time."""
    q, kv, lse, index, rows = operands
    latents, keys = addresses.of_sequences(kv, rows), addresses.of_sequences(index.k, rows)
    flat = [x.reshape(-1, *x.shape[2:]) for x in (q, lse, index.q, index.weights)]

    def chunk(carry, arrays):
        address, q, lse, index_q, weights = arrays
        valid, place = address >= 0, jnp.maximum(address, 0)
        mine = latents.cached.at[place].get(mode="promise_in_bounds")
        target = _target(q, mine, lse, valid, scale, heads_axis)
        some = keys.cached.at[place].get(mode="promise_in_bounds")
        part = _Part(target[:, None], index_q[:, None], weights[:, None], valid[:, None])
        return body(carry, part, some, address)

    width = kv.shape[2] + index.k.shape[2] + q.shape[2] + 2 * index.q.shape[2]
    size = chunks.size(len(flat[0]), 4 * rows.shape[2] * width)
    return chunks.scan(chunk, start, (latents.address, *flat), (-1, 0, 0, 0, 0), size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def selected_kl(
    q: jax.Array,
    kv: jax.Array,
    lse: jax.Array,
    index: IndexInputs,
    rows: jax.Array,
    scale: float,
    heads_axis: str | None = None,
) -> jax.Array:
    """Sum over queries of KL(head-mean attention || softmax of index scores), both over the selected keys (spec 4.1).

    The attention is the one in use: its probabilities are made again from ``lse`` for some queries at a time, so memory is
    T * topk at most. As in ``indexer_kl`` only the index gets a gradient.

    Args:
      q: [B, T, H, C] absorbed queries.
      kv: [B, S, C] latent rows.
      lse: [B, T, H] float32, log denominators of the attention over ``rows``.
      index: q [B, T, I, K], k [B, S, K], weights [B, T, I].
      rows: [B, T, topk] int32, distinct; -1 for none.
      scale: softmax scale.
      heads_axis: mesh axis over which further heads lie, inside a ``shard_map``.

    Returns:
      float32 scalar.
    """

    def body(total, part, keys, address):
        del address
        return total + _loss(part, keys)[0], None

    operands = (q, kv, lse, index, rows)
    return _over_chunks(body, jnp.zeros((), jnp.float32), operands, scale, heads_axis)[0]


def _selected_forward(q, kv, lse, index, rows, scale, heads_axis):
    batch, length, dim = index.k.shape

    def body(carry, part, keys, address):
        total, d_k = carry
        loss, d_q, d_weights, d_keys = _loss_and_gradient(part, keys)
        # An address past the end drops what would else be added to the last row.
        place = jnp.where(address >= 0, address, len(d_k))
        d_k = d_k.at[place].add(d_keys.swapaxes(1, 2), mode="drop")
        return (total + loss, d_k), (d_q[:, 0], d_weights[:, 0])

    start = jnp.zeros((), jnp.float32), jnp.zeros((batch * length, dim), jnp.float32)
    operands = (q, kv, lse, index, rows)
    (total, d_k), (d_q, d_weights) = _over_chunks(body, start, operands, scale, heads_axis)
    gradient = IndexInputs(
        d_q.reshape(index.q.shape),
        d_k.reshape(index.k.shape).astype(index.k.dtype),
        d_weights.reshape(index.weights.shape).astype(index.weights.dtype),
    )
    return total, checkpoint_name(gradient, SAVED)


def _selected_backward(scale, heads_axis, gradient, d_loss):
    index = jax.tree.map(lambda g: (g.astype(jnp.float32) * d_loss).astype(g.dtype), gradient)
    return None, None, None, index, None


selected_kl.defvjp(_selected_forward, _selected_backward)
