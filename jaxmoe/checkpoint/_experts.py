"""Reads single experts out of a native checkpoint, file by file.

Orbax reads whole leaves; the arrays are uncompressed zarr (version 2), whose chunks are plain
C-order files named by their grid position, so the few files of an expert are read directly: once,
and checked on the way.
"""

import concurrent.futures
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoint import _manifest
from jaxmoe.checkpoint._layout import layer_slots
from jaxmoe.config import ModelConfig
from jaxmoe.errors import CheckpointMismatch

_LEAVES = ("gate_up", "down")


class Store:
    """Random access to the zarr arrays of one step directory.

    Args:
      path: the step directory.
      manifest: its manifest.
      folder: leaf path name -> folder of its array, relative to ``path``.
      verify: check contents against the manifest.
    """

    def __init__(
        self,
        path: pathlib.Path,
        manifest: _manifest.Manifest,
        folder: Callable[[str], str],
        *,
        verify: bool,
    ):
        self._path, self._manifest, self._folder, self._verify = path, manifest, folder, verify
        self._headers: dict[str, dict[str, Any]] = {}

    def header(self, leaf: str) -> dict[str, Any]:
        """The array's ``.zarray``."""
        if leaf not in self._headers:
            name = f"{self._folder(leaf)}/.zarray"
            header = json.loads(
                _manifest.read_file(self._path, self._manifest, name, contents=self._verify)
            )
            plain = {"zarr_format": 2, "compressor": None, "filters": None, "order": "C"}
            other = {
                key: header.get(key) for key, value in plain.items() if header.get(key) != value
            }
            if other:
                raise CheckpointMismatch(
                    f"{self._path / name}: {other} cannot be read in parts; expected {plain}."
                )
            self._headers[leaf] = header
        return self._headers[leaf]

    def read(self, leaf: str, at: tuple[int, ...]) -> np.ndarray:
        """``leaf[at]`` for leading indices ``at``, from the chunks that hold it."""
        header = self.header(leaf)
        shape, chunk, dtype = header["shape"], header["chunks"], jnp.dtype(header["dtype"])
        out = np.empty(shape[len(at) :], dtype)
        fixed = [i // c for i, c in zip(at, chunk, strict=False)]
        grid = [
            range(math.ceil(n / c)) for n, c in zip(shape[len(at) :], chunk[len(at) :], strict=True)
        ]
        inside = tuple(i % c for i, c in zip(at, chunk, strict=False))
        for position in itertools.product(*grid):
            name = header.get("dimension_separator", ".").join(map(str, (*fixed, *position)))
            data = _manifest.read_file(
                self._path, self._manifest, f"{self._folder(leaf)}/{name}", contents=self._verify
            )
            values = np.frombuffer(data, dtype).reshape(chunk)[inside]
            target = tuple(
                slice(p * c, (p + 1) * c) for p, c in zip(position, chunk[len(at) :], strict=True)
            )
            # Edge chunks are stored full-size; only the part inside the array counts.
            part = out[target]
            part[...] = values[tuple(slice(n) for n in part.shape)]
        return out


def _choose(name: str, chosen: Sequence[int] | None, allowed: Sequence[int], why: str) -> list[int]:
    if chosen is None:
        return list(allowed)
    chosen = [int(i) for i in chosen]
    bad = sorted(set(chosen) - set(allowed))
    if bad:
        raise ValueError(f"{name} {bad} do not exist; {why} {list(allowed)}.")
    return chosen


def read(
    store: Store,
    config: ModelConfig,
    layers: Sequence[int] | None,
    experts: Sequence[int] | None,
    dtype: Any,
) -> dict[int, dict[int, dict[str, np.ndarray]]]:
    """See ``native.restore_experts``."""
    slots = {slot.index: slot for slot in layer_slots(config) if slot.kind.mlp == "moe"}
    layers = _choose("layers", layers, list(slots), "layers with experts are")
    experts = _choose("experts", experts, range(config.n_routed_experts or 0), "experts are")

    def load(layer: int, expert: int, leaf: str) -> np.ndarray:
        slot = slots[layer]
        at = (expert,) if slot.stack is None else (slot.stack, expert)
        values = store.read(f"{slot.path}/moe/experts/{leaf}", at)
        return values if dtype is None else values.astype(dtype)

    for layer in layers:  # the headers once, before threads would race for them
        for leaf in _LEAVES:
            store.header(f"{slots[layer].path}/moe/experts/{leaf}")
    jobs = list(itertools.product(layers, experts, _LEAVES))
    result: dict[int, dict[int, dict[str, np.ndarray]]] = {
        layer: {e: {} for e in experts} for layer in layers
    }
    # Reads and checksums release the GIL; threads also hide the latency of network file systems.
    with concurrent.futures.ThreadPoolExecutor(8, "jaxmoe-experts") as pool:
        for (layer, expert, leaf), values in zip(
            jobs, pool.map(lambda job: load(*job), jobs), strict=True
        ):
            result[layer][expert][leaf] = values
    return result
