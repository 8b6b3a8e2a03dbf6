"""One file for every width: what a width needs is read from it, and nothing else.

A safetensors file. A parameter in SEFP is several arrays (``quant.parts``); others are stored under their path. The file begins with what
every width reads: first the other parameters, then exponents and nibbles, then the planes, plane by plane. So a width's bytes are one run
from the file's start (but for planes of pinned parameters); the rest isn't even mapped. Metadata, all texts: ``"format"``;
``"header_crc32"``; ``"sefp"``, JSON of {PATH: inputs, outputs, layout, inner, dtype, pinned}; ``"crc32"``, JSON of every array's
checksum; and whatever the caller adds.
"""

import dataclasses
import json
import math
import os
import pathlib
import uuid
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from quant.parts import describe, described, parts_of
from quant.rules import name_of
from quant.tensor import check_width, is_sefp

FORMAT = "jaxmoe-sefp-2"
_RESERVED = ("format", "sefp", "crc32", "header_crc32")
_NAMES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I8": np.int8}
_NAMES |= {"I32": np.int32, "U16": np.uint16, "U32": np.uint32, "U8": np.uint8, "I64": np.int64}
_DTYPES = {np.dtype(dtype): name for name, dtype in _NAMES.items()}
# How every header begins; the eight digits that follow count as zeros in the checksum.
_START = b'{"__metadata__":{"header_crc32":"'
_UNKNOWN = "0" * 8
# Data begin at a multiple of this: XLA's CPU client uses what is so aligned where it is mapped, without a copy.
_ALIGNMENT = 64


class PlanesCorrupt(ValueError):
    """A file is cut or altered, or none of ``save_planes``; the message names it, and the array."""


@dataclasses.dataclass(frozen=True)
class _Entry:
    """An array in a file: what stands for it until it is read."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    crc32: str


# -- writing ---------------------------------------------------------------------------------------


def save_planes(
    path: str | os.PathLike[str], params: Any, metadata: Mapping[str, str] | None = None
) -> int:
    """Writes parameters, in SEFP or not, to one file.

    Args:
      path: of the file; one that exists is replaced at once, and stays if this fails.
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
        if is_sefp(leaf):
            arrays |= parts_of(name, leaf)
            about[name] = describe(leaf)
        else:
            arrays[name] = leaf
    arrays = {name: arrays[name] for name in sorted(arrays, key=_order)}
    taken = [name for name in metadata or {} if name in _RESERVED]
    if taken:
        raise ValueError(
            f"metadata must not use the names {', '.join(_RESERVED)}; got {taken[0]!r}. Take another."
        )
    texts = dict(metadata or {}) | {"format": FORMAT, "sefp": json.dumps(about)}
    return _replace(pathlib.Path(path), arrays, texts)


def _order(name: str) -> tuple[int, str]:
    """Place of an array in the file: what more widths read comes first. Pinned parameters' planes are read at every width."""
    _, mark, part = name.rpartition("@")
    return (int(part[5:]) if mark and part.startswith("plane") else int(bool(mark)), name)


