"""The engine's compiled functions: a step over the paged cache, pure, and the commit that writes its rows."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxmoe.cache import Cache, write
from jaxmoe.config import ModelConfig
from jaxmoe.engine.scheduler import Work
from jaxmoe.layers.attention import Entries
from jaxmoe.model import LayerStats
from jaxmoe.moe import ExpertTables, MoeOptions
from jaxmoe.params import Params
from jaxmoe.sharding import Rules, shardings
from jaxmoe.steps import run_step, unembed_step


class Batch(NamedTuple):
    """N tokens of one rank's step, padded.

    Attributes:
      tokens: ids.
      slots: each token's request, as a row of ``tables``.
      lengths: cached rows of its request.
      spans: first and end of the step's tokens that it sees; its own is the last of them.
      positions: its position in its request; -1 for padding.
      tables: [S, W] pages of every slot, -1 after the last.
      rows: [R] which tokens' logits are wanted.
    """

    tokens: Int[np.ndarray, " N"]
    slots: Int[np.ndarray, " N"]
    lengths: Int[np.ndarray, " N"]
    spans: Int[np.ndarray, "N 2"]
    positions: Int[np.ndarray, " N"]
    tables: Int[np.ndarray, "S W"]
    rows: Int[np.ndarray, " R"]


class StepResult(NamedTuple):
    """logits [R, V] float32; entries, rows to commit; load [layers with experts, E] int32 tokens per expert."""

    logits: Float[Array, "R V"]
    entries: Entries
    load: Int[Array, "L E"]


def pack(works: list[Work], size: int, rows: int, tables: np.ndarray) -> Batch:
    """A rank's work as arrays of N = ``size`` tokens, ``rows`` of which may be sampled from.

    Row i of the logits belongs to the i-th of the works that sample.
    """
    tokens, slots, lengths, positions = (np.zeros(size, np.int32) for _ in range(4))
    spans = np.stack([np.arange(size), np.arange(1, size + 1)], -1).astype(np.int32)
    positions[:] = -1
    wanted = np.zeros(rows, np.int32)
    first = number = 0
    for work in works:
        end = first + work.stop - work.start
        tokens[first:end] = work.request.tokens(work.start, work.stop)
        slots[first:end] = work.request.slot
        lengths[first:end] = work.start
        positions[first:end] = np.arange(work.start, work.stop)
        spans[first:end, 0] = first
        if work.samples:
            wanted[number] = end - 1
            number += 1
        first = end
    # A copy: JAX may read a NumPy argument where it lies, and the next step's pages are noted before this one has run.
    return Batch(tokens, slots, lengths, spans, positions, tables.copy(), wanted)


def _loads(stats: list[list[LayerStats]]) -> jax.Array:
    """[layers with experts, E] in layer order."""
    parts = []
    for members in stats:
        having = [member.load for member in members if member.load.shape[-1]]
        if having:
            stacked = jnp.stack(having, axis=1)
            parts.append(stacked.reshape(-1, stacked.shape[-1]))
    return jnp.concatenate(parts) if parts else jnp.zeros((0, 0), jnp.int32)


def _compute(
    params: Params,
    entries: Entries,
    batch: Batch,
    tables: ExpertTables | None,
    config: ModelConfig,
    moe: MoeOptions,
) -> StepResult:
    valid = batch.positions >= 0
    output = run_step(
        params,
        config,
        batch.tokens[:, None],
        Cache(entries, batch.lengths, batch.tables[batch.slots]),
        spans=batch.spans[:, None],
        valid=valid[:, None],
        tables=tables,
        moe=moe,
    )
    logits = unembed_step(params, output.hidden[:, 0][batch.rows])
    return StepResult(logits, output.entries, _loads(output.stats))


def _commit(entries: Entries, new: Entries, batch: Batch) -> Entries:
    return write(entries, new, batch.tables[batch.slots], batch.positions[:, None])


class Program(NamedTuple):
    """The compiled functions of an engine on one device or on a mesh of ranks.

    Attributes:
      compute: (params, entries, batch, tables) -> StepResult. Reads the cache and writes nothing: whatever goes wrong in
        it, it can be run again. With ranks, arrays of the batch and logits are those of all ranks one after another, and
        load is [ranks * layers, E].
      commit: (entries, new, batch) -> the cache with a step's rows in their places. Free of collectives; donates entries.
      place_cache: puts cache entries where they belong.
    """

    compute: Callable[..., StepResult]
    commit: Callable[..., Entries]
    place_cache: Callable[[Entries], Entries]


@functools.lru_cache(maxsize=8)
def make_program(config: ModelConfig, mesh: Mesh | None, axis: str = "expert") -> Program:
    """Compiled on first use for each size of batch; engines of one model share what they compile.

    Args:
      config: the model.
      mesh: ranks along ``axis``, each with its share of the experts and with cache pages of its own; None for one device.
      axis: the mesh axis.
    """
    if mesh is None:
        local = functools.partial(_compute, config=config, moe=MoeOptions("local"))
        return Program(jax.jit(local), jax.jit(_commit, donate_argnums=0), lambda x: x)
    exchange = functools.partial(_compute, config=config, moe=MoeOptions("exchange", axis=axis))
    weights = jax.tree.map(lambda s: s.spec, shardings(config, mesh, Rules()))
    by_rank, by_page = PartitionSpec(axis), PartitionSpec(None, axis)
    step = jax.shard_map(
        exchange,
        mesh=mesh,
        in_specs=(weights, by_page, by_rank, PartitionSpec()),
        out_specs=StepResult(by_rank, by_page, by_rank),
        check_vma=False,  # custom derivatives hide varying axes
    )
    commit = jax.shard_map(
        _commit, mesh=mesh, in_specs=(by_page, by_page, by_rank), out_specs=by_page, check_vma=False
    )
    place = functools.partial(jax.device_put, device=NamedSharding(mesh, by_page))
    return Program(jax.jit(step), jax.jit(commit, donate_argnums=0), place)
