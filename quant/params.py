"""A model's parameters in SEFP, and what they weigh at each width."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pallas_kernels import sefp
from pallas_kernels.sefp.format import BASE_WIDTH
from quant.rules import DEFAULT_RULES, Rule, map_ruled, name_of
from quant.tensor import SefpTensor, check_group, check_width, is_sefp


def quantize_params(
    params: Any,
    width: int = sefp.MASTER_WIDTH,
    rules: Sequence[Rule] = DEFAULT_RULES,
    *,
    group: int = sefp.GROUP,
    rounding: str = "truncate",
) -> Any:
    """``params`` with the parameters that ``rules`` name as ``SefpTensor``; pure, may be jitted, mapped and run on a mesh.

    Args:
      params: a tree of arrays.
      width: that is stored, 3 to 8; every lower one is inside.
      rules: the first that matches a parameter's path decides. Put your own before: ``(Rule("lm_head"), *DEFAULT_RULES)`` leaves
        the head as it is.
      group: 64.
      rounding: "truncate"; "nearest": closer at ``width`` itself, but not at those below it; or "nested": closest over all widths.

    Returns:
      A tree that ``jaxmoe.forward`` and ``jaxmoe.generate`` take.

    Raises:
      ValueError, TypeError: for options that there aren't, or a parameter that its rule doesn't fit, NaN or infinity among them.

    Example:
      >>> import jax.numpy as jnp
      >>> q = quantize_params({"proj": {"weight": jnp.ones((128, 4))}, "norm": {"weight": jnp.ones(4)}})
      >>> q["proj"]["weight"], nbytes(q, 3)
      (SefpTensor(E5M8, shape=(128, 4), 584 bytes), 280)
    """
    check_group(group)

    def encode(rule: Rule, w: Any) -> SefpTensor:
        return SefpTensor.encode(
            w,
            group,
            width if rule.width is None else rule.width,
            layout=rule.layout,
            rounding=rounding,
            pinned=rule.width is not None,
        )

    return map_ruled(encode, params, rules)


def tensors(params: Any) -> list[SefpTensor]:
    """Those of the parameters that are stored in SEFP."""
    return [x for x in jax.tree.leaves(params, is_leaf=is_sefp) if is_sefp(x)]


def at_width(params: Any, width: int) -> Any:
    """The same parameters, read at ``width``: nothing is copied or decoded. Pinned ones keep theirs.

    Raises:
      ValueError: if none is in SEFP, or ``width`` isn't stored.
    """
    check_width(width)
    if not tensors(params):
        raise ValueError(
            f"width={width} needs SEFP weights, and these parameters have none; make them with quant.quantize_params(params)."
        )
    return jax.tree.map(
        lambda x: x.truncate(width) if is_sefp(x) and not x.pinned else x, params, is_leaf=is_sefp
    )


def pin_widths(params: Any, widths: Mapping[str, int]) -> Any:
    """``params`` with modules of their own widths, whatever the others' is: nothing is copied or decoded.

    Args:
      params: parameters in SEFP.
      widths: for the parameters whose path contains a match of a regular expression; the first that matches counts. Their planes
        beyond it are left out.

    Raises:
      ValueError: for what is no regular expression or matches nothing in SEFP, or a width that isn't stored; all are named.

    Example:
      >>> import jax.numpy as jnp
      >>> q = quantize_params({name: {"weight": jnp.ones((64, 2))} for name in ("proj", "lm_head")})
      >>> at_width(pin_widths(q, {"lm_head": 6}), 3)
      {'lm_head': {'weight': SefpTensor(E5M6, shape=(64, 2), 114 bytes)}, 'proj': {'weight': SefpTensor(E5M3, shape=(64, 2), 66 bytes)}}
    """
    for pattern in widths:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"widths: {pattern!r} is not a regular expression ({error}); use a part of a path such as attention/o/weight."
            ) from None
    unmatched = set(widths)

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        name = name_of(path)
        matching = [p for p in widths if is_sefp(leaf) and re.search(p, name)]
        if not matching:
            return leaf
        unmatched.difference_update(matching)
        try:
            return dataclasses.replace(leaf.truncate(widths[matching[0]]), pinned=True)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    pinned = jax.tree_util.tree_map_with_path(one, params, is_leaf=is_sefp)
    if unmatched:
        raise ValueError(
            f"widths: {sorted(unmatched)[0]!r} matches no parameter in SEFP; use a part of a path such as attention/o/weight."
        )
    return pinned


def width_for_bytes(params: Any, size_bytes: int) -> int:
    """The widest width at which all parameters (or their shapes) have at most ``size_bytes``.

    Raises:
      ValueError: if none is in SEFP, or the narrowest width has more.

    Example:
      >>> import jax.numpy as jnp
      >>> q = quantize_params({"proj": {"weight": jnp.ones((128, 4))}})
      >>> [width_for_bytes(q, size) for size in (10_000, 583, 264)]
      [8, 7, 3]
    """
    stored = [t.width for t in tensors(params) if not t.pinned]
    if not stored:
        raise ValueError(
            f"size_bytes={size_bytes} needs SEFP weights, and these parameters have none; make them with "
            "quant.quantize_params(params)."
        )
    for width in range(min(stored), BASE_WIDTH - 1, -1):
        if nbytes(params, width) <= size_bytes:
            return width
    least = nbytes(params, BASE_WIDTH)
    raise ValueError(
        f"size_bytes must be at least {least}, what E5M{BASE_WIDTH} has; got {size_bytes}. Use a smaller model."
    )


def decode_params(params: Any) -> Any:
    """``params`` with arrays in place of SEFP, in the dtypes that were encoded."""
    return jax.tree.map(lambda x: x.decode() if is_sefp(x) else x, params, is_leaf=is_sefp)


def nbytes(params: Any, width: int | None = None) -> int:
    """Bytes that all parameters (or their shapes) have, those in SEFP at ``width``; default: as stored."""

    def size(x: Any) -> int:
        if not is_sefp(x):
            return x.size * np.dtype(x.dtype).itemsize
        return x.nbytes(None if x.pinned else width)

    return sum(map(size, jax.tree.leaves(params, is_leaf=is_sefp)))


def bits_per_weight(params: Any, width: int | None = None) -> float:
    """All bytes over all weights: padding, shared exponents and what isn't in SEFP count."""
    return 8 * nbytes(params, width) / sum(x.size for x in jax.tree.leaves(params, is_leaf=is_sefp))
