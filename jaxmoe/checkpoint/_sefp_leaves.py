"""SEFP parameters among a checkpoint's arrays: ``NAME@exponent``, ``NAME@base`` and ``NAME@plane3`` ... in place of ``NAME``.

As in ``quant.save_planes``'s file. Each is an array of whole groups, whatever it is split over, and what isn't in the arrays is in the
metadata under ``sefp``.
"""

from collections.abc import Mapping
from typing import Any

from pallas_kernels.sefp.format import BASE_WIDTH
from quant.planes import describe, described
from quant.tensor import is_sefp


def parts_of(name: str, leaf: Any) -> dict[str, Any]:
    """The arrays of a parameter by their names in the checkpoint: its own, unless it is in SEFP."""
    if not is_sefp(leaf):
        return {name: leaf}
    parts = {f"{name}@exponent": leaf.stored.exponent, f"{name}@base": leaf.stored.base}
    planes = enumerate(leaf.stored.planes, BASE_WIDTH)
    return parts | {f"{name}@plane{i}": plane for i, plane in planes}


def apart(flat: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arrays, metadata of those in SEFP) of parameters by name."""
    arrays: dict[str, Any] = {}
    for name, leaf in flat.items():
        arrays |= parts_of(name, leaf)
    return arrays, {name: describe(leaf) for name, leaf in flat.items() if is_sefp(leaf)}


def together(arrays: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """What ``apart`` took; of arrays or what stands for them."""
    flat = {name: array for name, array in arrays.items() if name.partition("@")[0] not in about}
    for name, own in about.items():
        planes = [f"{name}@plane{i}" for i in range(BASE_WIDTH, 8)]
        planes = [arrays[plane] for plane in planes if plane in arrays]
        flat[name] = described(own, arrays[f"{name}@exponent"], arrays[f"{name}@base"], planes)
    return flat
