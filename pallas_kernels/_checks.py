"""Checks of arguments at the public functions: one line with the argument, the rule, what came and what to do.

Of traced values only shapes and dtypes are known, and only those are checked.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def arrays(op: str, **named: Any) -> None:
    """Raises TypeError for what is no array: lists would have to be copied at every call, and have no dtype."""
    for name, x in named.items():
        if not (hasattr(x, "dtype") and hasattr(x, "ndim")):
            raise TypeError(
                f"{op}: {name} must be an array; got {type(x).__name__}. Use jnp.asarray with a dtype."
            )


def integers(op: str, **named: Any) -> None:
    """Raises TypeError for arrays of other types; None passes."""
    named = {name: x for name, x in named.items() if x is not None}
    arrays(op, **named)
    for name, x in named.items():
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"{op}: {name} must be integers; got {x.dtype}. Cast to int32.")


def floating(op: str, **named: Any) -> None:
    """Raises TypeError for arrays of other types."""
    arrays(op, **named)
    for name, x in named.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{op}: {name} must be of a floating type; got {x.dtype}. Cast it.")


def not_empty(**named: Any) -> None:
    """Raises NotImplementedError for arrays of which one has no element: XLA's backends do that work, not kernels."""
    if any(0 in x.shape for x in named.values()):
        shapes = ", ".join(f"{name} {x.shape}" for name, x in named.items())
        raise NotImplementedError(f"nothing to do; got {shapes}")


def static_int(
    op: str, name: str, value: Any, low: int, high: int | None = None, hint: str = ""
) -> int:
    """``value`` as an int of Python from ``low`` to ``high``.

    Raises:
      TypeError: for 2.0, True, a traced value, ...
      ValueError: out of the range; ``hint`` says what to do.
    """
    if not _is_int(value):
        raise TypeError(
            f"{op}: {name} must be a Python int, static under jit; got {value!r}. Convert it with int()."
        )
    _in_range(op, name, int(value), low, high, hint)
    return int(value)


def scalar_int(op: str, name: str, value: Any, low: int, high: int, hint: str = "") -> None:
    """Raises as ``static_int``, unless ``value`` is such an int or an integer array of shape (); its value if that is known."""
    if not _is_int(value):
        what = f"{value.dtype}{value.shape}" if hasattr(value, "dtype") else repr(value)
        if getattr(value, "shape", None) != () or not jnp.issubdtype(value.dtype, jnp.integer):
            raise TypeError(
                f"{op}: {name} must be an int or an integer array of shape (); got {what}. Use jnp.int32(...)."
            )
        # Other processes' arrays cannot be read here.
        if isinstance(value, jax.core.Tracer) or not getattr(value, "is_fully_addressable", True):
            return
    _in_range(op, name, int(value), low, high, hint)


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _in_range(op: str, name: str, value: int, low: int, high: int | None, hint: str) -> None:
    if value < low or (high is not None and value > high):
        rule = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{op}: {name} must be {rule}; got {value}.{hint and ' ' + hint}")