def _head(arrays: dict[str, Any], texts: dict[str, str], checksums: dict[str, str]) -> bytes:
    """What stands before the data; as long whatever the checksums are."""
    texts = {"header_crc32": _UNKNOWN, "crc32": json.dumps(checksums)} | texts
    header: dict[str, Any] = {"__metadata__": texts}
    end = 0
    for name, array in arrays.items():
        dtype = np.dtype(array.dtype)
        if dtype not in _DTYPES:
            raise TypeError(f"{name} is {dtype}, which the file cannot hold; cast it.")
        begin, end = end, end + array.size * dtype.itemsize
        header[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    own = len(_START)
    text = text[:own] + f"{zlib.crc32(text):08x}".encode() + text[own + len(_UNKNOWN) :]
    return len(text).to_bytes(8, "little") + text


def _replace(target: pathlib.Path, arrays: dict[str, Any], texts: dict[str, str]) -> int:
    """Writes a file beside ``target`` and, once all of it is on disk, puts it in its place."""
    checksums = dict.fromkeys(arrays, _UNKNOWN)
    head = _head(arrays, texts, checksums)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(head)
            for name, array in arrays.items():  # each is on the host once, and none beside it
                data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                checksums[name] = f"{zlib.crc32(data):08x}"
                file.write(data)
            size = file.tell()
            file.seek(0)
            file.write(_head(arrays, texts, checksums))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, survives a power failure
    finally:
        os.close(folder)
    return size


# -- reading ---------------------------------------------------------------------------------------


def planes_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts of a file of ``save_planes``; reads no arrays. Errors as of ``load_planes``."""
    return _header(pathlib.Path(path))[0]["__metadata__"]


def load_planes(
    path: str | os.PathLike[str],
    width: int | None = None,
    shardings: Callable[[Any], Any] | None = None,
) -> Any:
    """Parameters at ``width``, from a file of ``save_planes``; planes beyond it are not even mapped.

    Args:
      path: of the file.
      width: 3 to what is stored; None for that. Pinned parameters have their own.
      shardings: gives a sharding for each array, from the tree of their shapes (``jax.ShapeDtypeStruct``); of each array every
        device then gets its own part and no more. Default: uncommitted, on the default device.

    Returns:
      The tree that was saved (lists where keys are 0, 1, ...), its parameters in SEFP at ``width``.

    Raises:
      ValueError: for a width that isn't stored.
      PlanesCorrupt: for a file that is damaged or something else. What isn't read isn't checked.
    """
    if width is not None:
        check_width(width)
    path = pathlib.Path(path)
    header, start = _header(path)
    entries = _entries(path, header, start)
    try:
        about = json.loads(header["__metadata__"]["sefp"])
        stored = {name: described(name, own, entries) for name, own in about.items()}
    except (AttributeError, KeyError, ValueError) as error:
        raise PlanesCorrupt(f"{path}: {error} Write it again.") from None
    tree: dict[str, Any] = {}
    for name, leaf in (stored | {n: e for n, e in entries.items() if "@" not in n}).items():
        if is_sefp(leaf) and width is not None and not leaf.pinned:
            leaf = leaf.truncate(width)
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    tree = _with_lists(tree)
    if shardings is None:
        return jax.tree.map(lambda entry: jax.device_put(_mapped(path, start, entry)), tree)
    where = shardings(jax.tree.map(lambda e: jax.ShapeDtypeStruct(e.shape, e.dtype), tree))
    return jax.tree.map(lambda entry, own: _placed(_mapped(path, start, entry), own), tree, where)


def _header(path: pathlib.Path) -> tuple[dict[str, Any], int]:
    """(header, where the data begin)."""
    with path.open("rb") as file:
        start = file.read(8)
        size = int.from_bytes(start, "little")
        if len(start) < 8 or size > path.stat().st_size - 8:
            raise PlanesCorrupt(f"{path} is not a safetensors file, or was cut; write it again.")
        text = file.read(size)
    try:
        header = json.loads(text)
        found = header["__metadata__"]["format"]
    except (KeyError, TypeError, ValueError) as error:
        raise PlanesCorrupt(f"{path} has a damaged header ({error!r}); write it again.") from None
    if found != FORMAT:
        raise PlanesCorrupt(
            f"{path} is in format {found!r}, not {FORMAT!r}; make it with quant.save_planes."
        )
    own, end = len(_START), len(_START) + len(_UNKNOWN)
    crc = zlib.crc32(text[:own] + _UNKNOWN.encode() + text[end:])
    if text[:own] != _START or text[own:end] != f"{crc:08x}".encode():
        raise PlanesCorrupt(f"{path}: its header does not match the checksum; write it again.")
    return header, 8 + size


def _entries(path: pathlib.Path, header: dict[str, Any], start: int) -> dict[str, _Entry]:
    """The arrays that a header lists, after checking that they fill the file from ``start`` on.

    Raises:
      PlanesCorrupt: naming the array.
    """
    entries, end, size = {}, 0, path.stat().st_size
    try:
        checksums = json.loads(header["__metadata__"]["crc32"])
        listed = [(name, e) for name, e in header.items() if name != "__metadata__"]
        for name, entry in sorted(listed, key=lambda item: item[1]["data_offsets"]):
            dtype, shape = np.dtype(_NAMES[entry["dtype"]]), tuple(entry["shape"])
            begin, stop = entry["data_offsets"]
            if begin != end or stop - begin != math.prod(shape) * dtype.itemsize:
                raise PlanesCorrupt(
                    f"{path}: {name} is {entry['dtype']} {list(shape)} and should begin at {end}, but lies from {begin} to {stop}; "
                    "write the file again."
                )
            entries[name] = _Entry(name, dtype, shape, begin, checksums[name])
            end = stop
    except (KeyError, TypeError, ValueError) as error:
        raise PlanesCorrupt(f"{path} has a damaged header ({error!r}); write it again.") from None
    if start + end != size:
        raise PlanesCorrupt(
            f"{path} has {size} bytes, not {start + end}; it was cut: copy it again."
        )
    return entries


def _mapped(path: pathlib.Path, start: int, entry: _Entry) -> np.ndarray:
    """The array where it lies in the file.

    Raises:
      PlanesCorrupt: naming it, if it does not match its checksum.
    """
    if 0 in entry.shape:
        return np.zeros(entry.shape, entry.dtype)
    array = np.memmap(path, entry.dtype, "r", start + entry.begin, entry.shape)
    if f"{zlib.crc32(array.reshape(-1).view(np.uint8)):08x}" != entry.crc32:
        raise PlanesCorrupt(f"{path}: {entry.name} does not match its checksum; copy it again.")
    return array


def _placed(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _with_lists(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    values = {key: _with_lists(value) for key, value in tree.items()}
    if values and values.keys() == {str(i) for i in range(len(values))}:
        return [values[str(i)] for i in range(len(values))]
    return values
