"""Where each decoder layer lives in the parameter tree, and whether a tree fits a config."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe import params as params_lib
from jaxmoe.config import LayerKind, ModelConfig

_MAX_LISTED = 40


@dataclasses.dataclass(frozen=True)
class LayerSlot:
    """One decoder layer's place in the tree.

    Attributes:
      index: absolute layer number; multi-token-prediction layers follow the main ones, as in
        Hugging Face files.
      path: path name of the subtree that holds it, e.g. ``segments/1/0`` or ``mtp/0/layer``.
      stack: its position on the leading "layers" axis of that subtree's leaves; None where leaves
        are not stacked.
      kind: what the layer is made of.
    """

    index: int
    path: str
    stack: int | None
    kind: LayerKind


def layer_slots(config: ModelConfig) -> list[LayerSlot]:
    """The slots of all decoder layers, in order: main layers, then those of the MTP modules."""
    slots: list[LayerSlot] = []
    for i, segment in enumerate(config.segments):
        for repeat in range(segment.repeats):
            for j, kind in enumerate(segment.kinds):
                slots.append(LayerSlot(len(slots), f"segments/{i}/{j}", repeat, kind))
    for i in range(config.num_nextn_predict_layers):
        slots.append(LayerSlot(len(slots), f"mtp/{i}/layer", None, config.mtp_kind))
    return slots


def flat_params(params: Any, config: ModelConfig) -> dict[str, Any]:
    """``{path name: leaf}``, after checking names and shapes against ``spec(config)``.

    Raises:
      ValueError: listing every leaf that is missing, unknown or wrongly shaped.
    """
    expected = params_lib.flatten(params_lib.spec(config))
    flat = params_lib.flatten(params)
    problems = [
        f"missing {name}: expected shape {s.shape}"
        for name, s in expected.items()
        if name not in flat
    ]
    for name, leaf in flat.items():
        shape = tuple(np.shape(leaf))
        if name not in expected:
            problems.append(f"unknown {name}: shape {shape}")
        elif shape != expected[name].shape:
            problems.append(f"wrong shape {name}: expected {expected[name].shape}, got {shape}")
    if problems:
        raise ValueError(
            summarise(
                "params do not fit config; pass the config that they were made with", problems
            )
        )
    return flat


def unflatten(flat: dict[str, Any], config: ModelConfig) -> params_lib.Params:
    """Inverse of ``params.flatten`` for the parameters of ``config``."""
    tree = params_lib.spec(config)
    return jax.tree.unflatten(
        jax.tree.structure(tree), [flat[name] for name in params_lib.flatten(tree)]
    )


def check_dtype(dtype: Any) -> np.dtype:
    """``dtype`` as a numpy dtype that weights can be held in."""
    dtype = np.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        raise ValueError(
            f"dtype must be bfloat16, float16, float32 or float64; got {dtype}. Use jnp.bfloat16."
        )
    if dtype.itemsize > 4 and not jax.config.jax_enable_x64:
        raise ValueError(
            "dtype float64 needs jax.config.update('jax_enable_x64', True); use float32 otherwise."
        )
    return dtype


def summarise(headline: str, problems: Iterable[str]) -> str:
    """``headline (N problems):`` and the problems, one per line; a long list is cut."""
    problems = list(problems)
    lines = problems[:_MAX_LISTED]
    if len(problems) > _MAX_LISTED:
        lines.append(f"... and {len(problems) - _MAX_LISTED} more")
    return "\n  ".join(
        [f"{headline} ({len(problems)} problem{'s' * (len(problems) != 1)}):", *lines]
    )
