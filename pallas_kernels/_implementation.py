"""The contract between an op's public function and its backends.

``implementation=None`` takes the first backend of the platform's preference list that does not refuse, and
always ends at the XLA one, which never refuses valid input. A name takes exactly that backend. A tuple takes
the first of its members that does not refuse. A backend refuses by raising ``NotImplementedError`` with a
reason; if all refuse, an ``ExceptionGroup`` carries every reason.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

Implementation = str | Sequence[str] | None


def on_accelerator() -> bool:
    """Whether JAX runs on a GPU or TPU: there copies and launches are what counts, on CPU passes over the cache."""
    return jax.default_backend() != "cpu"


def hashable(implementation: Implementation) -> Implementation:
    """``implementation`` as ``jax.custom_vjp`` wants what is no operand: a list as a tuple."""
    return tuple(implementation) if isinstance(implementation, list) else implementation


def call(
    op: str,
    backends: Mapping[str, Callable[..., Any]],
    preference: Mapping[str, Sequence[str]],
    implementation: Implementation,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls the chosen backend of ``op``.

    Args:
      op: the public name, for messages.
      backends: every backend by name.
      preference: backend names to try for ``implementation=None``, by platform ("cpu", "gpu", "tpu").
      implementation: None, one name, or a sequence of names.
      *args: passed on.
      **kwargs: passed on.

    Raises:
      ValueError: for an unknown name.
      NotImplementedError: if the one named backend refuses.
      ExceptionGroup: if every backend of a sequence refuses.
    """
    if implementation is None:
        names: Sequence[str] = (
            preference[jax.default_backend()] if jax.default_backend() in preference else ("xla",)
        )
    elif isinstance(implementation, Sequence) and not isinstance(implementation, str):
        names = tuple(implementation)
    else:
        names = (implementation,)
    unknown = [n for n in names if not isinstance(n, str) or n not in backends]
    if unknown or not names:
        raise ValueError(
            f"{op}: implementation must name one of {sorted(backends)}; got {implementation!r}. Use None for the default."
        )
    refusals: list[Exception] = []
    for name in names:
        try:
            return backends[name](*args, **kwargs)
        except NotImplementedError as error:
            if isinstance(implementation, str):
                raise
            refusals.append(NotImplementedError(f"{name}: {error}"))
    raise ExceptionGroup(f"{op}: every implementation refused", refusals)
