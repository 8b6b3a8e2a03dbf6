"""From a dense model to a sparse one (spec 4.1): what each stage trains, from which parameters, and how well indexers choose."""

import functools
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmoe import checkpoint, sharding
from jaxmoe.config import ModelConfig
from jaxmoe.model import PassOptions, run
from jaxmoe.moe import options_on
from jaxmoe.params import Params, abstract_params, init_params, path_name
from jaxmoe.train.config import TrainConfig
from jaxmoe.train.data import Batch
from jaxmoe.train.metrics import METRICS

ORIGIN = "init_from.json"
RECALL_ROWS = 8  # rows of an evaluation on which recall is measured: each takes dense attention


def is_index(path: tuple[Any, ...]) -> bool:
    """Whether a parameter belongs to an indexer."""
    return "/indexer/" in path_name(path)


def _pick(tree: Any, keep: Any, path: tuple[Any, ...] = ()) -> Any:
    if isinstance(tree, dict):
        picked = {k: _pick(v, keep, (*path, jax.tree_util.DictKey(k))) for k, v in tree.items()}
        return {k: v for k, v in picked.items() if v is not None}
    if isinstance(tree, list | tuple):
        return [_pick(v, keep, (*path, jax.tree_util.SequenceKey(i))) for i, v in enumerate(tree)]
    return tree if keep(path) else None


def trained(params: Params, train_config: TrainConfig) -> Params:
    """The part of a tree shaped like the parameters that a stage trains; what is frozen has no gradient and no moments.

    All of it; in the warm-up only the indexers; without an index loss all but them. Lists keep their places.
    """
    c = train_config
    if c.trains_model and c.index_weight > 0:
        return params
    return _pick(params, lambda path: is_index(path) != c.trains_model)


def merged(params: Any, part: Any) -> Any:
    """``params`` with the leaves of ``part``, a tree of ``trained``, in place of its own."""
    if isinstance(part, dict):
        return {**params, **{k: merged(params[k], v) for k, v in part.items()}}
    if isinstance(part, list | tuple):
        return [merged(a, b) for a, b in zip(params, part, strict=True)]
    return part


def initial_params(
    config: ModelConfig,
    seed: int,
    source: str | os.PathLike[str],
    mesh: Mesh | None = None,
) -> Params:
    """Parameters of a checkpoint or run; indexers that it lacks are drawn from ``seed``.

    Args:
      config: the model to be trained. It may add indexers to the checkpoint's, or choose other keys with them (``index_topk``).
      seed: as of a fresh run.
      source: what ``checkpoint.load`` takes.
      mesh: over which the parameters are split, as they are read; default one device.

    Raises:
      ValueError: for parameters that the checkpoint lacks, has besides, or has in another shape; or in SEFP.
    """
    if checkpoint.holds_sefp(source):
        raise ValueError(
            f"{os.fspath(source)} holds weights in SEFP, which are not trained on; name the checkpoint that they were made from."
        )
    given, _ = checkpoint.load(source, mtp=config.num_nextn_predict_layers > 0, mesh=mesh)
    given = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(given)}
    abstract = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    expected = {path_name(p): x for p, x in abstract}
    wrong = [f"{n} is not the model's" for n in given if n not in expected]
    for name, leaf in expected.items():
        if name not in given and "/indexer/" not in name:
            wrong.append(f"{name} is missing")
        elif name in given and given[name].shape != leaf.shape:
            wrong.append(f"{name} has shape {given[name].shape}, not {leaf.shape}")
    if wrong:
        raise ValueError(
            f"{os.fspath(source)} does not fit the model: {wrong[0]} ({len(wrong)} such); train the architecture of that checkpoint."
        )
    shardings = None if mesh is None else sharding.shardings(config, mesh)
    fresh = init_params(config, jax.random.key(seed), shardings=shardings)

    def take(path, leaf):
        mine = given.get(path_name(path))
        return leaf if mine is None else jax.device_put(mine.astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(take, fresh)


def origin_of(
    source: str | os.PathLike[str], saved: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What tells a run's starting point from others: name and step of the checkpoint; ``saved`` if that is of the same name."""
    if saved and saved["name"] in pathlib.Path(source).absolute().parts:
        return saved
    path = checkpoint.locate(source)
    step = int(path.name) if path.name.isdecimal() else None
    run_path = path.parent.parent if path.parent.name == "checkpoints" else path
    return {"name": pathlib.Path(run_path).name, "step": step}


def note_origin(directory: pathlib.Path, source: str | os.PathLike[str] | None) -> None:
    """Writes down where a run's parameters came from, so that a plot can show the stages before."""
    if source is not None:
        text = json.dumps({"init_from": str(pathlib.Path(source).absolute())})
        (directory / ORIGIN).write_text(text + "\n")


def stages_of(directory: pathlib.Path) -> list[pathlib.Path]:
    """A run's directory after those of the stages that it came from, first first; as far as they are still there."""
    chain = [directory]
    while (chain[0] / ORIGIN).is_file():
        source = pathlib.Path(json.loads((chain[0] / ORIGIN).read_text())["init_from"])
        parents = (
            source,
            source.parent,
            source.parent.parent,
        )  # a run, its checkpoints, or one of them
        before = next((p for p in parents if (p / METRICS).is_file()), None)
        if before is None or before in chain:
            break
        chain.insert(0, before)
    return chain


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _recall_sums(
    params: Params, batch: Batch, config: ModelConfig, mesh: Mesh | None
) -> list[jax.Array]:
    """Per segment float32 [layers, 3], ``core_attention.Result.recall`` summed over rows of width T + 1."""
    output = run(
        params,
        config,
        batch.tokens[:, :-1],
        starts=batch.starts[:, :-1],
        valid=jnp.broadcast_to((batch.weights > 0).any(1)[:, None], batch.starts[:, :-1].shape),
        options=PassOptions("dense", moe=options_on(mesh), index_recall=True),
    )
    # A segment's members take turns.
    parts = [[s.index_recall for s in segment] for segment in output.stats]
    sums = [jnp.stack(members, axis=1).reshape(-1, 3) for members in parts]
    if mesh is None:
        return sums
    return lax.with_sharding_constraint(sums, NamedSharding(mesh, PartitionSpec()))


def index_recall(
    params: Params,
    config: ModelConfig,
    rows: Batch,
    batch_size: int,
    place: Callable[[np.ndarray], jax.Array] = jnp.asarray,
    mesh: Mesh | None = None,
) -> list[tuple[float, float]]:
    """The share of dense attention that each layer's indexer would keep: the mass of the mean over heads inside its selection.

    Beside it the most that any choice of as many keys would keep: attention that is spread out cannot be kept.

    Only queries that see more keys than are selected count: the others keep everything. In a pass of dense attention, over
    evenly spread rows.

    Args:
      params: parameters, on ``mesh`` if there is one.
      config: the model.
      rows: a multiple of ``batch_size`` rows [N, T + 1], on the host.
      batch_size: rows at once.
      place: puts them on the device or mesh.
      mesh: over which they are split.

    Returns:
      (kept, at most) per layer with an indexer, in layer order; none if no query has to choose.
    """
    batches = len(rows.tokens) // batch_size
    number = min(batches, -(-RECALL_ROWS // batch_size))
    total = np.zeros(())
    for i in np.linspace(0, batches - 1, number).round().astype(int):
        some = Batch(*(place(x[i * batch_size : (i + 1) * batch_size]) for x in rows))
        total = total + np.concatenate(jax.device_get(_recall_sums(params, some, config, mesh)))
    return [(float(kept / n), float(most / n)) for kept, most, n in total if n > 0]
