"""Finding and loading what the user names on the command line."""

import pathlib
from typing import Any

import jax.numpy as jnp

from jaxmoe import checkpoint
from jaxmoe.config import ModelConfig
from jaxmoe.params import Params
from jaxmoe.presets import presets

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def dtype_of(name: str) -> Any:
    """A parameter dtype by name."""
    if name not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}; got {name!r}.")
    return DTYPES[name]


def is_hf(path: pathlib.Path) -> bool:
    """Whether a directory holds a Hugging Face checkpoint."""
    return (path / "config.json").is_file()


def _native_directory(path: pathlib.Path) -> pathlib.Path | None:
    """The directory of native steps that ``path`` names: itself, or its "checkpoints" (a training run)."""
    for candidate in (path, path / "checkpoints"):
        if candidate.is_dir() and checkpoint.latest_step(candidate) is not None:
            return candidate
    return None


def _unknown(name: str) -> ValueError:
    return ValueError(
        f"{name!r} is neither a preset ({', '.join(presets)}), nor a directory with a Hugging Face config.json, "
        "nor one with native checkpoints; check the path."
    )


def find_config(name: str) -> ModelConfig:
    """The config of a preset, a Hugging Face checkpoint or config.json, or a native checkpoint."""
    if name in presets:
        return presets[name]
    path = pathlib.Path(name)
    if path.is_file() or is_hf(path):
        return ModelConfig.from_hf(path)
    native = _native_directory(path)
    if native is None:
        raise _unknown(name)
    return checkpoint.restore_config(native)


def load(
    name: str, dtype: Any = jnp.float32, *, mtp: bool | None = None
) -> tuple[Params, ModelConfig]:
    """Parameters and config of a checkpoint directory of either kind."""
    path = pathlib.Path(name)
    if is_hf(path):
        return checkpoint.load_hf(path, dtype, mtp=mtp)
    native = _native_directory(path)
    if native is None:
        hint = " A preset has no weights; train one with `jaxmoe train`." if name in presets else ""
        raise ValueError(f"no checkpoint in {name!r}.{hint}") if hint else _unknown(name)
    restored = checkpoint.restore(native, dtype=dtype)
    return restored.params, restored.config
