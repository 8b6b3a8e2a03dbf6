"""Public grouped matmul."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import _checks, _implementation, fp8
from pallas_kernels.grouped_matmul import mosaic_gpu, mosaic_tpu, native, reference, xla
from pallas_kernels.grouped_matmul.once import once
from pallas_kernels.grouped_matmul.weights import Quantised, Weights

_BACKENDS = {
    "reference": reference.grouped_matmul,
    "native": once(native.grouped_matmul),
    "mosaic_gpu": once(mosaic_gpu.grouped_matmul),
    "mosaic_tpu": once(mosaic_tpu.grouped_matmul),
    "xla": once(xla.grouped_matmul),
    "ragged_dot": xla.ragged_dot,
}
_PREFERENCE = {
    "cpu": ("native", "xla"),
    # ragged_dot is not exact about NaN, and much slower than the kernel (docs/log.md, First GPU run).
    "gpu": ("mosaic_gpu", "xla"),
    # Nothing was ever measured on a TPU: its kernel is for those who name it.
    "tpu": ("ragged_dot", "xla"),
}


def check(
    op: str, x: jax.Array, w: Weights, group_sizes: jax.Array, group_offset: jax.Array | int
) -> None:
    """Raises ValueError or TypeError, for ``op``, unless these are as ``grouped_matmul`` says."""
    _checks.floating(op, x=x)
    _checks.integers(op, group_sizes=group_sizes)
    if isinstance(w, fp8.Fp8Block):
        fp8.check(op, w)
    elif not isinstance(w, Quantised):
        _checks.arrays(op, w=w)
    if x.ndim != 2 or len(w.shape) != 3 or group_sizes.ndim != 1:
        raise ValueError(
            f"{op}: x must be [M, K], w [G, K, N] and group_sizes [E]; got shapes "
            f"{x.shape}, {w.shape} and {group_sizes.shape}. Flatten leading dimensions of x first."
        )
    if x.shape[1] != w.shape[1]:
        raise ValueError(
            f"{op}: x's K ({x.shape[1]}) must equal w's K ({w.shape[1]}); weights are [group, in, out]."
        )
    if group_sizes.shape[0] > w.shape[0]:
        raise ValueError(
            f"{op}: group_sizes has {group_sizes.shape[0]} groups but w holds {w.shape[0]} matrices; "
            "pass one size per matrix used."
        )
    last = w.shape[0] - group_sizes.shape[0]
    hint = f"From there on w's {w.shape[0]} matrices must hold {group_sizes.shape[0]} groups."
    _checks.scalar_int(op, "group_offset", group_offset, 0, last, hint)
    if not isinstance(w, Quantised) and x.dtype != w.dtype:
        raise TypeError(f"{op}: x is {x.dtype} but w is {w.dtype}; cast one to the other's dtype.")


def grouped_matmul(
    x: Float[Array, "M K"],
    w: Weights,
    group_sizes: Int[Array, " E"],
    *,
    group_offset: Int[Array, ""] | int = 0,
    implementation: _implementation.Implementation = None,
) -> Float[Array, "M N"]:
    """Multiplies consecutive row groups of ``x`` by their own matrices.

    ``y[r] = x[r] @ w[group_offset + e]`` for the rows r of group e; groups are consecutive, group e has
    ``group_sizes[e]`` rows. Rows past the last group are zero. Accumulates in float32; differentiable in x, and in w if it is an
    array: quantised weights are constants.

    Args:
      x: rows sorted by group.
      w: one matrix per group, [in, out]; may hold more than the E groups in use (a rank's slice, stacked layers). An array of
        x's dtype, or quantised: ``fp8.Fp8Block`` or ``sefp.Sefp``, whose matrices become x's dtype: in
        "xla" one at a time, when used; in "mosaic_gpu" those of all groups ahead; "native" multiplies by the bits.
      group_sizes: rows per group; must sum to at most M (not checked: it is data).
      group_offset: index in ``w`` of group 0's matrix; may be traced.
      implementation: None, "mosaic_gpu" (Hopper, 16 bits), "mosaic_tpu", "native" (C++, float32 on CPU), "xla" (block loop),
        "ragged_dot" (jax.lax), "reference", or a sequence of these. Quantised weights are for "xla", "reference", "mosaic_gpu"
        (which multiplies what XLA decodes) and, in SEFP, "native".

    Returns:
      [M, N] in x's dtype.

    Raises:
      ValueError, TypeError: for shapes or dtypes that do not fit, naming both.
      NotImplementedError, ExceptionGroup: if what ``implementation`` names cannot take these inputs, with the reason.

    Example:
      >>> import jax.numpy as jnp
      >>> x, w = jnp.ones((3, 2)), jnp.stack([jnp.eye(2), 2 * jnp.eye(2)])
      >>> grouped_matmul(x, w, jnp.array([1, 2])).tolist()
      [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
    """
    check("grouped_matmul", x, w, group_sizes, group_offset)
    return _implementation.call(
        "grouped_matmul",
        _BACKENDS,
        _PREFERENCE,
        implementation,
        x,
        w,
        group_sizes.astype(jnp.int32),
        group_offset,
    )
