"""Outputs of what clients sent, on proxy inputs; models are dropped once they have answered (spec 5.4)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from fed.cohort import Cohort
from fed.distill import outputs
from fed.models import Model, Params


@struct.dataclass
class Answers:
    """Members' outputs.

    Attributes:
      logits: [m, M, ..., C].
      sizes: examples that each member was trained on [m].
      counts: examples per class [m, C].
    """

    logits: Array
    sizes: Float[Array, " m"]
    counts: Float[Array, "m C"]


def trained(
    start: Params, cohort: Cohort, rows: np.ndarray | None = None
) -> tuple[Params, np.ndarray]:
    """Parameters of the clients whose update was accepted, stacked, and their numbers.

    Args:
      start: what they began with; with ``rows`` stacked.
      cohort: their updates, kept.
      rows: place in ``start`` of each of the cohort's clients.
    """
    good = np.flatnonzero(cohort.accepted)
    if rows is None:
        models = jax.tree.map(lambda p, u: p[None] + u[good].astype(p.dtype), start, cohort.updates)
    else:
        models = jax.tree.map(
            lambda p, u: p[rows[good]] + u[good].astype(p.dtype), start, cohort.updates
        )
    return models, cohort.clients[good]


def of_clients(
    models: Sequence[Model],
    members: Sequence[tuple[Params, np.ndarray]],
    inputs: Array,
    sizes: np.ndarray,
    counts: np.ndarray,
) -> Answers:
    """Answers of single clients, all architectures together.

    Args:
      models: architectures.
      members: of each architecture (stacked parameters, client numbers).
      inputs: proxy inputs.
      sizes: examples of all clients [N].
      counts: label histogram of all clients [N, C].
    """
    logits = [
        outputs(params, inputs, model=model, many=True)[0]
        for model, (params, clients) in zip(models, members, strict=True)
        if len(clients)
    ]
    who = np.concatenate([clients for _, clients in members])
    return Answers(
        jnp.concatenate(logits),
        jnp.asarray(sizes[who], jnp.float32),
        jnp.asarray(counts[who], jnp.float32),
    )


def of_clusters(
    models: Sequence[Model],
    small: Sequence[Params],
    inputs: Array,
    sizes: np.ndarray,
    counts: np.ndarray,
) -> Answers:
    """Answers of one model per architecture.

    Args:
      models: architectures.
      small: parameters of each.
      inputs: proxy inputs.
      sizes: examples that stand behind each [A]; an architecture of which nobody ever replied has 0 and no say.
      counts: label histogram of those [A, C].
    """
    known = np.flatnonzero(sizes > 0)
    logits = [outputs(small[a], inputs, model=models[a])[0] for a in known]
    return Answers(
        jnp.stack(logits),
        jnp.asarray(sizes[known], jnp.float32),
        jnp.asarray(counts[known], jnp.float32),
    )
