"""Hopper kernels. The product is y^T[N, B] = w^T[N, K] x^T[K, B] from the stored bits, for few rows of x. Forward only: ``api`` has
the gradients.

A block takes 64 outputs per warpgroup and a share of the groups; one more warpgroup copies their bits to shared memory by TMA, as
far ahead as it has room. The others turn 64 x 64 weights into an operand of the tensor cores (``operand``), which add up in float32
for up to eight rows of x at the price of one. The scale meets a group's 64 x B sums, not its weights.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _checks, _pallas
from pallas_kernels.numerics import power_of_two
from pallas_kernels.sefp import config as configs
from pallas_kernels.sefp import format as sefp
from pallas_kernels.sefp.format import GROUP, Sefp
from pallas_kernels.sefp.operand import HALFWORDS, TILE, WORDS, operands, ordered
from pallas_kernels.sefp.xla import groups_of_rows

_MOST_ROWS = 64
_ROWS = plgpu.Layout.WGMMA.reduce(1)


def sefp_matmul(x: jax.Array, s: Sefp, *, tiling: configs.Tiling | None = None) -> jax.Array:
    """See ``api.sefp_matmul``.

    Args:
      x: bfloat16 [B, K], B at most 64.
      s: [K, N], N a multiple of 64.
      tiling: None for the heuristic's.
    """
    rows, (_, columns) = x.shape[0], s.shape
    _checks.not_empty(x=x, s=s)
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"the tensor cores take x in bfloat16; got {x.dtype}")
    if rows > _MOST_ROWS:
        raise NotImplementedError(
            f"the kernel is for up to {_MOST_ROWS} rows of x, got {rows}; with more, decoding once takes less"
        )
    if columns % TILE:
        raise NotImplementedError(f"N must be a multiple of {TILE}; got {columns}")
    interpret = _pallas.interpret_gpu()
    padded = -(-rows // 8) * 8
    if tiling is None:
        groups, sms = s.exponent.shape[0], _pallas.multiprocessors()
        tiling = configs.tiling(groups, columns, padded, len(s.planes), sms)
    x = jnp.pad(groups_of_rows(x, s).reshape(rows, -1), ((0, padded - rows), (0, 0)))
    return _partial_sums(x, s, tiling, interpret).sum(0).T[:rows]


def _load(ref: Any, layout: Any, interpret: Any) -> jax.Array:
    if interpret is not None:
        return ref[...]
    # Bytes of a row take fewer than all banks of shared memory, which has to be allowed.
    index = ((),) if jax.__version_info__ < (0, 11) else ()
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def _products(weights: list[jax.Array], x: Any, interpret: Any) -> list[jax.Array]:
    """float32 [64, B] weights @ x^T of each group, x [B, 64 of each] in shared memory."""
    parts = [x.at[:, pl.ds(g * GROUP, GROUP)] for g in range(len(weights))]
    if interpret is not None:  # the simulator multiplies only what lies in shared memory
        contract = (((1,), (1,)), ((), ()))
        return [
            lax.dot_general(w, part[...], contract, preferred_element_type=jnp.float32)
            for w, part in zip(weights, parts, strict=True)
        ]

    def multiply(*sums: Any) -> list[jax.Array]:
        for one, w, part in zip(sums, weights, parts, strict=True):
            plgpu.wgmma(one, w, part.transpose((1, 0)))
        return [one[...] for one in sums]

    return pl.run_scoped(multiply, *(plgpu.ACC((TILE, x.shape[0]), jnp.float32) for _ in weights))


def _kernel(x, exponent, base, *planes_and_out, tiling: configs.Tiling, steps: int, interpret: Any):
    *planes, out = planes_and_out
    block, split = lax.axis_index("block"), lax.axis_index("split")
    warpgroups, groups, batch = tiling.warpgroups, tiling.groups, x.shape[0]

    def body(_, x_smem, exponent_smem, base_smem, *planes_smem_and_total):
        *planes_smem, total = planes_smem_and_total
        warpgroup = lax.axis_index("warpgroup")
        rows, halves = (pl.ds(warpgroup * n, n) for n in (TILE, TILE // 2))

        def load(ref, rows, layout):
            return [_load(ref.at[g, rows], layout, interpret) for g in range(groups)]

        words = load(base_smem, halves, WORDS)
        bits = [load(plane, halves, HALFWORDS) for plane in planes_smem]
        exponents = load(exponent_smem, rows, _ROWS)
        sums = _products(operands(words, bits, interpret), x_smem, interpret)
        for one, exponent in zip(sums, exponents, strict=True):
            scale = power_of_two(exponent.astype(jnp.int32) - 1)
            total += one * lax.broadcast_in_dim(scale, (TILE, batch), (0,))
        return total

    def context(pipeline):
        zeros = jnp.zeros((TILE, batch), jnp.float32)
        if interpret is None:  # the simulator knows no layouts
            zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
        warpgroup = lax.axis_index("warpgroup")
        rows = pl.ds((block * warpgroups + warpgroup) * TILE, TILE)
        out[split, rows] = pipeline(zeros)

    def at(k):
        return split * steps + k

    plgpu.emit_pipeline_warp_specialized(
        body,
        grid=(steps,),
        in_specs=[
            plgpu.BlockSpec(
                (batch, groups * GROUP), lambda k: (0, at(k)), transforms=_pallas.SWIZZLED
            ),
            plgpu.BlockSpec((groups, warpgroups * TILE), lambda k: (at(k), block)),
            *(
                plgpu.BlockSpec((groups, warpgroups * TILE // 2, size), lambda k: (at(k), block, 0))
                for size in (16, *(8 for _ in planes))
            ),
        ],
        max_concurrent_steps=min(tiling.stages, steps),
        num_compute_wgs=warpgroups,
        memory_registers=40,
        wg_axis="warpgroup",
        compute_context=context,
    )(x, exponent, base, *planes)


def _partial_sums(x: jax.Array, s: Sefp, tiling: configs.Tiling, interpret: Any) -> jax.Array:
    """float32 [splits, N, B]: what each share of the groups adds to y^T; x is bfloat16 [B, 64 G], B a multiple of 8."""
    groups, columns = s.exponent.shape
    steps = groups // (tiling.splits * tiling.groups)
    kernel = functools.partial(_kernel, tiling=tiling, steps=steps, interpret=interpret)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((tiling.splits, columns, x.shape[0]), jnp.float32),
        grid=(columns // (TILE * tiling.warpgroups), tiling.splits),
        grid_names=("block", "split"),
        num_threads=tiling.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=_pallas.WARPGROUP),
        interpret=interpret,
    )(ordered(x), s.exponent, *(a.reshape(groups, columns // 2, -1) for a in (s.base, *s.planes)))


def sefp_truncate(w: jax.Array, width: jax.Array, *, axis: int, rounding: str) -> jax.Array:
    """See ``api.sefp_truncate``: a thread holds one or two columns of a group in registers between reading and writing them."""
    inner, columns = w.shape[-2:]
    across = 128 * max(1, 4 // w.dtype.itemsize)  # a word for each thread
    _checks.not_empty(w=w)
    if axis != w.ndim - 2:
        raise NotImplementedError(
            f"groups must lie along the last axis but one; got axis {axis} of {w.ndim}"
        )
    if rounding != "truncate":
        raise NotImplementedError(f"the kernel cuts off; got rounding {rounding!r}")
    if w.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"w must be float32 or bfloat16; got {w.dtype}")
    if inner % GROUP or columns % across:
        raise NotImplementedError(
            f"K must be a multiple of {GROUP} and N of {across}; got {inner} and {columns}"
        )
    interpret = _pallas.interpret_gpu()
    flat = w.reshape(-1, columns)

    layout = _columns(across)

    def kernel(width_ref, w_ref, out_ref):
        rows = pl.ds(lax.axis_index("group") * GROUP, GROUP)
        part = rows, pl.ds(lax.axis_index("part") * across, across)
        group = _load(w_ref.at[part], layout, interpret).astype(jnp.float32)
        out_ref[part] = _truncated(group, width_ref[0]).astype(w.dtype)

    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(flat.shape, w.dtype),
        grid=(columns // across, flat.shape[0] // GROUP),
        grid_names=("part", "group"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=_pallas.WARPGROUP),
        interpret=interpret,
    )(width.reshape(1), flat)
    return out.reshape(w.shape)


def _columns(across: int) -> Any:
    """[64, across] numbers so that a thread has all 64 of one column, or of several neighbours."""
    return plgpu.Layout.TILED(
        plgpu.Tiling(((GROUP, across), (across // 4,), (across // 128,))),
        warp_dims=(-3,),
        lane_dims=(-2,),
        vector_dim=-1,
    )


def _truncated(w: jax.Array, width: jax.Array) -> jax.Array:
    """What ``format.quantized`` computes, of float32 [64, N], in operations that the lowering knows."""
    infinity, largest = jnp.int32(0x7F80_0000), jnp.int32(0x477F_E000)  # 65504
    bits = lax.bitcast_convert_type(w, jnp.int32) & 0x7FFF_FFFF
    bits = jnp.where(bits == infinity, largest, bits)
    bits = jnp.where(bits > infinity, 0, bits)
    magnitude = lax.bitcast_convert_type(bits, jnp.float32)
    exponent = (lax.bitcast_convert_type(magnitude.max(0), jnp.int32) >> 23) - 126
    exponent = jnp.minimum(jnp.maximum(exponent, sefp.LOWEST_EXPONENT), sefp.HIGHEST_EXPONENT)

    def every(column):
        return lax.broadcast_in_dim(column, w.shape, (1,))

    most = power_of_two(jnp.broadcast_to(width, exponent.shape)) - 1.0
    scaled = jnp.minimum(magnitude * every(power_of_two(width - exponent)), every(most))
    whole = scaled.astype(jnp.int32).astype(jnp.float32)  # cut off
    value = whole * every(power_of_two(exponent - width))
    value = jnp.where(w < 0, 0.0 - value, value)  # 0 - 0 is no negative zero
    return jnp.where(w == w, value, w)  # NaN stays
