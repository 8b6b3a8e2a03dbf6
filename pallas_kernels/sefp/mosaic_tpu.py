"""TPU kernels: blocks that fit vector memory, decoded where they are multiplied. Forward only: ``api`` has the gradients."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _checks, _pallas
from pallas_kernels.numerics import power_of_two, precision_of
from pallas_kernels.sefp import format as sefp
from pallas_kernels.sefp.format import GROUP, Sefp
from pallas_kernels.sefp.xla import groups_of_rows

_COLUMNS = 128  # of a block: the lanes of a register
_MOST_ROWS = 256


def sefp_truncate(w: jax.Array, width: jax.Array, *, axis: int, rounding: str) -> jax.Array:
    """See ``api.sefp_truncate``."""
    inner, columns = w.shape[-2:]
    _checks.not_empty(w=w)
    if axis != w.ndim - 2:
        raise NotImplementedError(
            f"groups must lie along the last axis but one; got axis {axis} of {w.ndim}"
        )
    if inner % GROUP or columns % _COLUMNS:
        raise NotImplementedError(
            f"K must be a multiple of {GROUP} and N of {_COLUMNS}; got {inner} and {columns}"
        )
    flat = w.reshape(-1, columns)

    def kernel(width_ref, w_ref, out_ref):
        value = sefp.quantized(w_ref[...].astype(jnp.float32), width_ref[0], rounding, 0)
        out_ref[...] = value.astype(w.dtype)

    block = pl.BlockSpec((GROUP, _COLUMNS), lambda g, n, width: (g, n))
    out = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(flat.shape, w.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(flat.shape[0] // GROUP, columns // _COLUMNS),
            in_specs=[block],
            out_specs=block,
        ),
        interpret=_pallas.interpret_tpu(),
        name="sefp_truncate",
    )(width.reshape(1), flat)
    return out.reshape(w.shape)


def sefp_matmul(x: jax.Array, s: Sefp) -> jax.Array:
    """See ``api.sefp_matmul``: one group of 128 columns after another, added up in the output's block."""
    (groups, columns), rows = s.exponent.shape, x.shape[0]
    _checks.not_empty(x=x, s=s)
    if columns % _COLUMNS:
        raise NotImplementedError(f"N must be a multiple of {_COLUMNS}; got {columns}")
    if rows > _MOST_ROWS:
        raise NotImplementedError(f"the kernel is for up to {_MOST_ROWS} rows; got {rows}")

    def kernel(x_ref, exponent_ref, base_ref, *planes_and_out):
        *planes, out_ref = planes_and_out

        @pl.when(pl.program_id(1) == 0)
        def _():
            out_ref[...] = jnp.zeros_like(out_ref)

        # Every code is exact in bfloat16; the scale meets the group's sum.
        codes = sefp.unpack(base_ref[0], [p[0] for p in planes]).astype(x.dtype)
        sums = lax.dot_general(
            x_ref[0],
            codes,
            (((1,), (1,)), ((), ())),
            precision=precision_of(x.dtype),
            preferred_element_type=jnp.float32,
        )
        out_ref[...] += sums * power_of_two(exponent_ref[0].astype(jnp.int32) - s.width)

    words, halfwords = (
        pl.BlockSpec((1, _COLUMNS, size), lambda n, g: (g, n, 0)) for size in (8, 4)
    )
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, columns), jnp.float32),
        grid=(columns // _COLUMNS, groups),
        in_specs=[
            pl.BlockSpec((1, rows, GROUP), lambda n, g: (g, 0, 0)),
            pl.BlockSpec((1, 1, _COLUMNS), lambda n, g: (g, 0, n)),
            words,
            *(halfwords for _ in s.planes),
        ],
        out_specs=pl.BlockSpec((rows, _COLUMNS), lambda n, g: (0, n)),
        interpret=_pallas.interpret_tpu(),
        name="sefp_matmul",
    )(jnp.moveaxis(groups_of_rows(x, s), 1, 0), s.exponent[:, None], s.base, *s.planes)
