"""Accuracy on held-out examples: over all of them, and as each client would see it with its own mix of labels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fed.data import Dataset
from fed.models import Model, Params


@functools.partial(jax.jit, static_argnames=("model", "classes", "many", "block"))
def _hits(
    params: Params, inputs: Array, labels: Array, *, model: Model, classes: int, many: bool, block: int
) -> Float[Array, "*m C"]:
    """Right answers per class."""
    rows = inputs.shape[0]
    padded = -(-rows // block) * block

    def blocks(x: Array, fill: int) -> Array:
        more = jnp.full((padded - rows, *x.shape[1:]), fill, x.dtype)
        return jnp.concatenate([x, more]).reshape(-1, block, *x.shape[1:])

    # A padded row has the label -1, which no answer equals.
    cut = (blocks(inputs, 0), blocks(labels, -1))

    def one(params: Params) -> Array:
        def count(part: tuple[Array, Array]) -> Array:
            answers = jnp.argmax(model.apply(params, part[0]), axis=-1).astype(jnp.int32)
            right = (answers == part[1]).reshape(-1)
            where = jnp.where(right, part[1].reshape(-1), classes)
            return jnp.zeros(classes + 1, jnp.float32).at[where].add(1.0)[:classes]

        return jnp.sum(jax.lax.map(count, cut), axis=0)

    return jax.lax.map(one, params) if many else one(params)


class Evaluation:
    """Held-out examples on the device, with the label mixes of the clients.

    Args:
      data: the examples.
      histogram: examples per client and class [N, C].
      block: examples at a time.
    """

    def __init__(self, data: Dataset, histogram: np.ndarray, block: int = 512):
        self._inputs, self._labels = jnp.asarray(data.inputs), jnp.asarray(data.labels)
        self._block = min(block, len(data))
        self._classes = data.classes
        self._totals = np.bincount(data.labels.reshape(-1), minlength=data.classes)
        known = histogram * (self._totals > 0)
        self._mixes = known / np.maximum(known.sum(1, keepdims=True), 1)
        self._counted = known.sum(1) > 0

    def hits(self, model: Model, params: Params, *, many: bool = False) -> np.ndarray:
        """Right answers per class, of one model [C] or of each of a stack [m, C]."""
        found: Any = _hits(
            params,
            self._inputs,
            self._labels,
            model=model,
            classes=self._classes,
            many=many,
            block=self._block,
        )
        return np.asarray(found)

    def accuracy(self, hits: np.ndarray) -> np.ndarray:
        """Share of right answers."""
        return hits.sum(-1) / self._totals.sum()

    def own(self, hits: np.ndarray, clients: np.ndarray) -> np.ndarray:
        """Accuracy on each client's mix of labels: of one model's hits [C], or of each client's own [K, C]; clients without data left out."""
        rates = hits / np.maximum(self._totals, 1)
        found = (self._mixes[clients] * rates).sum(-1)
        return found[self._counted[clients]]


def worst(values: np.ndarray, share: float = 0.1) -> float:
    """Mean of the lowest ``share`` of the values, of one at least."""
    if not len(values):
        return float("nan")
    count = max(1, int(np.ceil(share * len(values))))
    return float(np.sort(values)[:count].mean())
