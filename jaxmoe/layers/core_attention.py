"""Core attention over a whole sequence, all pairs of positions: dense, or masked to what the indexer selects.

Long sequences of which few keys are selected take ``sparse_attention`` instead.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxmoe.layers.index_loss import SAVED as INDEX_SAVED
from jaxmoe.layers.index_loss import indexer_kl
from jaxmoe.layers.indexer import IndexInputs
from pallas_kernels.index_topk import index_scores, select_mask
from pallas_kernels.numerics import precision_of

QUERY_BLOCK = 128  # rows of the [queries, keys] matrices that exist at once
MAX_GROUPS = 8  # groups of query blocks with a static key length each, so that causality saves work

# Residuals that rematerialised layers keep (jax.ad_checkpoint names).
SAVED = ("core_attention", INDEX_SAVED)


class Options(NamedTuple):
    """Static choices of a causal attention call.

    Attributes:
      scale: softmax scale.
      topk: keys each query may attend to, chosen by the index scores; None for all visible ones.
      index_loss: also compute the indexer's KL loss against this attention.
      keep_selection: also return the selection, for later layers that share it.
      recall_topk: also measure which share of this attention falls on so many keys of best score; with topk None.
    """

    scale: float
    topk: int | None = None
    index_loss: bool = False
    keep_selection: bool = False
    recall_topk: int | None = None


class Result(NamedTuple):
    """What the core gives.

    Attributes:
      out: [B, T, H, V].
      selection: None; [B, T, T] bool; or, of ``sparse_attention``, rows [B, T, topk] int32, -1 for none.
      index_loss: float32 scalar, summed over queries.
      recall: float32 [3] or None: attention inside the recall_topk keys of best score, and inside those of most attention, which is
        the most that any choice keeps; summed over the queries that see more keys than that; and the number of those queries.
    """

    out: jax.Array
    selection: jax.Array | None
    index_loss: jax.Array
    recall: jax.Array | None = None


class _Operands(NamedTuple):
    """Head-major operands, queries padded to whole blocks; P is the padded and T the true length."""

    q: jax.Array  # [B, G, M, P, K]
    k: jax.Array  # [B, G, T, K]
    v: jax.Array  # [B, G, T, V]
    index: IndexInputs | None  # q [B, P, I, K], k [B, T, K], weights [B, P, I]
    selection: jax.Array | None  # [B, P, T]
    starts: jax.Array | None  # [B, P]
    valid: jax.Array | None  # [B]


def _pad(x: jax.Array, axis: int, size: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def _logits(q: jax.Array, k: jax.Array, mask: jax.Array, scale: float) -> jax.Array:
    """float32 [B, G, M, T, S]: q [B, G, M, T, K] over k [B, G, S, K], masked by [B, T, S]."""
    logits = jnp.einsum(
        "bgmtk,bgsk->bgmts",
        q,
        k,
        precision=precision_of(q.dtype),
        preferred_element_type=jnp.float32,
    )
    return jnp.where(mask[:, None, None], logits * jnp.float32(scale), jnp.finfo(jnp.float32).min)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _softmax_block(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float, want_mean: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Attention of q [B, G, M, T, K] over k, v [B, G, S, .], mask [B, T, S].

    Returns:
      out [B, G, M, T, V]; and, if wanted, the mean probabilities over heads [B, T, S], a constant to autodiff.
    """
    return _softmax_block_forward(q, k, v, mask, scale, want_mean)[0]


def _softmax_block_forward(q, k, v, mask, scale, want_mean):
    logits = _logits(q, k, mask, scale)
    peak = logits.max(-1, keepdims=True)
    weight = jnp.exp(logits - peak)
    total = weight.sum(-1, keepdims=True)
    probabilities = weight / total
    out = jnp.einsum(
        "bgmts,bgsv->bgmtv",
        probabilities.astype(v.dtype),
        v,
        precision=precision_of(q.dtype),
        preferred_element_type=jnp.float32,
    ).astype(q.dtype)
    mean = probabilities.mean((1, 2)) if want_mean else None
    # A query without keys: probabilities of zero in the backward pass, hence no gradient.
    lse = jnp.where(peak > jnp.finfo(jnp.float32).min, jnp.log(total) + peak, jnp.inf)
    out, lse = checkpoint_name((out, lse), SAVED[0])
    return (out, mean), (q, k, v, mask, out, lse)


