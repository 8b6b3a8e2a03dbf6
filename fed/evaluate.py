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
    params: Params,
    inputs: Array,
    labels: Array,
    parts: Array,
    *,
    model: Model,
    classes: int,
    many: bool,
    block: int,
) -> Float[Array, "*m 2 C"]:
    """Right answers per part and class."""
    rows = inputs.shape[0]
    padded = -(-rows // block) * block

    def blocks(x: Array, fill: int) -> Array:
        more = jnp.full((padded - rows, *x.shape[1:]), fill, x.dtype)
        return jnp.concatenate([x, more]).reshape(-1, block, *x.shape[1:])

    # A padded row has the label -1, which no answer equals.
    cut = (blocks(inputs, 0), blocks(labels, -1), blocks(parts, 0))

    def one(params: Params) -> Array:
        def count(rows: tuple[Array, Array, Array]) -> Array:
            x, y, part = rows
            answers = jnp.argmax(model.apply(params, x), axis=-1).astype(jnp.int32)
            place = jnp.broadcast_to(part.reshape(-1, *[1] * (y.ndim - 1)), y.shape) * classes + y
            where = jnp.where(answers == y, place, 2 * classes).reshape(-1)
            return jnp.zeros(2 * classes + 1, jnp.float32).at[where].add(1.0)[:-1]

        return jnp.sum(jax.lax.map(count, cut), axis=0).reshape(2, classes)

    return jax.lax.map(one, params) if many else one(params)


class Evaluation:
    """Held-out examples on the device: a test part for reports, a validation part for choices, and the label mixes of the clients.

    Args:
      test: examples of the one.
      validation: of the other.
      histogram: examples per client and class [N, C].
      block: examples at a time.
    """

    def __init__(self, test: Dataset, validation: Dataset, histogram: np.ndarray, block: int = 512):
        self._inputs = jnp.asarray(np.concatenate([test.inputs, validation.inputs]))
        self._labels = jnp.asarray(np.concatenate([test.labels, validation.labels]))
        self._parts = jnp.asarray(np.repeat(np.int32([0, 1]), [len(test), len(validation)]))
        self._block = min(block, len(self._inputs))
        self._classes = test.classes
        counted = [
            np.bincount(d.labels.reshape(-1), minlength=test.classes) for d in (test, validation)
        ]
        self._totals = np.stack(counted)
        known = histogram * (self._totals[0] > 0)
        self._mixes = known / np.maximum(known.sum(1, keepdims=True), 1)
        self._counted = known.sum(1) > 0

    def hits(self, model: Model, params: Params, *, many: bool = False) -> np.ndarray:
        """Right answers per part (test, validation) and class, of one model [2, C] or of each of a stack [m, 2, C]."""
        found: Any = _hits(
            params,
            self._inputs,
            self._labels,
            self._parts,
            model=model,
            classes=self._classes,
            many=many,
            block=self._block,
        )
        return np.asarray(found)

    def accuracy(self, hits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shares of right answers: test, validation."""
        shares = hits.sum(-1) / np.maximum(self._totals.sum(-1), 1)
        return shares[..., 0], shares[..., 1]

    def own(self, hits: np.ndarray, clients: np.ndarray) -> np.ndarray:
        """Test accuracy on each client's mix of labels; clients without data are left out.

        Args:
          hits: of one model [2, C], or of each client's own [K, 2, C].
          clients: their numbers [K].
        """
        rates = hits[..., 0, :] / np.maximum(self._totals[0], 1)
        return (self._mixes[clients] * rates).sum(-1)[self._counted[clients]]


def worst(values: np.ndarray, share: float = 0.1) -> float:
    """Mean of the lowest ``share`` of the values, of one at least."""
    if not len(values):
        return float("nan")
    count = max(1, int(np.ceil(share * len(values))))
    return float(np.sort(values)[:count].mean())
