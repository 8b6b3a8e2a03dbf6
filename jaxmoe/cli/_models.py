"""Finding and loading what the user names on the command line."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxmoe import checkpoint
from jaxmoe.config import ModelConfig
from jaxmoe.params import Params
from jaxmoe.presets import presets
from quant import pin_widths, quantize_params, tensors

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def dtype_of(name: str) -> Any:
    """A parameter dtype by name."""
    if name not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}; got {name!r}.")
    return DTYPES[name]


def locate(name: str) -> pathlib.Path:
    """The checkpoint that ``name`` means (``checkpoint.locate``); a hint for who has named a preset."""
    try:
        return checkpoint.locate(name)
    except ValueError:
        if name not in presets:
            raise ValueError(
                f"{name!r} is neither a preset ({', '.join(presets)}), nor a directory with a Hugging Face config.json, "
                "nor one with sefp.safetensors or native checkpoints; check the path."
            ) from None
    raise ValueError(
        f"a preset has no weights; got {name!r}. Train it with `jaxmoe train`, and name the run."
    )


def find_config(name: str) -> ModelConfig:
    """The config of a preset, a Hugging Face checkpoint or config.json, or a native checkpoint."""
    if name in presets:
        return presets[name]
    if pathlib.Path(name).is_file():
        return ModelConfig.from_hf(name)
    return checkpoint.load_config(locate(name))


def in_sefp(
    params: Params, module_widths: Mapping[str, int] | None = None, rounding: str = "truncate"
) -> Params:
    """Parameters in SEFP, encoded with ``rounding`` unless they are, with modules of their own widths (``quant.pin_widths``)."""
    params = params if tensors(params) else quantize_params(params, rounding=rounding)
    return pin_widths(params, module_widths) if module_widths else params


def load(
    name: str,
    dtype: Any = jnp.float32,
    *,
    mtp: bool = True,
    widths: Sequence[int] = (),
    module_widths: Mapping[str, int] | None = None,
) -> tuple[Params, ModelConfig]:
    """Parameters and config of a checkpoint directory of any kind, as ``checkpoint.load`` gives them.

    Of weights in SEFP only what ``widths``, and ``module_widths`` beside them, need is read; all if no ``widths`` are given.
    """
    path = locate(name)
    widest = None
    if widths and checkpoint.holds_sefp(path):
        widest = max([*widths, *(module_widths or {}).values()])
    return checkpoint.load(path, dtype, mtp=mtp, width=widest)
