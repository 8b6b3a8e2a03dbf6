"""The training loss: next token, token after next, balance, and the indexer's imitation of attention."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.config import ModelConfig
from jaxmoe.model import LayerStats, PassOptions, mtp_hidden, run, unembed
from jaxmoe.moe import options_on
from jaxmoe.params import Params
from jaxmoe.train.config import TrainConfig
from jaxmoe.train.data import Batch


def cross_entropy(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Negative log-likelihood of each target in nats, float32."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def _sum(stats: list[LayerStats], field: str) -> jax.Array:
    return sum((getattr(s, field).sum() for s in stats), jnp.zeros((), jnp.float32))


class Counts(NamedTuple):
    """What the means of a batch are over; float32 scalars, of a batch or summed over the batches of one step.

    Attributes:
      tokens: weights of the targets of the next token.
      tokens_mtp: weights of the targets two tokens on.
      queries: tokens that are no padding.
      sequences: rows with any such token.
    """

    tokens: jax.Array
    tokens_mtp: jax.Array
    queries: jax.Array
    sequences: jax.Array


def as_batch(rows: Batch | jax.Array, size: int) -> Batch:
    """Plain rows of tokens [B, W] as documents of their own, of which those beyond ``size`` are padding."""
    if isinstance(rows, Batch):
        return rows
    real = jnp.arange(len(rows), dtype=jnp.int32) < size
    weights = jnp.broadcast_to(real[:, None], rows.shape).astype(jnp.float32)
    return Batch(rows, jnp.zeros(rows.shape, jnp.int32), weights)


def target_weights(batch: Batch, ahead: int) -> Float[Array, "B T"]:
    """How much the token ``ahead`` of each query counts: its weight, in the query's own document."""
    end = batch.tokens.shape[1] - 2
    starts, weights = (x[:, ahead : end + ahead] for x in (batch.starts, batch.weights))
    return jnp.where(starts == batch.starts[:, :end], weights, 0.0)


def is_token(batch: Batch) -> Bool[Array, "B W"]:
    """False for padding: rows in which nothing counts, and documents of one token that does not."""
    place = jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)[None]
    begins = batch.starts == place
    ends = jnp.pad(begins[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    counts = batch.weights > 0
    return counts.any(1, keepdims=True) & ~(begins & ends & ~counts)


def counts_of(batch: Batch) -> Counts:
    """A batch's ``Counts``; those of several batches add up."""
    queries = is_token(batch)[:, :-2]
    return Counts(
        target_weights(batch, 1).sum(),
        target_weights(batch, 2).sum(),
        queries.sum().astype(jnp.float32),
        queries.any(1).sum().astype(jnp.float32),
    )


def pass_options(
    config: ModelConfig, train_config: TrainConfig, mesh: Mesh | None = None
) -> PassOptions:
    """How the training pass is computed; on a mesh, experts exchange tokens over its "expert" axis."""
    moe = options_on(mesh, fp8=train_config.fp8)
    index_loss = config.index_topk is not None and train_config.index_weight > 0
    c = train_config
    return PassOptions(c.attention, index_loss, moe, c.remat, remat_moe=c.remat_moe)


def loss(
    params: Params,
    config: ModelConfig,
    train_config: TrainConfig,
    rows: Batch | Int[Array, "B W"],
    mesh: Mesh | None = None,
    counts: Counts | None = None,
) -> tuple[Float[Array, ""], dict]:
    """Total loss and its parts on rows of ``seq_len + 2`` tokens.

    A target counts by its weight, and only in its query's document; means are over the sum of what counts. With the ``counts``
    of all batches of one step, each batch gives its share: values and gradients of the batches then add up to the step's.

    The indexer learns to imitate the attention in use (KL on detached inputs): dense attention over all visible keys, or in
    the sparse stages over those that it selected (spec 4.1). It has no other loss, and the model none of the indexer's: the
    two gradients touch disjoint parameters.

    Args:
      params: parameters.
      config: the model.
      train_config: the run; its stage decides which losses count.
      rows: a ``Batch``; or plain tokens, a document per row, where rows beyond ``train_config.batch_size`` are padding.
      mesh: the devices.
      counts: what the means are over; default this batch's.

    Returns:
      (total, aux): total in nats; aux has float32 scalars "loss" (nats per token), "mtp_loss", "balance_loss", "index_loss"
      (nats per query and layer with an indexer), and "load", the choices per expert of every MoE layer, in the structure that
      ``step.update_biases`` reads.
    """
    c, options = train_config, pass_options(config, train_config, mesh)
    batch = as_batch(rows, c.batch_size)
    counts = counts_of(batch) if counts is None else counts
    at_least_one = jax.tree.map(lambda n: jnp.maximum(n, jnp.finfo(jnp.float32).tiny), counts)
    tokens, length = batch.tokens, batch.tokens.shape[1] - 2
    starts = batch.starts[:, :length] if isinstance(rows, Batch) else None
    seen = {"starts": starts, "valid": is_token(batch)[:, :length]}

    def mean(hidden: jax.Array, ahead: int, total: jax.Array) -> jax.Array:
        nats = cross_entropy(unembed(params, hidden), tokens[:, ahead : length + ahead])
        weights = target_weights(batch, ahead)
        return jnp.where(weights > 0, nats * weights, 0.0).sum() / total

    output = run(params, config, tokens[:, :length], options=options, **seen)
    lm = mean(output.hidden, 1, at_least_one.tokens)
    stats = [s for segment in output.stats for s in segment]
    mtp, hidden, mtp_stats = jnp.zeros((), jnp.float32), output.hidden, []
    # With one module (the released depth) this is the report's loss; deeper ones would shift by one more each.
    for module in params.get("mtp", [])[:1]:
        following = tokens[:, 1 : length + 1]
        hidden, module_stats = mtp_hidden(
            module, params, config, hidden, following, options=options, **seen
        )
        mtp = mtp + mean(hidden, 2, at_least_one.tokens_mtp)
        mtp_stats.append(module_stats)
    every = [*stats, *mtp_stats]
    kinds = (*config.layer_kinds, *[config.mtp_kind] * len(mtp_stats))
    layers = max(1, sum(kind.indexer == "full" for kind in kinds))
    # A mean over sequences, where padding counts as zero.
    balance = _sum(every, "balance_loss") * (len(tokens) / at_least_one.sequences)
    index = _sum(every, "index_loss") / (layers * at_least_one.queries)
    total = c.index_weight * index
    if c.trains_model:
        total = total + lm + c.mtp_weight * mtp + c.balance_weight * balance
    aux = {
        "loss": lm,
        "mtp_loss": mtp,
        "balance_loss": balance,
        "index_loss": index,
        "load": {
            "segments": [[s.load for s in segment] for segment in output.stats],
            "mtp": [s.load for s in mtp_stats],
        },
    }
    return total, aux
