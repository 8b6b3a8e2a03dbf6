"""What a checkpoint's arrays are restored as: their dtypes, and where on which mesh."""

import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmoe import params as params_lib
from jaxmoe import sharding as sharding_lib
from jaxmoe.checkpoint import _train_state
from jaxmoe.checkpoint._layout import summarise, unflatten
from jaxmoe.config import ModelConfig
from jaxmoe.errors import CheckpointMismatch
from quant.tensor import is_sefp


def structs(saved: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Arrays as the metadata lists them."""
    return {
        name: jax.ShapeDtypeStruct(tuple(entry["shape"]), entry["dtype"])
        for name, entry in saved.items()
    }


def targets(
    config: ModelConfig,
    saved: dict[str, Any],
    mesh: Mesh | None,
    rules: sharding_lib.Rules | None,
    dtype: Any,
) -> dict[str, Any]:
    """What to restore each parameter as: what was saved, in ``dtype`` unless it is in SEFP, where it belongs."""
    abstract = params_lib.abstract_params(config, np.float32 if dtype is None else dtype)
    tree = unflatten(
        {
            name: saved[name] if dtype is None or is_sefp(saved[name]) else target
            for name, target in params_lib.flatten(abstract).items()
        },
        config,
    )
    if mesh is not None:
        where = sharding_lib.shardings_of(tree, config, mesh, rules)
        tree = jax.tree.map(lambda x, sharding: x.update(sharding=sharding), tree, where)
    return params_lib.flatten(tree)


def check_params(
    path: pathlib.Path, specs: dict[str, params_lib.Spec], saved: dict[str, Any]
) -> None:
    """Raises CheckpointMismatch unless what was saved is what the config has."""
    problems = [
        f"missing {name}: expected shape {s.shape}"
        for name, s in specs.items()
        if name not in saved
    ]
    for name, leaf in saved.items():
        shape = leaf.shape
        if name not in specs:
            problems.append(f"unexpected {name}: found shape {shape}")
        elif shape != specs[name].shape:
            problems.append(f"wrong shape {name}: expected {specs[name].shape}, found {shape}")
    if problems:
        raise CheckpointMismatch(
            summarise(f"{path} was written with another parameter layout", problems)
        )


def placed(
    state: _train_state.Targets,
    config: ModelConfig,
    mesh: Mesh | None,
    rules: sharding_lib.Rules | None,
) -> dict[str, jax.ShapeDtypeStruct]:
    """train_state targets, those without a sharding placed like the parameter they mirror, or as that would be if it isn't in SEFP."""
    placed = state.arrays()
    if mesh is None:
        return placed
    where = sharding_lib.shardings(config, mesh, rules)
    params = params_lib.flatten(params_lib.abstract_params(config, shardings=where))

    def follow(path: str, shape: tuple[int, ...]) -> Any:
        parts = path.split("/")
        for i in range(len(parts)):
            param = params.get("/".join(parts[i:]))
            if param is not None and param.shape == shape:
                return param.sharding
        return NamedSharding(mesh, PartitionSpec())

    for name, target in placed.items():
        if target.sharding is None and name not in state.on_host:
            placed[name] = target.update(sharding=follow(state.paths[name], target.shape))
    return placed
