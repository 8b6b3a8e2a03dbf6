"""Piecewise writing into, and reading from, parameter leaves that may be sharded.

A *piece* is ``leaf[index]`` with ``index`` holding an int or ``slice(None)`` for every dimension:
one layer, one expert, the gate half. Writing pieces straight into the final buffers is what keeps
loading from ever holding a leaf twice.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Index = tuple[Any, ...]
_ALIGNMENT = (
    64  # XLA's CPU client adopts a numpy buffer without copying when it is aligned to this.
)
_PANEL = 16  # 16 float32 are one cache line.
_HOST_PLATFORMS = {"cpu"}  # Where host memory is device memory.


def piece_shape(shape: tuple[int, ...], index: Index) -> tuple[int, ...]:
    """Shape of ``leaf[index]``."""
    return tuple(n for n, i in zip(shape, index, strict=True) if isinstance(i, slice))


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """``target[...] = source``, by panels of the last axis.

    Sources are mostly transposed views of [out, in] files: numpy's own order then touches a new
    cache line per element; panels are 3-5x faster and read the memory map front to back.
    """
    if source.ndim < 2 or source.nbytes < 1 << 16:
        target[...] = source
        return
    for at in range(0, source.shape[-1], _PANEL):
        target[..., at : at + _PANEL] = source[..., at : at + _PANEL]


def _overlap(
    bounds: tuple[slice, ...], shape: tuple[int, ...], index: Index
) -> tuple[Index, Index] | None:
    """(index into the shard, index into the piece) of their common part; None if there is none."""
    in_shard, in_piece = [], []
    for bound, size, i in zip(bounds, shape, index, strict=True):
        start, stop, _ = bound.indices(size)
        if isinstance(i, slice):
            in_shard.append(slice(0, stop - start))
            in_piece.append(slice(start, stop))
        elif start <= i < stop:
            in_shard.append(i - start)
        else:
            return None
    return tuple(in_shard), tuple(in_piece)


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    return raw[offset : offset + nbytes].view(dtype).reshape(shape)


class LeafWriter:
    """Builds one (possibly sharded) array from pieces.

    On CPU devices the buffers are numpy arrays that the finished array adopts; devices that hold
    the same slice share one. Elsewhere they live on the device and are updated in place, so that
    the host never holds more than a piece.

    Args:
      shape: global shape.
      dtype: dtype of the array.
      sharding: where it goes; None for an uncommitted array on the default device.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding | None = None
    ):
        self.shape, self.dtype, self._sharding = shape, np.dtype(dtype), sharding
        if sharding is None:
            placed: Any = {None: (slice(None),) * len(shape)}
            platforms = {jax.default_backend()}
        else:
            placed = sharding.addressable_devices_indices_map(shape)
            platforms = {device.platform for device in placed}
        self._on_host = platforms <= _HOST_PLATFORMS
        self._bounds: dict[Any, tuple[slice, ...]] = placed
        self._buffers: dict[Any, Any] = {}
        shared: dict[Any, np.ndarray] = {}
        for device, bounds in placed.items():
            local = tuple(len(range(*b.indices(n))) for b, n in zip(bounds, shape, strict=True))
            if self._on_host:
                key = tuple(b.indices(n) for b, n in zip(bounds, shape, strict=True))
                if key not in shared:
                    shared[key] = _aligned_empty(local, self.dtype)
                self._buffers[device] = shared[key]
            else:
                self._buffers[device] = jnp.zeros(local, self.dtype, device=device)

    def write(self, index: Index, values: np.ndarray) -> None:
        """Sets ``leaf[index] = values``, converting the dtype."""
        done: set[int] = set()
        for device, bounds in self._bounds.items():
            common = _overlap(bounds, self.shape, index)
            buffer = self._buffers[device]
            if common is None or id(buffer) in done:
                continue
            done.add(id(buffer))
            in_shard, in_piece = common
            if self._on_host:
                copy_into(buffer[in_shard], values[in_piece])
            else:
                self._buffers[device] = self._update(buffer, device, in_shard, values[in_piece])

    def _update(
        self, buffer: jax.Array, device: Any, in_shard: Index, values: np.ndarray
    ) -> jax.Array:
        block = tuple(1 if not isinstance(i, slice) else i.stop for i in in_shard)
        host = np.empty(values.shape, self.dtype)
        copy_into(host, values)
        piece = jax.device_put(host.reshape(block), device)
        if block == buffer.shape:
            return piece
        starts = tuple(0 if isinstance(i, slice) else i for i in in_shard)
        return _update_slice(buffer, piece, starts)

    def finish(self) -> jax.Array:
        """The array. The writer must not be used afterwards."""
        if self._sharding is None:
            return jax.device_put(self._buffers.pop(None))
        arrays = [jax.device_put(buffer, device) for device, buffer in self._buffers.items()]
        self._buffers.clear()
        return jax.make_array_from_single_device_arrays(self.shape, self._sharding, arrays)


@functools.partial(jax.jit, donate_argnums=0)
def _update_slice(buffer: jax.Array, piece: jax.Array, starts: tuple[Any, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(buffer, piece, starts)


def read_into(target: np.ndarray, leaf: Any, index: Index) -> None:
    """``target[...] = leaf[index]`` with the dtype converted; only the piece leaves the device."""
    if not isinstance(leaf, jax.Array):
        copy_into(target, np.asarray(leaf)[index])
        return
    seen: set[Any] = set()
    for shard in leaf.addressable_shards:
        key = tuple(b.indices(n) for b, n in zip(shard.index, leaf.shape, strict=True))
        common = _overlap(shard.index, leaf.shape, index)
        if common is None or key in seen:
            continue
        seen.add(key)
        in_shard, in_piece = common
        copy_into(target[in_piece], _to_host(shard.data, in_shard))


def _to_host(data: jax.Array, index: Index) -> np.ndarray:
    if next(iter(data.devices())).platform in _HOST_PLATFORMS:
        return np.asarray(data)[index]  # a view: nothing is copied
    starts = [0 if isinstance(i, slice) else i for i in index]
    sizes = [i.stop if isinstance(i, slice) else 1 for i in index]
    piece = np.asarray(jax.lax.dynamic_slice(data, starts, sizes))
    return piece.reshape(piece_shape(data.shape, index))
