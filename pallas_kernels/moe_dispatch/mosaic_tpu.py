"""TPU kernels for dispatch and combine, as scalar-prefetch gathers.

The index arrays are prefetched scalars that choose which row the pipeline fetches next, so that a row
moves from memory to memory once. Off TPU they run in the simulator, by name only.
Forward only: ``api`` supplies the gradients, which are the same two movements with the roles exchanged.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _checks, _pallas
from pallas_kernels.moe_dispatch.payload import Payload, encode


def gather_rows(
    x: jax.Array, index: jax.Array, target: jax.Array, payload: Payload | None = None
) -> tuple[jax.Array, ...]:
    """out[r] = x[index[r]]; a negative index gives a row of zeros. See ``reference``."""
    del target
    _checks.not_empty(x=x, index=index)
    return tuple(_gather(part, index) for part in encode(x, payload))


def _gather(x: jax.Array, index: jax.Array) -> jax.Array:
    size = x.shape[1]

    def kernel(index_ref, x_ref, out_ref):
        valid = index_ref[pl.program_id(0)] >= 0
        out_ref[...] = jnp.where(valid, x_ref[...], jnp.zeros_like(x_ref))

    out = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((index.shape[0], 1, size), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(index.shape[0],),
            # Rows get a unit axis: TPU blocks must cover the last two dimensions whole.
            in_specs=[
                pl.BlockSpec((1, 1, size), lambda r, index: (jnp.maximum(index[r], 0), 0, 0))
            ],
            out_specs=pl.BlockSpec((1, 1, size), lambda r, index: (r, 0, 0)),
        ),
        interpret=_pallas.interpret_tpu(),
        name="dispatch_gather_rows",
    )(index, x[:, None, :])
    return out[:, 0]


def weighted_sum(rows: jax.Array, position: jax.Array, weights: jax.Array) -> jax.Array:
    """out[t] = sum_k weights[t, k] * rows[position[t, k]], added in the order of k, in float32."""
    tokens, active = position.shape
    size = rows.shape[1]
    _checks.not_empty(rows=rows, position=position)

    def kernel(position_ref, weight_ref, row_ref, out_ref):
        t, k = pl.program_id(0), pl.program_id(1)

        @pl.when(k == 0)
        def _():
            out_ref[...] = jnp.zeros_like(out_ref)

        # A missing term is replaced, not multiplied by zero: what lies there may be inf or NaN.
        term = weight_ref[t * active + k] * row_ref[...].astype(jnp.float32)
        out_ref[...] += jnp.where(position_ref[t * active + k] >= 0, term, jnp.zeros_like(term))

    def row_index(t, k, position, weight):
        return jnp.maximum(position[t * active + k], 0), 0, 0

    out = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((tokens, 1, size), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(tokens, active),
            in_specs=[pl.BlockSpec((1, 1, size), row_index)],
            out_specs=pl.BlockSpec((1, 1, size), lambda t, k, position, weight: (t, 0, 0)),
        ),
        interpret=_pallas.interpret_tpu(),
        name="combine_weighted_sum",
    )(position.reshape(-1), weights.astype(jnp.float32).reshape(-1), rows[:, None, :])
    return out[:, 0].astype(rows.dtype)
