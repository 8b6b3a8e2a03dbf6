"""Backends that have one derivative say so in a line when another is asked for, instead of failing somewhere inside it."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.grouped_matmul.weights import Quantised, Weights


def once(backend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """``backend`` of ``grouped_matmul``, whose gradient refuses to be differentiated."""

    @functools.wraps(backend)
    def op(x: jax.Array, w: Weights, group_sizes: jax.Array, group_offset: Any) -> jax.Array:
        # What the gradient depends on beside y's: of constants only dx is asked for, and x need not be kept for it.
        others = () if isinstance(w, Quantised) else (x, w)
        return _y(backend(x, w, group_sizes, group_offset), *others)

    return op


@jax.custom_vjp
def _y(y: jax.Array, *others: jax.Array) -> jax.Array:
    del others
    return y


_y.defvjp(
    lambda y, *others: (y, others),
    lambda others, dy: (_dy(dy, *others), *[None for _ in others]),
)


@jax.custom_jvp
def _dy(dy: jax.Array, *others: jax.Array) -> jax.Array:
    del others
    return dy


@_dy.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "grouped_matmul: this backend has no second derivative. Name implementation='reference', which has."
    )
