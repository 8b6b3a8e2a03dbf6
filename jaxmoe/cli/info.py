"""``jaxmoe info``: what a model is and costs, without allocating it."""

import pathlib
from typing import Annotated

import jax.numpy as jnp
import rich.console
import rich.table
import tyro

from jaxmoe import params as params_lib
from jaxmoe.cache import bytes_per_token
from jaxmoe.cli._models import find_config
from jaxmoe.config import ModelConfig
from jaxmoe.layers.attention import entry_sizes
from jaxmoe.report import make_report, write_report


def _rows(config: ModelConfig) -> list[dict]:
    def row(name: str, value: int, unit: str) -> dict:
        return {"name": name, "value": value, "unit": unit}

    rows = [
        row("parameters", params_lib.param_count(config), "parameters"),
        row("active parameters per token", params_lib.active_param_count(config), "parameters"),
    ]
    if config.num_nextn_predict_layers:
        with_mtp = params_lib.param_count(config, include_mtp=True)
        rows.append(
            row("multi-token-prediction parameters", with_mtp - rows[0]["value"], "parameters")
        )
    for name, dtype in (
        ("float32", jnp.float32),
        ("bfloat16", jnp.bfloat16),
        ("float8", jnp.float8_e4m3fn),
    ):
        rows.append(row(f"weights in {name}", params_lib.nbytes(config, dtype), "bytes"))
    for name, dtype in (("float32", jnp.float32), ("bfloat16", jnp.bfloat16)):
        rows.append(row(f"cache per token in {name}", bytes_per_token(config, dtype), "bytes"))
    if config.is_mla:
        rows.append(row("cache per token in fp8 rows", bytes_per_token(config, "fp8"), "bytes"))
    return rows


def _human(value: int, unit: str) -> str:
    if unit == "bytes":
        for suffix, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
            if value >= size:
                return f"{value / size:.2f} {suffix}"
        return f"{value} B"
    for suffix, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if value >= size:
            return f"{value / size:.2f} {suffix}"
    return str(value)


def _shape_line(config: ModelConfig) -> str:
    parts = [
        f"{config.model_type}: {config.num_hidden_layers} layers",
        f"hidden {config.hidden_size}",
    ]
    kind = "MLA" if config.is_mla else f"GQA ({config.num_key_value_heads} kv)"
    parts.append(f"{config.num_attention_heads} heads {kind}")
    if config.index_topk is not None:
        parts.append(
            f"top-{config.index_topk} sparse attention, {config.index_n_heads} index heads"
        )
    if config.is_moe:
        shared = f" + {config.n_shared_experts} shared" if config.n_shared_experts else ""
        parts.append(
            f"{config.n_routed_experts} experts{shared}, {config.num_experts_per_tok} active"
        )
    return ", ".join(parts)


def info(
    model: Annotated[str, tyro.conf.Positional],
    json: pathlib.Path | None = None,
) -> None:
    """Prints parameters, active parameters, bytes by dtype and cache bytes per token. Allocates nothing.

    Args:
      model: Preset name, Hugging Face checkpoint or config.json, or native checkpoint directory.
      json: Also write the figures as a JSON report.
    """
    config = find_config(model)
    rows = _rows(config)
    sizes = entry_sizes(config)
    console = rich.console.Console(soft_wrap=True)
    console.print(_shape_line(config))
    table = rich.table.Table(box=None, show_header=False, pad_edge=False)
    (
        table.add_column(),
        table.add_column(justify="right"),
        table.add_column(justify="right", style="dim"),
    )
    for entry in rows:
        table.add_row(entry["name"], f"{entry['value']:,}", _human(entry["value"], entry["unit"]))
    console.print(table)
    console.print("cached per token and layer: " + ", ".join(f"{n} {s}" for n, s in sizes.items()))
    if json is not None:
        write_report(json, make_report("info", rows))
