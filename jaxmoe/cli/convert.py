"""``jaxmoe convert``: between Hugging Face and native checkpoints, and to SEFP."""

import pathlib
import shutil
from typing import Annotated, Literal

import rich.console
import tyro

from jaxmoe import checkpoint
from jaxmoe.cli._models import dtype_of, in_sefp, load, locate
from jaxmoe.params import param_count
from jaxmoe.report import make_report, write_report

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
)


def convert(
    source: Annotated[pathlib.Path, tyro.conf.Positional],
    target: Annotated[pathlib.Path, tyro.conf.Positional],
    to: Literal["hf", "native", "sefp"] | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    mtp: bool = True,
    step: int = 0,
    rounding: Literal["truncate", "nested"] = "truncate",
    json: pathlib.Path | None = None,
) -> None:
    """Converts a checkpoint: Hugging Face safetensors to native, native to Hugging Face, or to one file of every SEFP width.

    Args:
      source: Training run, native checkpoint or Hugging Face directory; with --to sefp also one in SEFP.
      target: Directory to write; must not exist or be empty.
      to: Kind to write; default: the other kind.
      dtype: Parameter dtype to write. fp8 checkpoints are dequantised.
      mtp: Keep multi-token-prediction layers if the source has them.
      step: Step number of a native target.
      rounding: With --to sefp: truncate, as OTARo has it, or nested, which stores what serves all widths best; better for weights that
        were not tuned with truncation.
      json: Also write a JSON report.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(
            f"target {target} exists and is not an empty directory; choose another, or remove it."
        )
    to = to or ("native" if checkpoint.is_hf(source) else "hf")
    if to != "sefp" and checkpoint.holds_sefp(locate(str(source))):
        raise ValueError(
            f"source {source} is in SEFP, which is not undone here; convert the checkpoint that it was made from."
        )
    if rounding != "truncate" and (to != "sefp" or checkpoint.holds_sefp(locate(str(source)))):
        raise ValueError(
            f"rounding {rounding} is of weights that become SEFP; got {source} for --to {to}. Use --to sefp on a checkpoint that isn't."
        )
    params, config = load(str(source), dtype_of(dtype), mtp=mtp)
    if to == "sefp":
        checkpoint.save_sefp(target, in_sefp(params, rounding=rounding), config)
    elif to == "hf":
        checkpoint.save_hf(target, params, config)
    else:
        checkpoint.save(target, params, config, step)
    # A tokenizer belongs to the model whatever the format of its weights.
    copied = [name for name in _TOKENIZER_FILES if (source / name).is_file()]
    for name in copied:
        shutil.copyfile(source / name, target / name)
    count = param_count(config, include_mtp=True)
    rich.console.Console(soft_wrap=True).print(
        f"wrote {target}: {to}, {config.model_type}, {count:,} parameters in {dtype}"
        + (f", with {', '.join(copied)}" if copied else "")
    )
    if json is not None:
        rows = [
            {"name": "parameters", "value": count, "unit": "parameters", "to": to, "dtype": dtype}
        ]
        write_report(json, make_report("convert", rows))
