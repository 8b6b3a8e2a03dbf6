"""A model's directory of whatever kind: Hugging Face's, a native checkpoint's, or a training run's."""

import functools
import os
import pathlib
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxmoe import sharding
from jaxmoe.checkpoint import hf, native, sefp
from jaxmoe.config import ModelConfig
from jaxmoe.params import Params
from quant import at_width


def is_hf(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory holds a Hugging Face checkpoint."""
    return (pathlib.Path(directory) / "config.json").is_file()


def locate(directory: str | os.PathLike[str]) -> pathlib.Path:
    """What ``load`` reads: a directory of Hugging Face's or in SEFP, or one step of a native checkpoint, the latest unless one is named.

    Processes that load the same weights at different times must load what one ``locate`` has found: a training run goes on
    saving.

    Args:
      directory: of any kind, of a training run (with its "checkpoints" below), or of one native step.

    Raises:
      ValueError: neither a checkpoint nor a training run.
    """
    path = pathlib.Path(directory).absolute()
    if is_hf(path) or sefp.is_sefp(path):
        return path
    for candidate in (path, path / "checkpoints"):
        step = native.latest_step(candidate)
        if step is not None:
            return candidate / str(step)
    if path.name.isdecimal() and native.latest_step(path.parent) is not None:
        return path
    raise ValueError(
        f"no checkpoint in {str(directory)!r}: neither a Hugging Face config.json nor {sefp.NAME} nor a native step; check the path."
    )


def load_config(directory: str | os.PathLike[str]) -> ModelConfig:
    """The config of a checkpoint; reads no arrays. Argument and errors as of ``load``."""
    path = locate(directory)
    if is_hf(path):
        return ModelConfig.from_hf(path)
    if sefp.is_sefp(path):
        return sefp.sefp_config(path)
    return native.restore_config(path.parent, int(path.name))


def holds_sefp(directory: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint of whatever kind has parameters in SEFP; reads no arrays. Argument and errors as of ``load``."""
    path = locate(directory)
    if is_hf(path) or sefp.is_sefp(path):
        return not is_hf(path)
    return native.holds_sefp(path.parent, int(path.name))


def load(
    directory: str | os.PathLike[str],
    dtype: Any = jnp.float32,
    *,
    mtp: bool = True,
    mesh: Mesh | None = None,
    width: int | None = None,
) -> tuple[Params, ModelConfig]:
    """Parameters and config of a checkpoint.

    Args:
      directory: as for ``locate``.
      dtype: of the parameters.
      mtp: whether to keep multi-token-prediction layers, if there are any.
      mesh: over which the parameters are split as they are read; default: on one device. All its processes must call.
      width: of weights in SEFP the widest that is needed; default: all that is stored.

    Raises:
      ValueError: no checkpoint; otherwise as ``load_hf`` and ``restore``.
    """
    path = locate(directory)
    if is_hf(path):
        where = None if mesh is None else functools.partial(sharding.shardings, mesh=mesh)
        params, config = hf.load_hf(path, dtype, mtp=None if mtp else False, shardings=where)
        return params if width is None else at_width(params, width), config
    if sefp.is_sefp(path):
        params, config = sefp.load_sefp(path, width, dtype, mesh)
    else:
        params, config, *_ = native.restore(path.parent, mesh, dtype=dtype, step=int(path.name))
        params = params if width is None else at_width(params, width)
    if mtp:
        return params, config
    kept = {name: value for name, value in params.items() if name != "mtp"}
    return kept, config.replace(num_nextn_predict_layers=0)
