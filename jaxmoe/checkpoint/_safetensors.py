"""The safetensors format: read lazily, checked strictly, written as a stream.

The ``safetensors`` package's numpy loader knows neither bfloat16 nor fp8, and loads more than it
must; the format is a JSON header and raw bytes, so it is read here with ``np.memmap`` and
ml_dtypes.
"""

import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxmoe.checkpoint._layout import summarise
from jaxmoe.errors import CheckpointCorrupt, CheckpointMismatch

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
        "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
    }.items()
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class Tensor(NamedTuple):
    """A tensor in a file: dtype name of the format, shape, and byte range in the file."""

    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def read(self) -> np.ndarray:
        """The values as a read-only memory map; pages are dropped with the returned array."""
        if self.stop == self.start:
            return np.empty(self.shape, DTYPES[self.dtype])
        return np.asarray(np.memmap(self.file, DTYPES[self.dtype], "r", self.start, self.shape))


def read_header(path: pathlib.Path) -> dict[str, Tensor]:
    """Tensors of one file, in file order.

    Raises:
      CheckpointCorrupt: naming the file, if it is missing, truncated, or its header is not sound.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 0 < length <= size - 8:
                raise CheckpointCorrupt(
                    f"{path}: header of {length} bytes does not fit in a file of {size} bytes; "
                    "download it again."
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointCorrupt(
            f"{path}: cannot be read ({error.strerror}); download it again."
        ) from error
    except ValueError as error:  # bad JSON or bad UTF-8
        raise CheckpointCorrupt(
            f"{path}: header is not valid JSON ({error}); download it again."
        ) from error
    return _check_header(path, header, 8 + length, size)


def _check_header(path: pathlib.Path, header: Any, base: int, size: int) -> dict[str, Tensor]:
    if not isinstance(header, dict):
        raise CheckpointCorrupt(f"{path}: header is not a JSON object; download it again.")
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
            start, stop = (int(n) for n in entry["data_offsets"])
        except (TypeError, KeyError, ValueError) as error:
            raise CheckpointCorrupt(
                f"{path}: header entry of {name} is malformed: {entry!r}."
            ) from error
        if dtype not in DTYPES:
            raise CheckpointCorrupt(
                f"{path}: {name} has unknown dtype {dtype!r}; known: {', '.join(DTYPES)}."
            )
        if min(shape, default=0) < 0 or math.prod(shape) * DTYPES[dtype].itemsize != stop - start:
            raise CheckpointCorrupt(
                f"{path}: {name} is {dtype} {shape} but its offsets [{start}, {stop}) span "
                f"{stop - start} bytes."
            )
        tensors[name] = Tensor(path, dtype, shape, base + start, base + stop)
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
    # The format allows neither holes nor overlaps; so this also finds files cut short and files
    # with a tail.
    at = base
    for name, tensor in tensors.items():
        if tensor.start != at:
            raise CheckpointCorrupt(f"{path}: {name} starts at byte {tensor.start}, expected {at}.")
        at = tensor.stop
    if at != size:
        raise CheckpointCorrupt(
            f"{path}: tensors end at byte {at} but the file has {size}; it is truncated or altered, "
            "download it again."
        )
    return tensors


def scan(directory: pathlib.Path, *, extra_files: Iterable[str] = ()) -> dict[str, Tensor]:
    """All tensors of a single-file or index-sharded checkpoint, in file order; reads headers only.

    ``extra_files`` are read too where they exist.

    Raises:
      ValueError: if the directory holds no safetensors model.
      CheckpointCorrupt: naming a file that is missing or damaged.
      CheckpointMismatch: if the index and the files disagree.
    """
    index_path = directory / INDEX_FILE
    if (directory / SINGLE_FILE).is_file():  # transformers' order of preference
        index, files = None, [SINGLE_FILE]
    elif index_path.is_file():
        index = _read_index(index_path)
        files = sorted(set(index.values()))
    else:
        raise ValueError(
            f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}; "
            "convert the weights to safetensors."
        )
    found: dict[str, Tensor] = {}
    problems = []
    for file in [*files, *(f for f in extra_files if (directory / f).is_file())]:
        for name, tensor in read_header(directory / file).items():
            if name in found:
                problems.append(f"{name} is in both {found[name].file.name} and {file}")
            found[name] = tensor
            if index is not None and file in files and index.pop(name, file) != file:
                problems.append(f"{name} is in {file}, not where the index says")
    problems += [
        f"{name} is not in {file}, where the index says" for name, file in (index or {}).items()
    ]
    if problems:
        raise CheckpointMismatch(summarise(f"{index_path} and the files disagree", problems))
    return found


def _read_index(path: pathlib.Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        if all(isinstance(file, str) and "/" not in file for file in weight_map.values()):
            return dict(weight_map)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointCorrupt(
            f"{path}: not a safetensors index ({error!r}); download it again."
        ) from error
    raise CheckpointCorrupt(
        f"{path}: weight_map must map tensor names to files of the same directory."
    )


class Plan(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def split(plans: Iterable[Plan], max_bytes: int) -> list[list[Plan]]:
    """Fills files in order; a tensor larger than ``max_bytes`` gets a file of its own."""
    files: list[list[Plan]] = [[]]
    used = 0
    for plan in plans:
        if files[-1] and used + plan.nbytes > max_bytes:
            files.append([])
            used = 0
        files[-1].append(plan)
        used += plan.nbytes
    return files


def write(path: pathlib.Path, plans: list[Plan], values: Callable[[str], np.ndarray]) -> None:
    """Writes one file, holding one tensor in memory at a time.

    Args:
      path: the file; written in place, so pass a temporary name.
      plans: tensors in file order.
      values: returns a tensor by name, with the planned dtype and shape.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for plan in plans:
        header[plan.name] = {
            "dtype": _NAMES[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": [at, at + plan.nbytes],
        }
        at += plan.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts 8-byte aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for plan in plans:
            array = values(plan.name)
            if array.dtype != plan.dtype or array.shape != plan.shape:
                raise RuntimeError(
                    f"{plan.name}: planned {plan.dtype} {plan.shape}, "
                    f"produced {array.dtype} {array.shape}."
                )
            # ml_dtypes arrays export no buffer; their bytes do.
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
