"""Which parameters of the server's model distillation trains: all, the head, or low-rank additions.

The paper says "fine-tuning" and not which parameters (spec 1.2), so it is a choice.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fed.models import Model, Params


@dataclasses.dataclass(frozen=True)
class Trainable:
    """What is trained.

    Attributes:
      what: full; head (parameters whose first name is in the model's ``head``); lora (W + scale * A B for every matrix).
      rank: of lora.
      alpha: scale is alpha / rank.
    """

    what: str = "full"
    rank: int = 8
    alpha: float = 16.0

    def __post_init__(self) -> None:
        if self.what not in ("full", "head", "lora"):
            raise ValueError(f"trainable must be full, head or lora; got {self.what!r}.")
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1; got {self.rank}.")

    def __call__(self, trained: Params, base: Params) -> Params:
        """The model's parameters from the trained ones and those that stay."""
        if self.what == "full":
            return trained
        if self.what == "head":
            return {**base, **trained}
        leaves, structure = jax.tree.flatten(base)
        added = [
            leaf
            if pair is None
            else leaf + (self.alpha / self.rank * (pair["a"] @ pair["b"])).astype(leaf.dtype)
            for leaf, pair in zip(leaves, trained, strict=True)
        ]
        return jax.tree.unflatten(structure, added)

    def begin(self, model: Model, params: Params, key: Array) -> tuple[Params, Params]:
        """(trained, base): what distillation changes, and what it leaves alone.

        Raises:
          ValueError: if the model has no such parameters.
        """
        if self.what == "full":
            return params, {}
        if self.what == "head":
            names = [name for name in model.head if name in params]
            if not names:
                raise ValueError(
                    f"trainable='head' needs one of the parameters {model.head}; {model.name} has {sorted(params)}; name its "
                    "last block in Model.head."
                )
            return {k: v for k, v in params.items() if k in names}, {
                k: v for k, v in params.items() if k not in names
            }
        leaves = jax.tree.leaves(params)
        keys = jax.random.split(key, len(leaves))
        trained = [self._pair(leaf, k) for leaf, k in zip(leaves, keys, strict=True)]
        if not any(pair is not None for pair in trained):
            raise ValueError(
                f"trainable='lora' needs matrices with both sides above rank={self.rank}; {model.name} has none."
            )
        return trained, params

    def _pair(self, leaf: Array, key: Array) -> dict[str, Array] | None:
        if leaf.ndim < 2 or min(leaf.shape[-2:]) <= self.rank:
            return None
        *stack, inside, outside = leaf.shape
        scale = jnp.float32(inside) ** -0.5
        return {
            "a": scale * jax.random.normal(key, (*stack, inside, self.rank), jnp.float32),
            "b": jnp.zeros((*stack, self.rank, outside), jnp.float32),
        }
