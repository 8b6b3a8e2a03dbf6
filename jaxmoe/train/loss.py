"""The training loss: next token, token after next, balance, and the indexer's imitation of attention."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxmoe.config import ModelConfig
from jaxmoe.model import LayerStats, PassOptions, mtp_hidden, run, unembed
from jaxmoe.moe import MoeOptions
from jaxmoe.params import Params
from jaxmoe.train.config import TrainConfig


def cross_entropy(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Negative log-likelihood of each target in nats, float32."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def _sum(stats: list[LayerStats], field: str) -> jax.Array:
    return sum((getattr(s, field).sum() for s in stats), jnp.zeros((), jnp.float32))


def pass_options(
    config: ModelConfig, train_config: TrainConfig, mesh: Mesh | None = None
) -> PassOptions:
    """How the training pass is computed; on a mesh, experts exchange tokens over its "expert" axis."""
    moe = MoeOptions() if mesh is None else MoeOptions("all_to_all", mesh)
    index_loss = config.index_topk is not None and train_config.index_weight > 0
    return PassOptions("dense", index_loss, moe, train_config.remat)


def loss(
    params: Params,
    config: ModelConfig,
    train_config: TrainConfig,
    tokens: Int[Array, "B W"],
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], dict]:
    """Total loss and its parts on windows of ``seq_len + 2`` tokens.

    Windows beyond ``train_config.batch_size`` are padding, with which a batch divides over the mesh; nothing of them counts.

    The model attends densely and the indexer learns to imitate it (KL over all visible keys, on detached inputs);
    the two gradients touch disjoint parameters. Evaluation and inference attend sparsely.

    Returns:
      (total, aux): total in nats; aux has float32 scalars "loss" (nats per token), "mtp_loss", "balance_loss", "index_loss"
      (nats per query and layer with an indexer), and "load", the choices per expert of every MoE layer, in the structure that
      ``step.update_biases`` reads.
    """
    options = pass_options(config, train_config, mesh)
    inputs, targets, targets_mtp = tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:]
    rows, size = len(tokens), min(len(tokens), train_config.batch_size)
    valid = None if rows == size else jnp.arange(rows, dtype=jnp.int32) < size

    def mean(nats: jax.Array) -> jax.Array:
        counted = nats if valid is None else jnp.where(valid[:, None], nats, 0.0)
        return counted.mean() * (rows / size)

    output = run(params, config, inputs, valid=valid, options=options)
    lm = mean(cross_entropy(unembed(params, output.hidden), targets))
    stats = [s for segment in output.stats for s in segment]
    mtp, hidden, mtp_stats = jnp.zeros((), jnp.float32), output.hidden, []
    # With one module (the released depth) this is the report's loss; deeper ones would shift by one more each.
    for module in params.get("mtp", [])[:1]:
        hidden, module_stats = mtp_hidden(
            module, params, config, hidden, targets, valid=valid, options=options
        )
        mtp = mtp + mean(cross_entropy(unembed(params, hidden), targets_mtp))
        mtp_stats.append(module_stats)
    every = [*stats, *mtp_stats]
    kinds = (*config.layer_kinds, *[config.mtp_kind] * len(mtp_stats))
    layers = max(1, sum(kind.indexer == "full" for kind in kinds))
    balance = _sum(every, "balance_loss") * (
        rows / size
    )  # a mean over sequences, where padding counts as zero
    index = _sum(every, "index_loss") / (layers * size * inputs.shape[1])
    c = train_config
    total = lm + c.mtp_weight * mtp + c.balance_weight * balance + c.index_weight * index
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
