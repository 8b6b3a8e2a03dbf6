"""Which parameters of the server's model distillation trains: all, the head, or low-rank additions.

The paper says "fine-tuning" and not which parameters (spec 1.2), so it is a choice.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fed.models import Model, Params
from quant.rules import DEFAULT_RULES, name_of, rule_for
from quant.tensor import Layout


@dataclasses.dataclass(frozen=True)
class Trainable:
    """What is trained.

    Attributes:
      what: full; head (parameters whose first name is in the model's ``head``); lora (W + scale * A B for every matrix: [in, out], or as
        ``quant.rules`` has the axes of jaxmoe's parameters).
      rank: of lora.
      alpha: scale is alpha / rank.

    Raises:
      ValueError: for another name, or a rank below one.
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
        leaves, structure = jax.tree_util.tree_flatten_with_path(base)
        added = [
            leaf if pair is None else self._added(leaf, pair, _layout(path, leaf))
            for (path, leaf), pair in zip(leaves, trained, strict=True)
        ]
        return jax.tree.unflatten(structure, added)

    def _added(self, leaf: Array, pair: dict[str, Array], layout: Layout) -> Array:
        _, inputs, outputs = layout.split(leaf.shape)
        change = layout.restored(self.alpha / self.rank * (pair["a"] @ pair["b"]), inputs, outputs)
        return leaf + change.astype(leaf.dtype)

    def begin(self, model: Model, params: Params, key: Array) -> tuple[Params, Params]:
        """(trained, base): what distillation changes, and what it leaves alone.

        Raises:
          ValueError: if the model has no such parameters, or for lora one of which it isn't known which axes are its matrix's.
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
        leaves = jax.tree_util.tree_leaves_with_path(params)
        keys = jax.random.split(key, len(leaves))
        trained = [self._pair(*leaf, k) for leaf, k in zip(leaves, keys, strict=True)]
        if not any(pair is not None for pair in trained):
            raise ValueError(
                f"trainable='lora' needs matrices with both sides above rank={self.rank}; {model.name} has none."
            )
        return trained, params

    def _pair(self, path: Any, leaf: Array, key: Array) -> dict[str, Array] | None:
        layout = _layout(path, leaf)
        if layout is None:
            return None
        batch, inputs, outputs = layout.split(leaf.shape)
        inside, outside = math.prod(inputs), math.prod(outputs)
        if min(inside, outside) <= self.rank:
            return None
        scale = jnp.float32(inside) ** -0.5
        return {
            "a": scale * jax.random.normal(key, (*batch, inside, self.rank), jnp.float32),
            "b": jnp.zeros((*batch, self.rank, outside), jnp.float32),
        }


def _layout(path: Any, leaf: Array) -> Layout | None:
    """How a parameter is a matrix; None for what isn't one (norms, biases, routers)."""
    name = name_of(path)
    rule = rule_for(name, leaf, DEFAULT_RULES)
    if rule is None:
        return None
    fits = leaf.ndim >= rule.layout.inputs + rule.layout.outputs
    if not fits or (rule not in DEFAULT_RULES and leaf.ndim > 2):
        raise ValueError(
            f"trainable='lora' must know which axes of a parameter are its matrix's; got {name} of shape {leaf.shape}. Take 'full' or "
            "'head', or a model with matrices [in, out]."
        )
    return rule.layout
