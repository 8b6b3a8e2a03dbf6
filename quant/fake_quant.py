"""Training through the rounding: weights as SEFP has them, with gradients as if they were untouched."""

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels import sefp, sefp_truncate
from quant.rules import DEFAULT_RULES, Rule, map_ruled
from quant.tensor import Layout


def fake_quantize_array(
    w: Float[Array, "..."],
    width: int | Int[Array, ""],
    layout: Layout,
    rounding: str = "truncate",
) -> Float[Array, "..."]:
    """``SefpTensor.encode(w, width=width, layout=layout).decode()`` in w's dtype, with dQ/dw = 1 (specification 2.1)."""
    _, inputs, outputs = layout.split(w.shape)
    q = sefp_truncate(layout.matrices(w), width, axis=-2, rounding=rounding)
    return layout.restored(q, inputs, outputs)


def fake_quantize(
    params: Any,
    width: int | Int[Array, ""],
    rules: Sequence[Rule] = DEFAULT_RULES,
    *,
    rounding: str = "truncate",
) -> Any:
    """``params`` as they are at ``width``, straight-through: the loss sees SEFP, the gradient is the array's.

    Args:
      params: a tree of arrays.
      width: 1 to 8; may be traced, so that one program serves all widths (then it isn't checked).
      rules: which parameters, as of ``quantize_params``; a rule's own width wins.
      rounding: "truncate", "nearest" or "nested".

    Returns:
      A tree like ``params``. Equal to decoding ``quantize_params(params, width, rules)``.

    Raises:
      ValueError, TypeError: for a width or rounding that there isn't, or a parameter that its rule doesn't fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> w = {"proj": {"weight": jnp.array([[0.8125], [0.4]])}}
      >>> fake_quantize(w, 3)["proj"]["weight"][:, 0].tolist()
      [0.75, 0.375]
      >>> jax.grad(lambda p: fake_quantize(p, 3)["proj"]["weight"].sum())(w)["proj"]["weight"][:, 0].tolist()
      [1.0, 1.0]
    """
    if not isinstance(width, jax.Array) and not 1 <= width <= sefp.MASTER_WIDTH:
        raise ValueError(f"width must be from 1 to {sefp.MASTER_WIDTH}; got {width}.")

    def one(rule: Rule, w: Any) -> Any:
        chosen = width if rule.width is None else rule.width
        return fake_quantize_array(w, chosen, rule.layout, rounding)

    return map_ruled(one, params, rules)
