"""Low-rank additions to a model's matrices (LoRA, arXiv 2106.09685): what is trained while the weights themselves stay."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from quant.rules import DEFAULT_RULES, Rule, name_of, rule_for
from quant.tensor import Layout, check_floating, is_sefp

Shape = tuple[int, ...]
Pair = dict[str, Array]  # "a" [*batch, in, rank], "b" [*batch, rank, out], both float32


@dataclasses.dataclass(frozen=True)
class Lora:
    """W + alpha / rank * A B for every matrix W [in, out] that the rules name; hashable, static under jit.

    Which axes of a parameter are its matrix's is what ``rules`` say; every matrix of a stacked parameter (layers, experts, heads) has an
    A and a B of its own. A parameter whose matrices have a side of at most ``rank`` stays as it is.

    Attributes:
      rank: inner axis of A B.
      alpha: scale of what is added, times rank.
      rules: which parameters. A rule without a layout in front leaves some out: ``(Rule("experts"), *DEFAULT_RULES)``.

    Raises:
      ValueError: for a rank below one, or an alpha that isn't positive and finite.
      TypeError: for a rank that isn't an int.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> base = {"proj": {"weight": jnp.ones((2, 64, 32)), "bias": jnp.ones((2, 32))}}
      >>> lora = Lora(rank=4)
      >>> adapters = lora.init(base, jax.random.key(0))
      >>> jax.tree.map(jnp.shape, adapters)
      {'proj': {'bias': None, 'weight': {'a': (2, 64, 4), 'b': (2, 4, 32)}}}
      >>> bool((lora(base, adapters)["proj"]["weight"] == base["proj"]["weight"]).all())
      True
    """

    rank: int = 8
    alpha: float = 16.0
    rules: tuple[Rule, ...] = DEFAULT_RULES

    def __post_init__(self):
        object.__setattr__(self, "rules", tuple(self.rules))
        if not isinstance(self.rank, int):
            raise TypeError(
                f"rank must be an int; got {self.rank!r}. Use a whole number, such as 8."
            )
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1; got {self.rank}.")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be positive and finite; got {self.alpha}.")

    def init(self, params: Any, key: Array) -> Any:
        """Adapters that change nothing yet: A normal with deviation 1 / sqrt(in), B zero.

        Args:
          params: a tree of arrays.
          key: what A is drawn from.

        Returns:
          A tree like ``params``, with {"a", "b"} in place of each matrix and None of whatever stays as it is.

        Raises:
          ValueError: if there is no such matrix, or a parameter of which it isn't known which axes are its matrix's.
          TypeError: for a parameter that isn't of a floating type, or in SEFP.
        """
        leaves, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_sefp)
        shapes = [self._shapes(*leaf) for leaf in leaves]
        if not any(shapes):
            raise ValueError(
                f"rank must be below both sides of a matrix, and there is none with both sides above rank={self.rank}; lower it, or "
                "choose other rules."
            )
        return jax.tree.unflatten(structure, _pairs(key, tuple(shapes)))

    def __call__(self, base: Any, adapters: Any) -> Any:
        """The parameters that ``base`` and ``adapters`` make, each in its own dtype; sums are float32.

        Raises:
          ValueError, TypeError: as ``init``; or for adapters that aren't those of this rank and these rules.
        """
        return jax.tree_util.tree_map_with_path(self._added, base, adapters)

    def _added(self, path: Any, w: Float[Array, "..."], pair: Pair | None) -> Float[Array, "..."]:
        layout, expected = self._layout(path, w), self._shapes(path, w)
        if pair is None:
            return w
        found = (pair["a"].shape, pair["b"].shape)
        if layout is None or found != expected:
            wanted = f"adapters of shapes {expected}" if expected else "no adapters"
            raise ValueError(
                f"{name_of(path)} must have {wanted} with rank={self.rank} and these rules; got shapes {found}. Use the Lora that made them."
            )
        _, inputs, outputs = layout.split(w.shape)
        product = jnp.matmul(pair["a"], pair["b"], precision=lax.Precision.HIGHEST)
        change = layout.restored(self.alpha / self.rank * product, inputs, outputs)
        return (w.astype(jnp.float32) + change).astype(w.dtype)

    def _shapes(self, path: Any, w: Any) -> tuple[Shape, Shape] | None:
        """Of A and B; None of what stays as it is."""
        layout = self._layout(path, w)
        if layout is None:
            return None
        batch, inputs, outputs = layout.split(w.shape)
        inside, outside = math.prod(inputs), math.prod(outputs)
        if min(inside, outside) <= self.rank:
            return None
        return (*batch, inside, self.rank), (*batch, self.rank, outside)

    def _layout(self, path: Any, w: Any) -> Layout | None:
        name = name_of(path)
        rule = rule_for(name, w, self.rules)
        if rule is None:
            return None
        if is_sefp(w):
            raise TypeError(f"{name} must be an array; it is in SEFP. Use quant.decode_params.")
        check_floating(w, name)
        # What no rule names is [in, out]; with more axes it may be anything, such as a convolution.
        if len(w.shape) > 2 and rule not in self.rules:
            raise ValueError(
                f"LoRA must know which axes of a parameter are its matrix's; got {name} of shape {w.shape}. Give it a Rule."
            )
        try:
            rule.layout.split(w.shape)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        return rule.layout


@functools.partial(jax.jit, static_argnames=("shapes",))
def _pairs(key: Array, shapes: tuple[tuple[Shape, Shape] | None, ...]) -> list[Pair | None]:
    sizes = [math.prod(shape[0]) if shape else 0 for shape in shapes]
    # Drawn together: a generator takes XLA a second per shape to compile. The barrier keeps it from being part of each use.
    drawn = lax.optimization_barrier(jax.random.normal(key, (sum(sizes),), jnp.float32))
    pairs, start = [], 0
    for shape, size in zip(shapes, sizes, strict=True):
        pairs.append(shape and _pair(lax.slice(drawn, (start,), (start + size,)), *shape))
        start += size
    return pairs


def _pair(drawn: Float[Array, " n"], a: Shape, b: Shape) -> Pair:
    return {"a": drawn.reshape(a) * a[-2] ** -0.5, "b": jnp.zeros(b, jnp.float32)}
