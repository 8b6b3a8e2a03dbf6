"""What a group's matrix may be stored as: an array of x's dtype, or quantised; and how to come by the matrix itself.

Quantised weights are constants: no gradient goes to them.
"""

import jax
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import fp8
from pallas_kernels.fp8 import Fp8Block
from pallas_kernels.sefp import format as sefp
from pallas_kernels.sefp.format import Sefp

Quantised = Fp8Block | Sefp
Weights = Float[Array, "G K N"] | Quantised  # each with its ``shape``: (G, K, N)


def matrix(w: Weights, index: jax.Array | int, dtype: DTypeLike) -> Float[Array, "K N"]:
    """One of ``w``; nothing else is read or decoded."""
    return matrices(w, index, 1, dtype)[0]


def matrices(
    w: Weights, start: jax.Array | int, count: int, dtype: DTypeLike
) -> Float[Array, "count K N"]:
    """``count`` of ``w`` from ``start`` on."""
    if isinstance(w, Quantised):
        # For XLA on CPU slicing 8-bit floats begins with all of them as float16, which it would do once, before a loop, and keep.
        w, start = lax.optimization_barrier((w, start))
    w = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, count), w)
    match w:
        case Fp8Block():
            return lax.stop_gradient(fp8.decode(w, dtype))
        case Sefp():
            return lax.stop_gradient(sefp.decode(w, dtype=dtype))
        case _:
            return w


def require_array(w: Weights) -> None:
    """Refuses quantised weights.

    Raises:
      NotImplementedError: with the reason.
    """
    if isinstance(w, Quantised):
        raise NotImplementedError(f"w must be an array; it is stored as {type(w).__name__}")
