"""The engine's compiled functions: a step over the paged cache, pure, and the commit that writes its rows."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
from jaxmoe.sharding import specs
from jaxmoe.steps import run_mtp_step, run_step, unembed_step


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
      tiles: the tokens, a few of one request in each row; -1 for none.
    """

    tokens: Int[np.ndarray, " N"]
    slots: Int[np.ndarray, " N"]
    lengths: Int[np.ndarray, " N"]
    spans: Int[np.ndarray, "N 2"]
    positions: Int[np.ndarray, " N"]
    tables: Int[np.ndarray, "S W"]
    rows: Int[np.ndarray, " R"]
    tiles: Int[np.ndarray, "M Q"]


class StepResult(NamedTuple):
    """What a step computes.

    Attributes:
      logits: float32.
      best: the token of the highest, int32.
      hidden: after the final norm: of every token in a step of the model, of the R rows in one of its MTP module.
      entries: rows to commit.
      load: int32 tokens per expert, of the layers with experts.
    """

    logits: Float[Array, "R V"]
    best: Int[Array, " R"]
    hidden: Float[Array, "N D"]
    entries: Entries
    load: Int[Array, "L E"]


def tiles_of(counts: Sequence[int], size: int, slots: int, first: int = 0) -> np.ndarray:
    """[M, Q]: ``size`` tokens, of which the first requests' are ``counts`` from ``first`` on, in rows of one request's.

    Q is what a request has on average if all of ``slots`` have some: so M and Q are fixed by the sizes, M is at most twice
    as many rows as are needed, and a step of one token each has rows of one.
    """
    width = max(1, size // slots)
    tiles = np.full((min(size, size // width + slots), width), -1, np.int32)
    row = 0
    for count in counts:
        rows = -(-count // width)
        tiles[row : row + rows].reshape(-1)[:count] = np.arange(first, first + count)
        row, first = row + rows, first + count
    return tiles


def pack(works: list[Work], size: int, rows: int, tables: np.ndarray) -> Batch:
    """A rank's work as arrays of N = ``size`` tokens, ``rows`` of which may be sampled from.

    The rows of logits belong to the works that sample, in order: one each for its last token and for every draft.
    """
    tokens, slots, lengths, positions = (np.zeros(size, np.int32) for _ in range(4))
    spans = np.stack([np.arange(size), np.arange(1, size + 1)], -1).astype(np.int32)
    positions[:] = -1
    wanted = np.zeros(rows, np.int32)
    first = number = 0
    for work in works:
        end = first + work.size
        tokens[first:end] = [*work.request.tokens(work.start, work.stop), *work.drafts]
        slots[first:end] = work.request.slot
        lengths[first:end] = work.start
        positions[first:end] = np.arange(work.start, work.start + work.size)
        spans[first:end, 0] = first
        if work.samples:
            asked = len(work.drafts) + 1
            wanted[number : number + asked] = np.arange(end - asked, end)
            number += asked
        first = end
    tiles = tiles_of([work.size for work in works], size, len(tables))
    # A copy: JAX may read a NumPy argument where it lies, and the next step's pages are noted before this one has run.
    return Batch(tokens, slots, lengths, spans, positions, tables.copy(), wanted, tiles)


def _loads(stats: list[list[LayerStats]]) -> jax.Array:
    """[layers with experts, E] in layer order."""
    parts = []
    for members in stats:
        having = [member.load for member in members if member.load.shape[-1]]
        if having:
            stacked = jnp.stack(having, axis=1)
            parts.append(stacked.reshape(-1, stacked.shape[-1]))
    return jnp.concatenate(parts) if parts else jnp.zeros((0, 0), jnp.int32)


def _best(logits: Float[Array, "R V"]) -> Int[Array, " R"]:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _over(entries: Entries, batch: Batch) -> tuple[Cache, dict[str, jax.Array]]:
    """The cache as a batch's tokens see it, each a sequence of its own, and what of each other they see."""
    cache = Cache(entries, batch.lengths, batch.tables[batch.slots])
    valid = batch.positions >= 0
    seen = {"spans": batch.spans[:, None], "tiles": batch.tiles, "valid": valid[:, None]}
    return cache, seen


def _compute(
    params: Params,
    entries: Entries,
    batch: Batch,
    tables: ExpertTables | None,
    config: ModelConfig,
    moe: MoeOptions,
) -> StepResult:
    cache, seen = _over(entries, batch)
    tokens = batch.tokens[:, None]
    output = run_step(params, config, tokens, cache, **seen, tables=tables, moe=moe)
    hidden = output.hidden[:, 0]
    logits = unembed_step(params, hidden[batch.rows])
    return StepResult(logits, _best(logits), hidden, output.entries, _loads(output.stats))


def _draft(
    params: Params,
    entries: Entries,
    hidden: Float[Array, "N D"],
    batch: Batch,
    tables: ExpertTables | None,
    config: ModelConfig,
    moe: MoeOptions,
) -> StepResult:
    cache, seen = _over(entries, batch)
    operands = (params["mtp"][0], params, config, hidden[:, None], batch.tokens[:, None], cache)
    output = run_mtp_step(*operands, **seen, tables=tables, moe=moe)
    rows = output.hidden[:, 0][batch.rows]
    logits = unembed_step(params, rows)
    return StepResult(logits, _best(logits), rows, output.entries, _loads(output.stats))


def _commit(entries: Entries, new: Entries, batch: Batch) -> Entries:
    return write(entries, new, batch.tables[batch.slots], batch.positions[:, None])


class Program(NamedTuple):
    """The compiled functions of an engine on one device or on a mesh of ranks.

    With ranks, arrays of the batch and of results are those of all ranks one after another, and load is
    [ranks * layers, E].

    Attributes:
      compute: (params, entries, batch, tables) -> StepResult. Reads the cache and writes nothing: whatever goes wrong in
        it, it can be run again.
      draft: (params, entries, hidden, batch, tables) -> StepResult of the MTP module, likewise: ``entries`` are its own
        cache's, the batch's tokens are those after each position, and ``hidden`` [N, D] belongs to the positions.
      commit: (entries, new, batch) -> the cache with a step's rows in their places. Free of collectives; donates entries.
      place_cache: puts cache entries where they belong.
    """

    compute: Callable[..., StepResult]
    draft: Callable[..., StepResult]
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
        static = {"config": config, "moe": MoeOptions("local")}
        compute, draft = (jax.jit(functools.partial(f, **static)) for f in (_compute, _draft))
        return Program(compute, draft, jax.jit(_commit, donate_argnums=0), lambda x: x)
    by_rank, by_page = PartitionSpec(axis), PartitionSpec(None, axis)

    def ranked(
        step: Callable[..., StepResult], *operands: PartitionSpec
    ) -> Callable[..., StepResult]:
        exchange = functools.partial(step, config=config, moe=MoeOptions("exchange", axis=axis))

        @jax.jit
        def run(params: Params, *others: Any) -> StepResult:
            weights = specs(config, params)  # of each width's own tree
            return jax.shard_map(
                exchange,
                mesh=mesh,
                in_specs=(weights, by_page, *operands, by_rank, PartitionSpec()),
                out_specs=StepResult(by_rank, by_rank, by_rank, by_page, by_rank),
                check_vma=False,  # custom derivatives hide varying axes
            )(params, *others)

        return run

    commit = jax.shard_map(
        _commit, mesh=mesh, in_specs=(by_page, by_page, by_rank), out_specs=by_page, check_vma=False
    )
    place = functools.partial(jax.device_put, device=NamedSharding(mesh, by_page))
    return Program(
        ranked(_compute), ranked(_draft, by_rank), jax.jit(commit, donate_argnums=0), place
    )
