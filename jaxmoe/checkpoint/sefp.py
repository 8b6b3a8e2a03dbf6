"""A model in SEFP in one file, for every width: ``sefp.safetensors`` in a directory, beside the tokenizer's files.

The file is ``quant.save_planes``'s, whose metadata also has ``"config"``: the architecture as JSON.
"""

import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxmoe.checkpoint._layout import check_dtype, flat_params, unflatten
from jaxmoe.config import ModelConfig
from jaxmoe.errors import CheckpointCorrupt, CheckpointMismatch
from jaxmoe.params import Params, flatten, spec
from jaxmoe.sharding import shardings_of
from quant import PlanesCorrupt, SefpTensor, load_planes, planes_metadata, save_planes, tensors

NAME = "sefp.safetensors"


def is_sefp(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory holds a model in SEFP."""
    return (pathlib.Path(directory) / NAME).is_file()


def save_sefp(
    directory: str | os.PathLike[str], params: Params, config: ModelConfig
) -> pathlib.Path:
    """Writes one file from which every width can be read.

    Args:
      directory: gets the file; created if needed. A file that exists is replaced at once.
      params: parameters of ``config``, of which ``quant.quantize_params`` has made some ``SefpTensor``.
      config: their architecture.

    Returns:
      The file.

    Raises:
      ValueError: params do not fit config, or none of them is in SEFP.
    """
    flat_params(params, config)
    if not tensors(params):
        raise ValueError(
            "params must be in SEFP, and none of them is; make them with quant.quantize_params(params)."
        )
    path = pathlib.Path(directory).absolute() / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    save_planes(path, params, {"config": json.dumps(config.to_dict())})
    return path


def sefp_config(directory: str | os.PathLike[str]) -> ModelConfig:
    """The architecture; reads no arrays. Errors as of ``load_sefp``."""
    path = pathlib.Path(directory) / NAME
    try:
        config = planes_metadata(path).get("config")
    except PlanesCorrupt as error:
        raise CheckpointCorrupt(str(error)) from None
    if config is None:
        raise CheckpointMismatch(
            f"{path} holds no config; write it with checkpoint.save_sefp, or read it with quant.load_planes."
        )
    return ModelConfig.from_dict(json.loads(config))


def load_sefp(
    directory: str | os.PathLike[str],
    width: int | None = None,
    dtype: Any = None,
    mesh: Mesh | None = None,
) -> tuple[Params, ModelConfig]:
    """Parameters and config of a directory that ``save_sefp`` wrote.

    Args:
      directory: with the file.
      width: the widest that is needed: planes beyond it are not even mapped; None for all that is stored.
      dtype: in which SEFP weights are decoded, and of the parameters that aren't in SEFP and whose spec fixes none;
        default: as saved.
      mesh: over which the parameters are split as they are read; default: on the default device.

    Raises:
      ValueError: for a width that isn't stored, or a mesh that sizes are not divisible by.
      CheckpointCorrupt: if what is read of the file is damaged.
      CheckpointMismatch: if the file has no config, or the parameters of another one.
    """
    path = pathlib.Path(directory) / NAME
    config = sefp_config(directory)

    def where(shapes: Params) -> Any:
        _checked(path, shapes, config)
        return shardings_of(shapes, config, mesh)

    try:
        params = load_planes(path, width, None if mesh is None else where)
    except PlanesCorrupt as error:
        raise CheckpointCorrupt(str(error)) from None
    flat = _checked(path, params, config)
    if dtype is not None:
        dtype = check_dtype(dtype)
        fixed = {name for name, s in flatten(spec(config)).items() if s.dtype is not None}
        flat = {n: leaf if n in fixed else _cast(leaf, dtype) for n, leaf in flat.items()}
    return unflatten(flat, config), config


def _checked(path: pathlib.Path, params: Params, config: ModelConfig) -> dict[str, Any]:
    """Parameters, or their shapes, by name.

    Raises:
      CheckpointMismatch: unless they are those of ``config``.
    """
    try:
        return flat_params(params, config)
    except ValueError as error:
        raise CheckpointMismatch(f"{path}: {error}") from None


def _cast(leaf: jax.Array | SefpTensor, dtype: Any) -> jax.Array | SefpTensor:
    return leaf.astype(dtype) if isinstance(leaf, SefpTensor) else jnp.asarray(leaf, dtype)
