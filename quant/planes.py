"""One file for every width: what a width needs is read from it, and nothing else.

A safetensors file. A parameter in SEFP is its arrays, named ``PATH@exponent``, ``PATH@base`` and ``PATH@plane3`` to ``PATH@plane7``
(the plane that width 4 adds is plane3); others are stored under their path. The file begins with what every width reads: first the
other parameters, then the nibbles, then the planes, plane by plane. So a width's bytes are one run from the file's start (but for planes of
pinned parameters); the rest isn't even mapped. Metadata: ``{"format": "jaxmoe-sefp-1", "sefp": JSON of {PATH: inputs, outputs, layout, inner, dtype, pinned}}``,
and whatever texts the caller adds.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.sefp import Sefp
from pallas_kernels.sefp.format import BASE_WIDTH, MASTER_WIDTH
from quant.rules import name_of
from quant.tensor import Layout, SefpTensor, is_sefp

FORMAT = "jaxmoe-sefp-1"
_NAMES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I8": np.int8}
_NAMES |= {"I32": np.int32, "U16": np.uint16, "U32": np.uint32, "U8": np.uint8, "I64": np.int64}
_DTYPES = {np.dtype(dtype): name for name, dtype in _NAMES.items()}


def _arrays(name: str, t: SefpTensor) -> dict[str, Any]:
    stored = {f"{name}@exponent": t.stored.exponent, f"{name}@base": t.stored.base}
    planes = enumerate(t.stored.planes, BASE_WIDTH)
    return stored | {f"{name}@plane{i}": plane for i, plane in planes}


def describe(t: SefpTensor) -> dict[str, Any]:
    """What is not in a tensor's arrays, for JSON; ``described`` takes it."""
    return {
        "inputs": t.inputs,
        "outputs": t.outputs,
        "layout": dataclasses.asdict(t.layout),
        "inner": t.stored.inner,
        "dtype": t.dtype.name,
        "pinned": t.pinned,
    }


def described(about: Mapping[str, Any], exponent: Any, base: Any, planes: Any) -> SefpTensor:
    """A tensor from its arrays, or what stands for them, and what ``describe`` gave."""
    return SefpTensor(
        Sefp(exponent, base, tuple(planes), about["inner"]),
        tuple(about["inputs"]),
        tuple(about["outputs"]),
        Layout(**about["layout"]),
        np.dtype(jnp.dtype(about["dtype"])),
        about["pinned"],
    )


def _order(name: str) -> tuple[int, str]:
    """Place of an array in the file: what more widths read comes first. Pinned parameters' planes are read at every width."""
    _, mark, part = name.rpartition("@")
    return (int(part[5:]) if mark and part.startswith("plane") else int(bool(mark)), name)


def save_planes(
    path: str | os.PathLike[str], params: Any, metadata: Mapping[str, str] | None = None
) -> int:
    """Writes parameters, in SEFP or not, to one file.

    Args:
      path: of the file; one that exists is replaced at once.
      params: nested dicts and lists of arrays and ``SefpTensor``.
      metadata: texts to store along (``planes_metadata``).

    Returns:
      The file's size in bytes.

    Raises:
      TypeError, ValueError: for a dtype or a name that the format doesn't have.
    """
    arrays: dict[str, Any] = {}
    about: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_sefp):
        name = name_of(keys)
        if "@" in name or len(name.split("/")) != len(keys):
            raise ValueError(f"{name!r}: names with @ or / cannot be stored; rename the parameter.")
        if not is_sefp(leaf):
            arrays[name] = leaf
            continue
        arrays |= _arrays(name, leaf)
        about[name] = describe(leaf)
    texts = dict(metadata or {}) | {"format": FORMAT, "sefp": json.dumps(about)}
    header: dict[str, Any] = {"__metadata__": texts}
    end, names = 0, sorted(arrays, key=_order)
    for name in names:
        dtype = np.dtype(arrays[name].dtype)
        if dtype not in _DTYPES:
            raise TypeError(f"{name} is {dtype}, which the file cannot hold; cast it.")
        size = arrays[name].size * dtype.itemsize
        header[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(arrays[name].shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target = pathlib.Path(path)
    temporary = target.with_name(f".{target.name}.tmp")
    with temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(np.ascontiguousarray(arrays[name]).tobytes())
    temporary.replace(target)
    return 8 + len(text) + end


def _header(path: pathlib.Path) -> tuple[dict[str, Any], int]:
    """(header, where the data begins)."""
    with path.open("rb") as file:
        start = file.read(8)
        size = int.from_bytes(start, "little")
        if len(start) < 8 or size > path.stat().st_size - 8:
            raise ValueError(f"{path} is not a safetensors file, or was cut; write it again.")
        try:
            header = json.loads(file.read(size))
        except ValueError as error:
            raise ValueError(f"{path} has a damaged header ({error}); write it again.") from None
    found = header.get("__metadata__", {}).get("format")
    if found != FORMAT:
        raise ValueError(
            f"{path} is in format {found!r}, not {FORMAT!r}; make it with quant.save_planes."
        )
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if 8 + size + max(ends, default=0) != path.stat().st_size:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, not {8 + size + max(ends, default=0)}; it was cut: copy it again."
        )
    return header, 8 + size


def planes_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts of a file of ``save_planes``; reads no arrays. Errors as of ``load_planes``."""
    return _header(pathlib.Path(path))[0]["__metadata__"]


def load_planes(path: str | os.PathLike[str], width: int | None = None) -> Any:
    """Parameters at ``width``, from a file of ``save_planes``; planes beyond it are not even mapped.

    Args:
      path: of the file.
      width: 3 to what is stored; None for that. Pinned parameters have their own.

    Returns:
      The tree that was saved (lists where keys are 0, 1, ...), its parameters in SEFP at ``width``.

    Raises:
      ValueError: for a width that isn't stored, or a file that is damaged or something else.
    """
    path = pathlib.Path(path)
    header, start = _header(path)
    about = json.loads(header.pop("__metadata__")["sefp"])

    def read(name: str) -> jax.Array:
        entry = header[name]
        dtype, shape = np.dtype(_NAMES[entry["dtype"]]), tuple(entry["shape"])
        if 0 in shape:
            return jnp.zeros(shape, dtype)
        offset = start + entry["data_offsets"][0]
        return jnp.asarray(np.memmap(path, dtype, "r", offset, shape))

    tree: dict[str, Any] = {}
    for name in [*about, *(n for n in header if "@" not in n)]:
        leaf = _tensor(name, about[name], header, width, read) if name in about else read(name)
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return _with_lists(tree)


def _tensor(
    name: str, about: dict[str, Any], header: dict, width: int | None, read: Any
) -> SefpTensor:
    planes = [f"{name}@plane{i}" for i in range(BASE_WIDTH, MASTER_WIDTH)]
    planes = [p for p in planes if p in header]
    if not about["pinned"] and width is not None:
        if not BASE_WIDTH <= width <= BASE_WIDTH + len(planes):
            raise ValueError(
                f"width must be from {BASE_WIDTH} to the stored {BASE_WIDTH + len(planes)}; got {width}."
            )
        planes = planes[: width - BASE_WIDTH]
    return described(about, read(f"{name}@exponent"), read(f"{name}@base"), map(read, planes))


def _with_lists(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    values = {key: _with_lists(value) for key, value in tree.items()}
    if values and all(key.isdecimal() for key in values):
        return [values[str(i)] for i in range(len(values))]
    return values
