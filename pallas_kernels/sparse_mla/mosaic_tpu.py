"""TPU kernel: rows are fetched by index, a block at a time, each by a copy of its own, and attended to as they come."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _pallas
from pallas_kernels.numerics import precision_of
from pallas_kernels.sparse_mla import addresses, gradient

BLOCK = 128  # rows in flight and in one product


@gradient.differentiable
def sparse_mla(
    q: jax.Array, kv: jax.Array, indices: jax.Array, scale: float, value_dim: int
) -> tuple[jax.Array, jax.Array]:
    """See ``api.sparse_mla``."""
    return _attend(q, addresses.of_sequences(kv, indices), scale, value_dim)


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
    if cached.dtype == jnp.uint8:
        raise NotImplementedError("the kernel does not decode 8-bit rows")
    return _attend(q, addresses.of_step(cached, layer, own, rows, pages), scale, value_dim)


def _attend(q, rows, scale, value_dim):
    interpret = _pallas.interpret_tpu()
    batch, tokens, heads, size = q.shape
    if 0 in q.shape or 0 in rows.address.shape or 0 in rows.cached.shape:
        raise NotImplementedError(f"nothing to do; got q {q.shape}, rows {rows.cached.shape}")
    queries, columns = rows.address.shape
    block = min(BLOCK, columns)
    steps = -(-columns // block)
    address = jnp.pad(
        rows.address, ((0, 0), (0, steps * block - columns)), constant_values=-1
    ).reshape(queries, steps, 1, block)
    # Rows of one tile's height of their own.
    table, own = rows.cached[:, None], rows.own[:, None]
    per_query = lambda *shape: pl.BlockSpec(  # noqa: E731
        (1, *shape), lambda i, j: (i, *[0] * len(shape))
    )
    block_of_addresses = functools.partial(
        pl.BlockSpec, (1, 1, 1, block), lambda i, j: (i, j, 0, 0)
    )
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    out, lse = pl.pallas_call(
        functools.partial(_body, scale=scale, value_dim=value_dim, count=table.shape[0]),
        out_shape=(
            jax.ShapeDtypeStruct((queries, heads, value_dim), q.dtype),
            jax.ShapeDtypeStruct((queries, heads, 1), jnp.float32),
        ),
        grid=(queries, steps),
        in_specs=[
            block_of_addresses(memory_space=pltpu.SMEM),
            block_of_addresses(),
            per_query(heads, size),
            anywhere,
            anywhere,
        ],
        out_specs=(per_query(heads, value_dim), per_query(heads, 1)),
        scratch_shapes=[
            pltpu.VMEM((block, 1, size), table.dtype),
            pltpu.VMEM((heads, value_dim), jnp.float32),
            pltpu.VMEM((heads, 1), jnp.float32),
            pltpu.VMEM((heads, 1), jnp.float32),
            pltpu.SemaphoreType.DMA(()),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="sparse_mla",
    )(address, address, q.reshape(queries, heads, size), table, own)
    return out.reshape(batch, tokens, heads, value_dim), lse.reshape(batch, tokens, heads)


def _body(
    address,
    columns,
    q_ref,
    cached,
    own,
    out_ref,
    lse_ref,
    rows,
    sums,
    peak,
    total,
    arrived,
    *,
    scale,
    value_dim,
    count,
):
    """One block of a query's rows; ``columns`` are its addresses as a vector, ``address`` as scalars."""
    step, block = pl.program_id(1), rows.shape[0]

    @pl.when(step == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)
        total[...] = jnp.zeros_like(total)
        peak[...] = jnp.full_like(peak, jnp.finfo(jnp.float32).min)

    def each(r, action):
        # A row that is not there is fetched from the first place, and masked below.
        number = jnp.maximum(address[0, 0, 0, r], 0)

        @pl.when(number < count)
        def _():
            action(pltpu.make_async_copy(cached.at[number], rows.at[r], arrived))

        @pl.when(number >= count)
        def _():
            action(pltpu.make_async_copy(own.at[number - count], rows.at[r], arrived))

    lax.fori_loop(0, block, lambda r, _: each(r, lambda copy: copy.start()), None)
    lax.fori_loop(0, block, lambda r, _: each(r, lambda copy: copy.wait()), None)

    q = q_ref[0]
    valid = columns[0, 0] >= 0
    kv = rows[:, 0].astype(q.dtype)
    kv = jnp.where(valid.reshape(block, 1), kv, jnp.zeros((), kv.dtype))
    dot = functools.partial(
        lax.dot_general, precision=precision_of(q.dtype), preferred_element_type=jnp.float32
    )
    logits = dot(q, kv, (((1,), (1,)), ((), ()))) * jnp.float32(scale)
    logits = jnp.where(valid, logits, -jnp.inf)
    before = peak[...]
    peak[...] = jnp.maximum(before, logits.max(-1, keepdims=True))
    share = jnp.exp(before - peak[...])
    weights = jnp.exp(logits - peak[...])
    total[...] = total[...] * share + weights.sum(-1, keepdims=True)
    product = dot(weights.astype(q.dtype), kv[:, :value_dim], (((1,), (0,)), ((), ())))
    sums[...] = sums[...] * share + product

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        some = total[...] > 0
        safe = jnp.where(some, total[...], 1.0)
        out_ref[0] = (sums[...] / safe).astype(out_ref.dtype)
        lse_ref[0] = jnp.where(some, jnp.log(safe) + peak[...], -jnp.inf)
