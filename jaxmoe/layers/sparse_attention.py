"""Core attention over a whole sequence in MLA's absorbed form: each query reads only the rows that were chosen for it.

Compute and memory grow with T * topk, forward and backward, where ``core_attention`` works on T * T pairs (spec 2.2, 3.4).
What still grows with T * T is the indexer's scoring, a query or a tile of them at a time.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from jaxmoe.layers.core_attention import Options, Result
from jaxmoe.layers.index_loss import SAVED as INDEX_SAVED
from jaxmoe.layers.index_loss import selected_kl
from jaxmoe.layers.indexer import IndexInputs
from pallas_kernels import index_topk, index_topk_step, sparse_mla
from pallas_kernels.sparse_mla.gradient import SAVED as CORE_SAVED

# A sequence longer than this many times topk is attended to by row, a shorter one masked: multiplying all rows in order
# can be faster than gathering some, as in V3.2's own masked mode for short prompts (spec 2.2). On CPU rows win from 4 times
# topk on for `small`, for `tiny` in training at 4 and in prefill at 8 times (docs/log.md, 2026-11-27); by arithmetic alone the
# two would cross at 4.2 times V3.2's topk (spec 3.4).
GATHER_FACTOR = 3

_CHOSEN = "sparse_selection"
# Residuals that rematerialised layers keep; the chosen rows (T * topk numbers) because choosing them takes T * T scores.
SAVED = (_CHOSEN, CORE_SAVED, INDEX_SAVED)


def gathers(length: int, topk: int | None, core: str | None = None) -> bool:
    """Whether whole sequences of ``length`` are attended to by row ("gathered") rather than masked; ``core`` overrides the rule."""
    if topk is None or topk >= length:  # nothing to choose
        return False
    return length > GATHER_FACTOR * topk if core is None else core == "gathered"


def choose(index: IndexInputs, topk: int, starts: jax.Array | None = None) -> jax.Array:
    """The ``topk`` best-scored rows that each query may see: int32 [B, T, topk], -1 where there are fewer.

    Args:
      index: indexer inputs of the whole sequence.
      topk: how many, below T.
      starts: [B, T] int32, first row of each query's document; None: one document.
    """
    index = lax.stop_gradient(index)
    if starts is None:
        return index_topk(*index, topk)
    batch, tokens, dim = index.k.shape
    end = jnp.broadcast_to(jnp.arange(1, tokens + 1, dtype=jnp.int32), (batch, tokens))
    return index_topk_step(
        index.q,
        jnp.zeros((1, batch, 0, dim), index.k.dtype),  # no cache: all keys are the step's own
        0,
        index.k,
        index.weights,
        jnp.zeros(batch, jnp.int32),
        topk,
        spans=jnp.stack([starts.astype(jnp.int32), end], -1),
    )


def _attend(q, kv, index, rows, starts, valid, *, options: Options, value_dim: int, heads_axis):
    """``sparse_attention`` of some sequences and heads; ``heads_axis`` is the mesh axis of the other heads, if any."""
    if rows is None:
        with jax.named_scope("select"):
            rows = checkpoint_name(choose(index, options.topk, starts), _CHOSEN)
    with jax.named_scope("core"):
        out, lse = sparse_mla(q, kv, rows, scale=options.scale, value_dim=value_dim)
    loss = jnp.zeros((), jnp.float32)
    if options.index_loss and index is not None:
        counted = rows if valid is None else jnp.where(valid[:, None, None], rows, -1)
        with jax.named_scope("index_loss"):
            loss = selected_kl(q, kv, lse, index, counted, options.scale, heads_axis)
    return out, rows, loss


def sparse_attention(
    q: jax.Array,
    kv: jax.Array,
    options: Options,
    *,
    value_dim: int,
    index: IndexInputs | None = None,
    selection: jax.Array | None = None,
    starts: jax.Array | None = None,
    valid: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> Result:
    """Causal attention of absorbed queries over the latent rows that the indexer chooses.

    Args:
      q: [B, T, H, C], latent part first, then the rotary part.
      kv: [B, T, C] latent rows.
      options: static choices; ``topk`` is set.
      value_dim: V, the latent part of a row.
      index: this layer's indexer inputs, if it has an indexer.
      selection: [B, T, topk] int32 rows of an earlier layer, to reuse instead of choosing.
      starts: [B, T] int32, first row of each query's document; None: one document.
      valid: [B] bool, sequences that count in the index loss; default all.
      mesh: over whose "data" and "expert" axes sequences are split, and over "tensor" the heads, where they divide.

    Returns:
      ``Result`` with out [B, T, H, V] and the selection as rows.
    """
    rows = selection
    attend = functools.partial(_attend, options=options, value_dim=value_dim)
    operands = (q, kv, index, rows, starts, valid)
    if mesh is None or mesh.size == 1:
        return Result(*attend(*operands, heads_axis=None))
    # The kernels' rows are numbered across sequences, which a partitioner cannot see through: every device takes its own.
    split = tuple(axis for axis in ("data", "expert") if axis in mesh.shape)
    if q.shape[0] % math.prod(mesh.shape[axis] for axis in split):
        split = ()
    # Axes of size 1 are named too, as in ``moe.dispatch``.
    split += tuple(axis for axis, size in mesh.shape.items() if size == 1 and axis not in split)
    shared = mesh.shape.get("tensor", 1) > 1 and q.shape[2] % mesh.shape["tensor"] == 0
    of_heads = PartitionSpec(split, None, "tensor" if shared else None)
    of_sequences = PartitionSpec(split)

    def one(*local):
        out, rows, loss = attend(*local, heads_axis="tensor" if shared else None)
        return out, rows, lax.psum(loss, split) if split else loss

    specs = jax.tree.map(lambda _: of_sequences, (kv, index, rows, starts, valid))
    return Result(
        *jax.shard_map(
            one,
            mesh=mesh,
            in_specs=(of_heads, *specs),
            out_specs=(of_heads, of_sequences, PartitionSpec()),
            check_vma=False,
        )(*operands)
    )
