"""Logical axes to mesh axes. The one place that builds meshes and shardings."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmoe import params as params_lib
from jaxmoe.config import ModelConfig
from quant.tensor import SefpTensor

MESH_AXES = ("data", "expert", "tensor")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which mesh axis each logical axis of a parameter is split over; None replicates it."""

    layers: str | None = None
    embed: str | None = None
    heads: str | None = "tensor"
    kv_heads: str | None = "tensor"
    mlp: str | None = "tensor"
    vocab: str | None = "tensor"
    expert: str | None = "expert"
    expert_mlp: str | None = "tensor"


def make_mesh(
    data: int = 1, expert: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with axes ("data", "expert", "tensor"), all of the Auto type.

    Raises:
      ValueError: if data * expert * tensor differs from the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if math.prod((data, expert, tensor)) != len(devices):
        raise ValueError(
            f"mesh data={data} x expert={expert} x tensor={tensor} needs {data * expert * tensor} devices; "
            f"got {len(devices)}. Change the sizes, or start Python with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={data * expert * tensor} to simulate devices on CPU."
        )
    return Mesh(
        np.asarray(devices).reshape(data, expert, tensor),
        MESH_AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES),
    )


def partition_spec(
    spec: params_lib.Spec, mesh: Mesh, rules: Rules, name: str = ""
) -> PartitionSpec:
    """The ``PartitionSpec`` of one parameter.

    Raises:
      ValueError: if two logical axes of it land on one mesh axis, or a size is not divisible; both are named.
    """
    entries: list[str | None] = []
    for size, logical in zip(spec.shape, spec.axes, strict=True):
        axis = None if logical is None else getattr(rules, logical)
        if axis is not None and axis not in mesh.shape:
            axis = None
        if axis is not None and axis in entries:
            raise ValueError(
                f"{name}: logical axes {spec.axes} map two dimensions to mesh axis {axis!r}; change Rules so that each "
                "mesh axis is used once per parameter."
            )
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"{name}: dimension {logical!r} of size {size} is not divisible by mesh axis {axis!r} of size "
                f"{mesh.shape[axis]}; use a divisor, or set Rules({logical}=None) to replicate it."
            )
        entries.append(axis)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def shardings(config: ModelConfig, mesh: Mesh, rules: Rules | None = None) -> Any:
    """Tree of ``NamedSharding`` with the structure of the parameters."""
    rules = rules or Rules()
    return jax.tree_util.tree_map_with_path(
        lambda path, s: NamedSharding(
            mesh, partition_spec(s, mesh, rules, params_lib.path_name(path))
        ),
        params_lib.spec(config),
    )


def _sefp_spec(
    spec: params_lib.Spec, tensor: SefpTensor, mesh: Mesh, rules: Rules, name: str
) -> PartitionSpec:
    """Of all arrays of a parameter in SEFP, [*batch, groups, outputs, ...]: whole groups, in runs of one length.

    Raises:
      ValueError: as ``partition_spec``; or if the groups, or all outputs together, are not divisible.
    """
    axes = [*partition_spec(spec, mesh, rules, name)]
    axes += [None] * (len(spec.shape) - len(axes))
    layout, (*_, groups, columns) = tensor.layout, tensor.stored.exponent.shape
    ends = len(axes) - layout.inputs - layout.outputs
    first = layout.outputs if layout.outputs_first else layout.inputs
    sides = [axes[ends : ends + first], axes[ends + first :]]
    inputs, outputs = reversed(sides) if layout.outputs_first else sides
    merged = []
    for what, size, side in (("groups of 64", groups, inputs), ("outputs", columns, outputs)):
        split = [axis for axis in side if axis is not None]
        for axis in split:
            if size % mesh.shape[axis]:
                raise ValueError(
                    f"{name}: its {size} {what} in SEFP are not divisible by mesh axis {axis!r} of size {mesh.shape[axis]}; use a "
                    "divisor, or replicate it by Rules."
                )
        merged.append(split[0] if split else None)
    return PartitionSpec(*axes[:ends], *merged)


def shardings_of(params: Any, config: ModelConfig, mesh: Mesh, rules: Rules | None = None) -> Any:
    """``shardings`` with the structure of ``params`` (arrays or their shapes), of which some may be in SEFP.

    A parameter in SEFP is split along groups and outputs, never within a group. If one of several merged axes was to be split, the
    merged one is: its runs then hold other weights than those of the array would, which matters to none but ``shard_map``.
    """
    rules = rules or Rules()

    def one(path: Any, spec: params_lib.Spec, leaf: Any) -> Any:
        name = params_lib.path_name(path)
        if not isinstance(leaf, SefpTensor):
            return NamedSharding(mesh, partition_spec(spec, mesh, rules, name))
        sharding = NamedSharding(mesh, _sefp_spec(spec, leaf, mesh, rules, name))
        return jax.tree.map(lambda _: sharding, leaf)

    return jax.tree_util.tree_map_with_path(one, params_lib.spec(config), params)


def specs(config: ModelConfig, params: Any = None) -> Any:
    """Tree of ``PartitionSpec`` with the structure of the parameters, whatever the sizes: slots may outnumber experts.

    Args:
      config: the model.
      params: parameters, if some are in SEFP.
    """
    mesh = make_mesh(devices=jax.devices()[:1])
    found = shardings(config, mesh) if params is None else shardings_of(params, config, mesh)
    return jax.tree.map(lambda sharding: sharding.spec, found)
