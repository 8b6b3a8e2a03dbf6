"""SEFP parameters among a checkpoint's arrays: several arrays in place of one, by the names of ``quant.parts``.

Each is an array of whole groups, whatever it is split over, and what isn't in the arrays is in the metadata under ``sefp``.
"""

from collections.abc import Mapping
from typing import Any

from jaxmoe.errors import CheckpointCorrupt
from quant import parts
from quant.tensor import is_sefp


def parts_of(name: str, leaf: Any) -> dict[str, Any]:
    """The arrays of a parameter by their names in the checkpoint: its own, unless it is in SEFP."""
    return parts.parts_of(name, leaf) if is_sefp(leaf) else {name: leaf}


def apart(flat: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arrays, metadata of those in SEFP) of parameters by name."""
    arrays: dict[str, Any] = {}
    for name, leaf in flat.items():
        arrays |= parts_of(name, leaf)
    return arrays, {name: parts.describe(leaf) for name, leaf in flat.items() if is_sefp(leaf)}


def together(arrays: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """What ``apart`` took; of arrays or what stands for them.

    Raises:
      CheckpointCorrupt: if the metadata don't fit the arrays; one is named.
    """
    flat = {name: array for name, array in arrays.items() if name.partition("@")[0] not in about}
    try:
        return flat | {name: parts.described(name, own, arrays) for name, own in about.items()}
    except ValueError as error:
        raise CheckpointCorrupt(f"{error} Restore another step.") from None
