"""Hopper kernel: attention to rows that are read where they lie, by index.

A block of threads has 64 heads of a query and walks over its rows 64 at a time. One warpgroup copies the chosen rows into shared
memory (``_rows_ptx``), two rows' blocks in turn; the other two multiply. 64 heads x 512 values of float32 are more than one
warpgroup's registers, so each sums its half of the values, and both compute all logits: 3328 clocks of the tensor cores for
64 rows instead of 2176, but neither waits for the other, so that one's softmax runs beside the other's products.
Rows are read from HBM once; the blocks of threads with the query's other heads run beside and find them in the L2 cache.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _pallas, cache_rows
from pallas_kernels.sparse_mla import _numbers_ptx, _rows_ptx, addresses, gradient
from pallas_kernels.sparse_mla import config as configs
from pallas_kernels.sparse_mla.config import BLOCK, HEADS
from pallas_kernels.sparse_mla.merge import merge_partials

_CONSUMERS = 2
_SLOTS = 2  # blocks of rows in shared memory
_LOWEST = -1e30  # instead of -inf, whose difference to itself is NaN


@gradient.differentiable
def sparse_mla(
    q: jax.Array, kv: jax.Array, indices: jax.Array, scale: float, value_dim: int
) -> tuple[jax.Array, jax.Array]:
    """See ``api.sparse_mla``."""
    interpret = _pallas.interpret_gpu()
    rows = addresses.chosen_of_sequences(kv, indices)
    return _over_tokens(q, rows, scale, value_dim, interpret)


@gradient.differentiable_step
def sparse_mla_step(
    q: jax.Array,
    cached: jax.Array,
    layer: jax.Array | int,
    own: jax.Array,
    rows: jax.Array,
    pages: jax.Array | None,
    scale: float,
    value_dim: int,
) -> tuple[jax.Array, jax.Array]:
    """See ``api.sparse_mla_step``."""
    interpret = _pallas.interpret_gpu()
    chosen = addresses.chosen_of_step(cached, layer, own, rows, pages)
    return _over_tokens(q, chosen, scale, value_dim, interpret)


def _over_tokens(q, rows, scale, value_dim, interpret):
    out, lse = attend(q.reshape(-1, *q.shape[2:]), rows, scale, value_dim, interpret=interpret)
    return out.reshape(*q.shape[:3], value_dim), lse.reshape(q.shape[:3])


def attend(
    q: jax.Array,
    rows: addresses.Chosen,
    scale: float,
    value_dim: int,
    *,
    config: configs.Config | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of every query to its rows.

    Args:
      q: [Q, H, C] bfloat16.
      rows: bfloat16, or uint8 with 512 values (``cache_rows``).
      scale: softmax scale.
      value_dim: V.
      config: None for the heuristic's.
      interpret: of ``plgpu.kernel``.

    Returns:
      out [Q, H, V] bfloat16, lse [Q, H] float32.

    Raises:
      NotImplementedError: for other types and sizes.
    """
    check(q, rows, value_dim)
    queries, heads, _ = q.shape
    columns = rows.numbers.shape[1]
    head_blocks = -(-heads // HEADS)
    if config is None:
        config = configs.of_call(
            queries * head_blocks,
            columns,
            _pallas.multiprocessors(),
            eight_bit=rows.cached.dtype == jnp.uint8,
        )
    splits = config.splits
    padded = -(-columns // (splits * BLOCK)) * splits * BLOCK
    if padded // splits > configs.MOST_COLUMNS:
        raise NotImplementedError(
            f"at most {configs.MOST_COLUMNS} indices of a query per split; got {columns} in {splits}"
        )
    numbers = jnp.pad(rows.numbers, ((0, 0), (0, padded - columns)), constant_values=-1)
    q = jnp.pad(q, ((0, 0), (0, head_blocks * HEADS - heads), (0, 0)))
    per_split = padded // splits
    kernel = _Kernel(
        dtype=q.dtype,
        heads=q.shape[1],
        size=q.shape[2],
        columns=per_split,
        log2_scale=scale * math.log2(math.e),
        rows=rows,
        value_dim=value_dim,
        config=config,
        interpret=interpret,
    )
    out, lse = kernel(
        q,
        rows.cached,
        rows.own,
        numbers.reshape(queries * splits, per_split // BLOCK, BLOCK),
        rows.pages,
        rows.layer.reshape(1),
    )
    out, lse = out[:, :, :heads], lse[:, :, :heads]
    if splits == 1:
        return out[0], lse[0]
    out, lse = merge_partials([(out[i], lse[i]) for i in range(splits)])
    return out.astype(q.dtype), lse


def check(q: jax.Array, rows: addresses.Chosen, value_dim: int) -> None:
    """Raises NotImplementedError for what the kernel cannot do."""
    size, table = q.shape[2], rows.cached
    if q.dtype != jnp.bfloat16 or table.dtype not in (jnp.bfloat16, jnp.uint8):
        raise NotImplementedError(
            f"queries must be bfloat16, rows bfloat16 or 8-bit; got {q.dtype} and {table.dtype}"
        )
    if size % 64 or value_dim % 128 or value_dim > 512 or size > 576:
        raise NotImplementedError(
            f"rows must be at most 576 wide, a multiple of 64, with a multiple of 128 and at most 512 values; got {size} with {value_dim}"
        )
    if table.dtype == jnp.uint8 and value_dim != 512:
        raise NotImplementedError(f"8-bit rows must have 512 values; got {value_dim}")
    if 0 in q.shape or 0 in rows.numbers.shape or table.shape[0] == 0:
        raise NotImplementedError(f"nothing to do; got q {q.shape}, rows {table.shape}")


class _Scratch(NamedTuple):
    """Of a block of threads: queries, rows and their addresses in shared memory, and the barriers between its warpgroups."""

    queries: Any  # [HEADS, C]
    rows: Any  # [_SLOTS, BLOCK, C]
    addresses: Any  # [steps, BLOCK]; row numbers at first
    last: Any  # what ``_steps`` goes by
    queries_ready: Any
    numbers_ready: Any
    addressed: Any
    full: Any  # [_SLOTS]
    empty: Any  # [_SLOTS]
    done: Any  # with the rows


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """What is static of a call.

    Attributes:
      dtype: of queries and rows in shared memory.
      heads: H, a multiple of HEADS.
      size: C.
      columns: K of a split.
      log2_scale: what turns products into logits to base 2.
      rows: what is asked for; its arrays are not used.
      value_dim, config, interpret: as in ``attend``.
    """

    dtype: Any
    heads: int
    size: int
    columns: int
    log2_scale: float
    rows: addresses.Chosen
    value_dim: int
    config: configs.Config
    interpret: Any

    def __call__(
        self, q: jax.Array, cached: jax.Array, own: jax.Array, numbers: jax.Array, *table: jax.Array
    ) -> list[jax.Array]:
        """out [splits, Q, H, V], lse [splits, Q, H] of q [Q, H, C], both tables, numbers [Q * splits, steps, BLOCK],
        pages [B, W] and layer [1]."""
        splits, shape = self.config.splits, (self.config.splits, *q.shape[:2])
        barrier, both = plgpu.Barrier, functools.partial(plgpu.Barrier, num_arrivals=_CONSUMERS)
        return plgpu.kernel(
            self.body,
            out_type=[
                jax.ShapeDtypeStruct(
                    (*shape, self.value_dim), self.dtype if splits == 1 else jnp.float32
                ),
                jax.ShapeDtypeStruct(shape, jnp.float32),
            ],
            scratch_types=_Scratch(
                plgpu.SMEM((HEADS, self.size), self.dtype, transforms=_pallas.SWIZZLED),
                plgpu.SMEM((_SLOTS, BLOCK, self.size), self.dtype, transforms=_pallas.SWIZZLED),
                plgpu.SMEM((self.columns // BLOCK, BLOCK), jnp.int32),
                plgpu.SMEM((_numbers_ptx.WARPS,), jnp.int32),
                *(barrier(), barrier(), barrier(), barrier(num_barriers=_SLOTS)),
                both(num_barriers=_SLOTS),
                both(),
            ),
            grid=(q.shape[0] * splits * (self.heads // HEADS),),
            grid_names=("block",),
            num_threads=_CONSUMERS + 1,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(
                lowering_semantics=_pallas.WARPGROUP,
                approx_math=True,
                reduction_scratch_bytes=512,  # less than the default: only threads of a warp reduce
            ),
            interpret=self.interpret,
        )(q, cached, own, numbers, *table)

    def body(self, q, cached, own, numbers, pages, layer, out, lse, *scratch):
        """Of a block of threads: one warpgroup copies, the others compute."""
        scratch = _Scratch(*scratch)
        # The blocks of a query's heads are neighbours: they read the same rows at the same time.
        head_blocks, splits = self.heads // HEADS, self.config.splits
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        part, head = lax.div(block, head_blocks), lax.rem(block, head_blocks)
        query, split = lax.div(part, splits), lax.rem(part, splits)
        heads = pl.ds(head * HEADS, HEADS)

        @pl.when(warpgroup == _CONSUMERS)
        def _copy():
            if self.interpret is None:
                plgpu.set_max_registers(self.config.producer_registers, action="decrease")
            plgpu.copy_gmem_to_smem(numbers.at[part], scratch.addresses, scratch.numbers_ready)
            plgpu.copy_gmem_to_smem(q.at[query, heads], scratch.queries, scratch.queries_ready)
            plgpu.barrier_wait(scratch.numbers_ready)
            self.address(scratch, pages, layer, query)
            plgpu.commit_smem()
            plgpu.barrier_arrive(scratch.addressed)
            self.copy(scratch, cached, own)

        @pl.when(warpgroup < _CONSUMERS)
        def _compute():
            if self.interpret is None:
                plgpu.set_max_registers(self.config.consumer_registers, action="increase")
            plgpu.barrier_wait(scratch.addressed)
            plgpu.barrier_wait(scratch.queries_ready)
            self.attend(scratch, out.at[split, query, heads], lse.at[split, query, heads])

    def address(self, scratch, pages, layer, query):
        """Numbers in shared memory become addresses."""
        numbering = self.rows.numbering
        sequence = lax.div(query, numbering.queries)
        operands = pages.at[sequence], layer[0], self.rows.own_begin(sequence), numbering
        simulated = _address_rows_simulated
        replace = simulated if self.interpret is not None else _numbers_ptx.address_rows
        replace(scratch.addresses, scratch.last, *operands)

    def copy(self, scratch, cached, own):
        """Blocks of rows, each when its slot is empty."""
        steps = _steps(scratch.last)

        @pl.loop(0, steps)
        def _(i):
            slot = lax.rem(i, _SLOTS)
            if self.config.prefetch and self.interpret is None:

                @pl.when(i + 1 < steps)
                def _():
                    _rows_ptx.prefetch_rows(cached, own, scratch.addresses.at[i + 1])

            @pl.when(i >= _SLOTS)
            def _():
                plgpu.barrier_wait(scratch.empty.at[slot])

            operands = cached, own, scratch.addresses.at[i], scratch.rows.at[slot]
            if self.interpret is None:
                _rows_ptx.copy_rows(*operands, _pallas.SWIZZLED, self.value_dim)
            else:
                _copy_rows_simulated(*operands, self.value_dim)
            plgpu.commit_smem()
            plgpu.barrier_arrive(scratch.full.at[slot])

        @pl.loop(jnp.maximum(steps - _SLOTS, 0), steps)
        def _(i):
            plgpu.barrier_wait(scratch.empty.at[lax.rem(i, _SLOTS)])

    @property
    def half(self) -> int:
        """Values that a warpgroup sums."""
        return self.value_dim // _CONSUMERS

    def attend(self, scratch, out_ref, lse_ref):
        """A warpgroup's half of the values [HEADS, V], and lse [HEADS]."""
        warpgroup = lax.axis_index("warpgroup")
        start = (
            jnp.zeros((HEADS, self.half), jnp.float32),
            jnp.full((HEADS,), _LOWEST, jnp.float32),
            jnp.zeros((HEADS,), jnp.float32),
        )
        step = functools.partial(self.step, scratch=scratch)
        out, peak, total = lax.fori_loop(0, _steps(scratch.last), step, start)
        safe = jnp.where(total > 0, total, jnp.float32(1))
        out = out * lax.broadcast_in_dim(1 / safe, out.shape, [0])
        values = pl.ds(pl.multiple_of(warpgroup * self.half, 64), self.half)
        if self.config.splits > 1:
            out_ref[:, values] = out
        else:
            plgpu.barrier_arrive(scratch.done)
            plgpu.barrier_wait(scratch.done)  # the other one reads rows until here
            _store(out, scratch.rows.at[0, :, values], out_ref.at[:, values])

        @pl.when(warpgroup == 0)
        def _():
            lse = peak * math.log(2) + jnp.log(safe)
            lse_ref[...] = jnp.where(total > 0, lse, -jnp.inf)

    def step(self, i, carry, scratch):
        """One block of rows: (out [HEADS, half], peak, total [HEADS]) with it; the peak in units of log2."""
        out, peak, total = carry
        slot = lax.rem(i, _SLOTS)
        plgpu.barrier_wait(scratch.full.at[slot])

        logits = _logits(scratch.queries, scratch.rows.at[slot], self.interpret)
        bias = jnp.where(scratch.addresses[i] >= 0, jnp.float32(0), jnp.float32(-jnp.inf))
        logits = logits * self.log2_scale + lax.broadcast_in_dim(bias, logits.shape, [1])
        before, peak = peak, jnp.maximum(peak, logits.max(axis=1))
        weights = jnp.exp2(logits - lax.broadcast_in_dim(peak, logits.shape, [0]))
        share = jnp.exp2(before - peak)
        total = total * share + weights.sum(axis=1)
        out = out * lax.broadcast_in_dim(share, out.shape, [0])
        weights = weights.astype(self.dtype)
        begin = pl.multiple_of(lax.axis_index("warpgroup") * self.half, 64)

        values = scratch.rows.at[slot, :, pl.ds(begin, self.half)]
        out = _add_product(out, weights, values, self.interpret)
        plgpu.barrier_arrive(scratch.empty.at[slot])
        return out, peak, total


def _store(out, shared, target):
    """By TMA: a thread has two neighbours, which are less than memory writes at once."""
    shared[...] = out.astype(shared.dtype)
    plgpu.commit_smem()
    # Of some of a block's columns no more lie together than the height of a tile.
    for first in range(0, HEADS, 8):
        lines = pl.ds(first, 8)
        plgpu.copy_smem_to_gmem(shared.at[lines], target.at[lines])
    plgpu.wait_smem_to_gmem(0)


def _steps(last):
    """Blocks of rows up to the last one that is chosen."""
    used = functools.reduce(jnp.maximum, (last[i] for i in range(_numbers_ptx.WARPS)))
    return lax.div(used + (BLOCK - 1), BLOCK)


def _logits(q, rows, interpret):
    """``q @ rows.T``."""
    if interpret is not None:  # JAX's simulator multiplies by no transposed reference.
        product = (((1,), (1,)), ((), ()))
        return lax.dot_general(q[...], rows[...], product, preferred_element_type=jnp.float32)

    def multiply(logits):
        plgpu.wgmma(logits, q, rows.T)
        return logits[...]

    return pl.run_scoped(multiply, plgpu.ACC((HEADS, BLOCK), jnp.float32))


def _add_product(out, weights, values, interpret):
    """``out + weights @ values``, in wgmma's accumulator."""
    if interpret is not None:  # JAX's simulator has no accumulator that starts from a value.
        product = jnp.dot(weights, values[...], preferred_element_type=jnp.float32)
        return out + product

    def add(accumulator):
        plgpu.wgmma(accumulator, weights, values)

    return pl.run_state(add)(plgpu.ACC.init(out))


def _copy_rows_simulated(cached, own, index, block, values):
    """``_rows_ptx.copy_rows`` row by row, for JAX's simulator, which has no PTX."""
    count = cached.shape[0]

    @pl.loop(0, BLOCK)
    def _(r):
        number = index[r]
        old = cached[jnp.clip(number, 0, count - 1)]
        new = own[jnp.clip(number - count, 0, own.shape[0] - 1)]
        row = cache_rows.decode(jnp.where(number >= count, new, old), values, block.dtype)
        block[r] = jnp.where(number >= 0, row, jnp.zeros_like(row))


def _address_rows_simulated(numbers, last, pages, layer, own_begin, numbering):
    """``_numbers_ptx.address_rows`` for JAX's simulator."""
    values = numbers[...]
    place = jnp.arange(1, values.size + 1, dtype=jnp.int32).reshape(values.shape)
    last[...] = jnp.full(last.shape, jnp.where(values >= 0, place, 0).max())
    numbers[...] = addresses.address_of(values, pages[...], own_begin, layer, numbering)