def _softmax_block_backward(scale, want_mean, residuals, cotangents):
    q, k, v, mask, out, lse = residuals
    dy = cotangents[0]
    einsum = functools.partial(
        jnp.einsum, precision=precision_of(q.dtype), preferred_element_type=jnp.float32
    )
    p = jnp.exp(_logits(q, k, mask, scale) - lse)
    # sum_s p dp, without a pass over [queries, keys] (as flash attention does).
    delta = (dy.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    dl = (p * (einsum("bgmtv,bgsv->bgmts", dy, v) - delta) * jnp.float32(scale)).astype(q.dtype)
    dq = einsum("bgmts,bgsk->bgmtk", dl, k)
    # Products over queries take the [queries, keys] matrix on the right: on the left XLA:CPU would transpose it.
    # The barrier keeps it from moving the small transpose back into the product.
    dk = lax.optimization_barrier(einsum("bgmtk,bgmts->bgks", q, dl)).swapaxes(2, 3)
    dv = lax.optimization_barrier(einsum("bgmtv,bgmts->bgvs", dy, p.astype(v.dtype))).swapaxes(2, 3)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_softmax_block.defvjp(_softmax_block_forward, _softmax_block_backward)


def _recall(mean: jax.Array, scores: jax.Array, counted: jax.Array, topk: int) -> jax.Array:
    """``Result.recall`` of a block: mean probabilities and scores (-inf where not visible) [B, T, S], counted [B, T] or [1, T]."""
    visible = scores > -jnp.inf
    counted = counted & (visible.sum(-1) > topk)

    def kept(by: jax.Array) -> jax.Array:
        inside = jnp.where(select_mask(by, topk), mean, 0.0).sum(-1)
        return jnp.where(counted, inside, 0.0).sum()

    best = kept(jnp.where(visible, mean, -jnp.inf))
    return jnp.stack([kept(scores), best, counted.sum().astype(jnp.float32)])


def _block(
    x: _Operands, options: Options, start: jax.Array | int, rows: int, length: int
) -> tuple[jax.Array, jax.Array | None, jax.Array, jax.Array | None]:
    """Queries [start, start + rows) against keys [0, length): out, selection, loss, recall."""
    batch = x.q.shape[0]
    some = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=rows)
    q = some(x.q, axis=3)
    position = start + jnp.arange(rows, dtype=jnp.int32)
    key = jnp.arange(length, dtype=jnp.int32)
    visible = key[None] <= position[:, None]
    mask = jnp.broadcast_to(visible[None], (batch, rows, length))
    if x.starts is not None:
        mask = mask & (key[None, None] >= some(x.starts, axis=1)[..., None])
    index, scores = None, None
    if x.index is not None:
        index = IndexInputs(
            some(x.index.q, axis=1), x.index.k[:, :length], some(x.index.weights, axis=1)
        )
    selects = x.selection is None and options.topk is not None and options.topk < length
    if index is not None and (selects or options.recall_topk is not None):
        scores = lax.stop_gradient(index_scores(*index))
        scores = jnp.where(mask, scores, -jnp.inf)
    if x.selection is not None:
        mask = mask & some(x.selection, axis=1)[:, :, :length]
    elif selects and scores is not None:
        mask = select_mask(scores, options.topk)
    want_mean = options.index_loss or options.recall_topk is not None
    with jax.named_scope("core"):
        out, mean = _softmax_block(
            q, x.k[:, :, :length], x.v[:, :, :length], mask, options.scale, want_mean
        )
    loss, recall = jnp.zeros((), jnp.float32), None
    real = (position < x.k.shape[2])[None]  # padding rows are no queries
    if x.valid is not None:
        real = real & x.valid[:, None]
    if options.index_loss and index is not None:
        with jax.named_scope("index_loss"):
            loss = indexer_kl(mean, index, mask & real[..., None])
    if options.recall_topk is not None:
        recall = jnp.zeros(3, jnp.float32)
        if scores is not None:
            recall = _recall(mean, scores, real, options.recall_topk)
    return out, mask if options.keep_selection else None, loss, recall


def _group(x: _Operands, options: Options, first: int, count: int, rows: int) -> Result:
    """``count`` blocks of ``rows`` queries from block ``first``, with one static key length."""
    tokens = x.k.shape[2]
    length = min((first + count) * rows, tokens)
    if count == 1:
        out, mask, loss, recall = _block(x, options, first * rows, rows, length)
    else:
        out, mask, loss, recall = lax.map(
            lambda i: _block(x, options, i * rows, rows, length), first + jnp.arange(count)
        )
        out = jnp.moveaxis(out, 0, 3)
        out = out.reshape(*out.shape[:3], count * rows, out.shape[-1])
        if mask is not None:
            mask = jnp.moveaxis(mask, 0, 1).reshape(out.shape[0], count * rows, length)
        loss = loss.sum()
        recall = None if recall is None else recall.sum(0)
    return Result(out, None if mask is None else _pad(mask, 2, tokens), loss, recall)


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    options: Options,
    *,
    index: IndexInputs | None = None,
    selection: jax.Array | None = None,
    starts: jax.Array | None = None,
    valid: jax.Array | None = None,
) -> Result:
    """Causal softmax attention in query blocks: memory is one block of rows times the keys before it.

    Args:
      q: [B, T, H, K].
      k: [B, T, G, K], H a multiple of G.
      v: [B, T, G, V].
      options: static choices.
      index: this layer's indexer inputs, if it has an indexer.
      selection: [B, T, T] bool, an earlier layer's selection to reuse instead of selecting.
      starts: [B, T] int32, first key that each query may see; default 0.
      valid: [B] bool, sequences that count in the index loss and recall; default all.

    Returns:
      ``Result``.
    """
    batch, tokens, heads, _ = q.shape
    groups = k.shape[2]
    rows = min(QUERY_BLOCK, tokens)
    blocks = -(-tokens // rows)
    padded = blocks * rows
    q = _pad(q, 1, padded).reshape(batch, padded, groups, heads // groups, q.shape[-1])
    if index is not None:
        index = IndexInputs(_pad(index.q, 1, padded), index.k, _pad(index.weights, 1, padded))
    selection = None if selection is None else _pad(selection, 1, padded)
    starts = None if starts is None else _pad(starts, 1, padded)
    heads_first = q.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2)
    operands = _Operands(*heads_first, index, selection, starts, valid)
    step = -(-blocks // MAX_GROUPS)
    parts = [
        _group(operands, options, first, min(step, blocks - first), rows)
        for first in range(0, blocks, step)
    ]
    out = jnp.concatenate([part.out for part in parts], axis=3)[:, :, :, :tokens]
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, tokens, heads, v.shape[-1])
    chosen = None
    if options.keep_selection:
        chosen = jnp.concatenate([part.selection for part in parts], axis=1)[:, :tokens]
    loss = sum((part.index_loss for part in parts), jnp.zeros((), jnp.float32))
    recall = None
    if options.recall_topk is not None:
        recall = sum((part.recall for part in parts), jnp.zeros(3, jnp.float32))
    return Result(out, chosen, loss, recall)
