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


def specs(config: ModelConfig) -> Any:
    """Tree of ``PartitionSpec`` with the structure of the parameters, whatever the sizes: slots may outnumber experts."""
    mesh = make_mesh(devices=jax.devices()[:1])
    return jax.tree.map(lambda sharding: sharding.spec, shardings(config, mesh))
