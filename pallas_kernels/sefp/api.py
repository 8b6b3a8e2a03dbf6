"""Public SEFP operations."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import _checks, _implementation
from pallas_kernels.sefp import format as sefp
from pallas_kernels.sefp import mosaic_gpu, mosaic_tpu, native, reference, xla

_TRUNCATE = {
    "reference": reference.sefp_truncate,
    "xla": xla.sefp_truncate,
    "mosaic_gpu": mosaic_gpu.sefp_truncate,
    "mosaic_tpu": mosaic_tpu.sefp_truncate,
}


def _no_kernel(*_: object) -> sefp.Sefp:
    raise NotImplementedError("planes of a Sefp are dropped without a kernel")


# Of a Sefp.
_DROP = {name: _no_kernel for name in _TRUNCATE} | {
    name: sefp.Sefp.truncate for name in ("xla", "reference")
}
_MATMUL = {
    "reference": reference.sefp_matmul,
    "xla": xla.sefp_matmul,
    "native": native.sefp_matmul,
    "mosaic_gpu": mosaic_gpu.sefp_matmul,
    "mosaic_tpu": mosaic_tpu.sefp_matmul,
}
_PREFERENCE = {
    "cpu": ("native", "xla"),
    # Kernels that are right but were never timed are for those who name them (docs/kernels.md).
    "gpu": ("xla",),
    "tpu": ("xla",),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _truncate(axis, rounding, implementation, w, width):
    return _implementation.call(
        "sefp_truncate",
        _TRUNCATE,
        {},
        implementation,
        w,
        width,
        axis=axis,
        rounding=rounding,
    )


_truncate.defvjp(
    lambda axis, rounding, implementation, w, width: (
        _truncate(axis, rounding, implementation, w, width),
        None,
    ),
    lambda axis, rounding, implementation, residuals, dy: (dy, None),
)


def sefp_truncate(
    w: Float[Array, "..."] | sefp.Sefp,
    width: int | Int[Array, ""],
    *,
    axis: int = -2,
    rounding: str = "truncate",
    implementation: _implementation.Implementation = None,
) -> Float[Array, "..."] | sefp.Sefp:
    """``w`` as SEFP has it at ``width``, in its own dtype; exact.

    The gradient passes straight through, dQ/dw = 1. NaN stays NaN and does not touch its group; infinity becomes 65504; 2^17 and
    more saturates. Stored weights lose planes, without a copy.

    Args:
      w: weights [..., K, N], or a ``Sefp``.
      width: 1 to 8; may be traced, so that one program serves all (then it isn't checked). Of a ``Sefp``: 3 to what it stores, an int.
      axis: the contracted one, along which groups of 64 lie.
      rounding: "truncate", "nearest" (half to even) or "nested", as of ``encode``.
      implementation: None, "xla", "mosaic_gpu" (Hopper), "mosaic_tpu", "reference", or a sequence of these. Of a ``Sefp`` the
        kernels refuse.

    Returns:
      As ``w``.

    Raises:
      ValueError, TypeError: for a width, axis, rounding or dtype that doesn't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> sefp_truncate(jnp.array([[0.8125], [-0.40625], [0.1]]), 3)[:, 0].tolist()
      [0.75, -0.375, 0.0]
    """
    if isinstance(w, sefp.Sefp):
        return _implementation.call("sefp_truncate", _DROP, {}, implementation, w, width)
    _checks.floating("sefp_truncate", w=w)
    if not -w.ndim <= axis < w.ndim or w.ndim < 2:
        raise ValueError(
            f"sefp_truncate: axis {axis} is not one of w's of shape {w.shape}, or w isn't at least 2-D."
        )
    _checks.scalar_int("sefp_truncate", "width", width, 1, sefp.MASTER_WIDTH)
    sefp.check_rounding(rounding)
    implementation = _implementation.hashable(implementation)
    return _truncate(axis % w.ndim, rounding, implementation, w, jnp.asarray(width, jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(implementation, x, s):
    y = _implementation.call("sefp_matmul", _MATMUL, _PREFERENCE, implementation, x, s)
    return y.astype(x.dtype)


_matmul.defvjp(
    lambda implementation, x, s: (_matmul(implementation, x, s), s),
    lambda implementation, s, dy: (xla.sefp_matmul_transposed(dy, s).astype(dy.dtype), None),
)


def sefp_matmul(
    x: Float[Array, "*batch K"],
    s: sefp.Sefp,
    *,
    width: int | None = None,
    implementation: _implementation.Implementation = None,
) -> Float[Array, "*batch N"]:
    """``x @ w`` for weights stored as SEFP, reading only what ``width`` needs. Sums in float32; differentiable in x.

    Args:
      x: float32 or bfloat16 [..., K]; leading axes are rows of one product.
      s: weights [K, N].
      width: 3 to the stored width; None for that one.
      implementation: None, "xla", "native" (C++, float32 on CPU), "mosaic_gpu" (Hopper, bfloat16, up to 64 rows),
        "mosaic_tpu", "reference", or a sequence of these.

    Returns:
      [..., N] in x's dtype.

    Raises:
      ValueError, TypeError: for shapes, a width or a dtype that doesn't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> s = sefp.encode(jnp.full((64, 2), 0.75))
      >>> sefp_matmul(jnp.ones((64,)), s, width=3).tolist()
      [48.0, 48.0]
    """
    if not isinstance(s, sefp.Sefp):
        raise TypeError(
            f"sefp_matmul: s must be a Sefp; got {type(s).__name__}. Make one of an array with sefp.encode."
        )
    _checks.arrays("sefp_matmul", x=x)
    if len(s.shape) != 2:
        raise ValueError(
            f"sefp_matmul: s must hold [K, N]; got {s.shape}. Index, scan or vmap over leading axes."
        )
    if x.ndim < 1 or x.shape[-1] != s.shape[0]:
        raise ValueError(f"sefp_matmul: x's last axis must be s's K; got {x.shape} and {s.shape}.")
    if x.dtype not in (jnp.float32, jnp.bfloat16):  # what holds every weight exactly
        raise TypeError(f"sefp_matmul: x must be float32 or bfloat16; got {x.dtype}. Cast it.")
    s = s if width is None else s.truncate(width)
    batch, (inner, columns) = x.shape[:-1], s.shape
    rows = x.reshape(math.prod(batch), inner)
    return _matmul(_implementation.hashable(implementation), rows, s).reshape(*batch, columns)
