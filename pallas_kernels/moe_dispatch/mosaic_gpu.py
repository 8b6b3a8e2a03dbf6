"""Hopper kernels for dispatch and combine: rows move between memories by TMA, several in flight.

A block loads a token once and stores it to all its rows, so that dispatch reads T rows, not T * A; combine reads T * A and writes
T. Blocks stay for the whole kernel and take every n-th token. Each has a ring of rows in shared memory that loads go to, ``depth``
rows ahead. One row more holds zeros: what is missing is stored or added from there, whatever else memory holds.
Forward only: ``api`` supplies the gradients, which are the same two movements with the roles exchanged.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _checks, _pallas
from pallas_kernels.moe_dispatch import config as configs
from pallas_kernels.moe_dispatch import reference
from pallas_kernels.moe_dispatch.payload import Payload, encode

_LANES = 128  # a TMA box is at most 256 elements wide and high, so a row is seen as [D / 128, 128]
_ALIGNED = (
    128  # bytes that TMA wants multiples of in shared memory, and numbers that a warpgroup does
)

# How a warpgroup holds [tiles, tile] numbers, four neighbours a thread, so that each tile lies within one warp.
_LAYOUTS = {
    128: plgpu.Layout.TILED(
        plgpu.Tiling(((4, 128), (4,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
    ),
    64: plgpu.Layout.TILED(
        plgpu.Tiling(((8, 64), (2, 64), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
    ),
}


def gather_rows(
    x: jax.Array,
    index: jax.Array,
    target: jax.Array,
    payload: Payload | None = None,
    *,
    config: configs.Config | None = None,
) -> tuple[jax.Array, ...]:
    """out[r] = x[index[r]], encoded; a negative index gives a row of zeros.

    Goes by ``target``: a token is read and encoded once and stored to all its rows.

    Args:
      x: [T, D], with D a multiple of 128; of 512 to encode in the kernel.
      index: see ``reference.gather_rows``.
      target: see there.
      payload: see there.
      config: the pipeline; None for the heuristic's.

    Returns:
      (rows [R, D],), or (values, scales).

    Raises:
      NotImplementedError: for rows that TMA cannot move whole or shared memory cannot hold, and off Hopper.
    """
    interpret = _pallas.interpret_gpu()
    _checks.not_empty(x=x, index=index)
    if payload is not None and _fuses(x.shape[1], payload):
        chosen = config or configs.of_rows("encode", x.shape[1] * x.dtype.itemsize)
        if chosen.fuse:
            return _encode_rows(x, target, payload, chosen, interpret)
    values, *scales = encode(x, payload)
    config = config or configs.of_rows("copy", values.shape[1] * values.dtype.itemsize)
    rows = _copy_rows(values, target, config, interpret)
    # Rows of scales are a few hundred bytes: XLA's gather keeps more of them in flight than TMA would.
    return rows, *(reference.gather(s, index) for s in scales)


def weighted_sum(
    rows: jax.Array,
    position: jax.Array,
    weights: jax.Array,
    *,
    config: configs.Config | None = None,
) -> jax.Array:
    """out[t] = sum_k weights[t, k] * rows[position[t, k]], added in the order of k, in float32.

    Args:
      rows: [R, D], with D a multiple of 128.
      position: [T, A] int32; a negative one adds nothing, whatever rows or weights hold there.
      weights: [T, A].
      config: the pipeline; None for the heuristic's.

    Raises:
      NotImplementedError: for rows that TMA cannot move whole, or registers or shared memory cannot hold, and off Hopper.
    """
    interpret = _pallas.interpret_gpu()
    tokens, active = position.shape
    if rows.shape[1] > 8192:
        raise NotImplementedError(
            f"sums of at most 8192 numbers stay in registers; D is {rows.shape[1]}"
        )
    if rows.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"rows are summed in float32, bfloat16 or float16; got {rows.dtype}"
        )
    _checks.not_empty(rows=rows, position=position)
    view = _view(rows)
    config = config or configs.of_rows("sum", rows.shape[1] * rows.dtype.itemsize)
    row = jax.ShapeDtypeStruct(view.shape[1:], rows.dtype)
    [out] = _call(
        functools.partial(
            _sum_kernel, tokens=tokens, active=active, config=config, layouts=not interpret
        ),
        [jax.ShapeDtypeStruct((tokens, *row.shape), row.dtype)],
        [_ring(row, config.depth + 1), _ring(row, config.stores)],
        config,
        interpret,
    )(view, position.reshape(-1), weights.astype(jnp.float32).reshape(-1))
    return out.reshape(tokens, rows.shape[1])


def _view(x: jax.Array, lanes: int = _LANES) -> jax.Array:
    size = x.shape[1]
    if size % lanes or size // lanes > 256:
        raise NotImplementedError(
            f"TMA moves rows of whole {lanes} elements, at most 256 times as many; D is {size}"
        )
    return x.reshape(x.shape[0], size // lanes, lanes)


def _ring(row: jax.ShapeDtypeStruct, places: int) -> Any:
    """Shared memory for rows; a one-dimensional row is followed by padding, which aligns the next."""
    shape = row.shape if len(row.shape) > 1 else (math.ceil(row.size / _ALIGNED) * _ALIGNED,)
    return plgpu.SMEM((places, *shape), row.dtype)


def _place(ring: Any, place: jax.Array, row: Any) -> Any:
    """The row at a place of a ring that may be padded."""
    return ring.at[place] if len(row.shape) > 1 else ring.at[place, pl.ds(0, row.shape[0])]


def _clear(ring: Any, place: int, layouts: bool) -> None:
    """Fills a place with zeros; ``layouts`` off for the simulator, which knows none."""
    shape = ring.shape[1:]
    zeros = jnp.zeros(shape, ring.dtype)
    if layouts:
        # Stated, because what a thread stores at once must divide what it holds.
        vector = math.gcd(math.prod(shape) // 128, 8 // ring.dtype.itemsize)
        zeros = plgpu.layout_cast(zeros, plgpu.Layout.WG_STRIDED(shape, vec_size=vector))
    ring[place] = zeros


def _call(
    body: Callable[..., None],
    outputs: Sequence[jax.ShapeDtypeStruct],
    rings: Sequence[Any],
    config: configs.Config,
    interpret: Any,
) -> Callable[..., Any]:
    sizes = (math.prod(ring.shape) * jnp.dtype(ring.dtype).itemsize for ring in rings)
    needed = sum(math.ceil(size / 1024) * 1024 for size in sizes)
    if needed > configs.MOST:
        raise NotImplementedError(
            f"a block has {configs.MOST} bytes of shared memory for rows; {config} needs {needed}"
        )
    return plgpu.kernel(
        body,
        out_type=list(outputs),
        scratch_types=[plgpu.Barrier(num_barriers=config.depth), *rings],
        grid=(config.blocks * _pallas.multiprocessors(),),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=_pallas.WARPGROUP),
        interpret=interpret,
    )


def _share(tokens: int) -> tuple[jax.Array, Callable[[Any], jax.Array]]:
    """(how many tokens are this block's, which is its i-th): every n-th, so that neighbours move at one time."""
    block, blocks = lax.axis_index("block"), lax.axis_size("block")
    return lax.div(tokens - block + blocks - 1, jnp.int32(blocks)), lambda i: block + i * blocks


def _start(load: Callable[[Any], None], depth: int, count: jax.Array) -> None:
    for i in range(depth):
        pl.when(i < count)(functools.partial(load, i))


def _copy_rows(x, target, config, interpret):
    view = _view(x)
    row = jax.ShapeDtypeStruct(view.shape[1:], x.dtype)
    [rows] = _call(
        functools.partial(
            _copy_kernel,
            tokens=x.shape[0],
            copies=target.shape[1],
            config=config,
            layouts=not interpret,
        ),
        [jax.ShapeDtypeStruct((target.size, *row.shape), row.dtype)],
        [_ring(row, config.depth + 1)],
        config,
        interpret,
    )(view, target.reshape(-1))
    return rows.reshape(target.size, x.shape[1])


def _encode_rows(x, target, payload, config, interpret):
    view = _view(x, payload.tile)
    row = jax.ShapeDtypeStruct(view.shape[1:], x.dtype)
    encoded = jax.eval_shape(payload.encode, jax.ShapeDtypeStruct(row.shape, jnp.float32))
    body = functools.partial(
        _encode_kernel,
        tokens=x.shape[0],
        copies=target.shape[1],
        config=config,
        encode=payload.encode,
        layout=None if interpret else _LAYOUTS[payload.tile],  # the simulator knows none
    )
    parts = _call(
        body,
        [jax.ShapeDtypeStruct((target.size, *part.shape), part.dtype) for part in encoded],
        [_ring(row, config.depth), *(_ring(part, config.stores + 1) for part in encoded)],
        config,
        interpret,
    )(view, target.reshape(-1))
    return tuple(part.reshape(target.size, -1) for part in parts)


def _fuses(size: int, payload: Payload) -> bool:
    """Whether a warpgroup can hold and encode a row of ``size`` numbers, and TMA store what comes of it."""
    return payload.fuses and payload.tile in _LAYOUTS and size % 512 == 0 and size <= 8192


def _row(target: Any, pair: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the row of a pair, whether it is zeros)."""
    row = target[pair]
    missing = row < 0
    return jnp.where(missing, -1 - row, row), missing


def _copy_kernel(x, target, out, loaded, ring, *, tokens, copies, config, layouts):
    depth, stores = config.depth, config.stores
    count, token_of = _share(tokens)
    _clear(ring, depth, layouts)
    plgpu.commit_smem()

    def load(i):
        place = lax.rem(jnp.int32(i), depth)
        plgpu.copy_gmem_to_smem(x.at[token_of(i)], ring.at[place], loaded.at[place])

    _start(load, depth, count)

    @pl.loop(0, count)
    def _(i):
        place = lax.rem(i, depth)
        plgpu.barrier_wait(loaded.at[place])
        for a in range(copies):
            row, missing = _row(target, token_of(i) * copies + a)
            source = ring.at[jnp.where(missing, depth, place)]
            plgpu.copy_smem_to_gmem(source, out.at[row], commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        # All stores but those of the last `stores` tokens have read their row: a load may replace it.
        plgpu.wait_smem_to_gmem(stores, wait_read_only=True)
        later = i - stores + depth
        pl.when((i >= stores) & (later < count))(functools.partial(load, later))

    plgpu.wait_smem_to_gmem(0)


def _encode_kernel(x, target, *refs, tokens, copies, config, encode, layout):
    parts = (len(refs) - 2) // 2
    outs, (loaded, ring), stored = refs[:parts], refs[parts : parts + 2], refs[parts + 2 :]
    depth, stores = config.depth, config.stores
    count, token_of = _share(tokens)
    for kept in stored:
        _clear(kept, stores, layout is not None)

    def load(i):
        place = lax.rem(jnp.int32(i), depth)
        plgpu.copy_gmem_to_smem(x.at[token_of(i)], ring.at[place], loaded.at[place])

    _start(load, depth, count)

    @pl.loop(0, count)
    def _(i):
        place, kept_at = lax.rem(i, depth), lax.rem(i, stores)
        plgpu.barrier_wait(loaded.at[place])
        tiles = ring[place]
        if layout is not None:
            tiles = plgpu.layout_cast(tiles, layout)
        pl.when(i + depth < count)(functools.partial(load, i + depth))
        encoded = encode(tiles.astype(jnp.float32))
        plgpu.wait_smem_to_gmem(stores - 1, wait_read_only=True)
        for kept, part in zip(stored, encoded, strict=True):
            _place(kept, kept_at, part)[...] = part
        plgpu.commit_smem()
        for a in range(copies):
            row, missing = _row(target, token_of(i) * copies + a)
            for kept, out, part in zip(stored, outs, encoded, strict=True):
                source = _place(kept, jnp.where(missing, stores, kept_at), part)
                plgpu.copy_smem_to_gmem(source, out.at[row], commit_group=False)
        plgpu.commit_smem_to_gmem_group()

    plgpu.wait_smem_to_gmem(0)


def _sum_kernel(
    rows, position, weights, out, loaded, ring, sums, *, tokens, active, config, layouts
):
    depth, stores = config.depth, config.stores
    count, token_of = _share(tokens)
    pairs = count * active
    _clear(ring, depth, layouts)

    def load(i):
        """Row i of this block's, if there is one; ``add`` then waits for it."""
        i, place = jnp.int32(i), lax.rem(jnp.int32(i), depth)
        at = position[token_of(lax.div(i, active)) * active + lax.rem(i, active)]

        @pl.when(at >= 0)
        def _():
            plgpu.copy_gmem_to_smem(rows.at[at], ring.at[place], loaded.at[place])

    _start(load, depth, pairs)

    @pl.loop(0, count)
    def _(n):
        token = token_of(n)

        def add(k, total):
            pair, i = token * active + k, n * active + k
            place, missing = lax.rem(i, depth), position[pair] < 0
            pl.when(jnp.logical_not(missing))(lambda: plgpu.barrier_wait(loaded.at[place]))
            row = ring[jnp.where(missing, depth, place)].astype(jnp.float32)
            total = total + jnp.where(missing, jnp.float32(0), weights[pair]) * row
            pl.when(i + depth < pairs)(functools.partial(load, i + depth))
            return total

        total = lax.fori_loop(0, active, add, jnp.zeros(out.shape[1:], jnp.float32))
        place = lax.rem(n, stores)
        plgpu.wait_smem_to_gmem(stores - 1, wait_read_only=True)
        sums[place] = total.astype(sums.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(sums.at[place], out.at[token])

    plgpu.wait_smem_to_gmem(0)
