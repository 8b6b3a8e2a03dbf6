"""The training loss: next token, token after next, balance, and the indexer's imitation of attention."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.config import ModelConfig
from jaxmoe.model import LayerStats, PassOptions, mtp_hidden, run, unembed
from jaxmoe.params import Params
from jaxmoe.train.config import TrainConfig


def cross_entropy(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Negative log-likelihood of each target in nats, float32."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def _sum(stats: list[LayerStats], field: str) -> jax.Array:
    return sum((getattr(s, field).sum() for s in stats), jnp.zeros((), jnp.float32))


def loss(
    params: Params, config: ModelConfig, train_config: TrainConfig, tokens: Int[Array, "B W"]
) -> tuple[Float[Array, ""], dict]:
    """Total loss and its parts on windows of ``seq_len + 2`` tokens.

    The model attends densely and the indexer learns to imitate it (KL over all visible keys, on detached inputs);
    the two gradients touch disjoint parameters. Evaluation and inference attend sparsely.

    Returns:
      (total, aux): aux has float32 scalars "loss" (nats per token), "mtp_loss", "balance_loss", "index_loss"
      (nats per query and layer), and "load", the choices per expert of every MoE layer, in the structure that
      ``step.update_biases`` reads.
    """
    options = PassOptions(attention="dense", index_loss=config.index_topk is not None, remat=train_config.remat)
    inputs, targets, targets_mtp = tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:]
    output = run(params, config, inputs, options=options)
    lm = cross_entropy(unembed(params, output.hidden), targets).mean()
    stats = [s for segment in output.stats for s in segment]
    mtp, hidden, mtp_stats = jnp.zeros((), jnp.float32), output.hidden, []
    # With one module (the released depth) this is the report's loss; deeper ones would shift by one more each.
    for module in params.get("mtp", [])[:1]:
        hidden, module_stats = mtp_hidden(module, params, config, hidden, targets, options=options)
        mtp = mtp + cross_entropy(unembed(params, hidden), targets_mtp).mean()
        mtp_stats.append(module_stats)
    every = [*stats, *mtp_stats]
    layers = config.num_hidden_layers + len(mtp_stats)
    balance = _sum(every, "balance_loss")
    index = _sum(every, "index_loss") / (layers * inputs.size)
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
