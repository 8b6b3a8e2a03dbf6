"""Native checkpoints: Orbax arrays, one directory per step, atomic, for any mesh.

Layout of ``directory/<step>/``::

  state/          written by Orbax: zarr, uncompressed, because float weights hardly compress and
                  because files can then be read in parts. One expert of one layer is one file, so
                  that recovery reads what it lost. A parameter in SEFP is several arrays (``_sefp_leaves``).
  metadata.json   format version, config, topology, versions, the leaves, the user's extras
  MANIFEST        size and CRC-32 of every other file; written last

All is written below ``directory/.tmp-<step>/`` and renamed: a step is there whole or not at all.
"""

import contextlib
import datetime
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding

from jaxmoe import params as params_lib
from jaxmoe import sharding as sharding_lib
from jaxmoe.checkpoint import (
    _experts,
    _manifest,
    _sefp_leaves,
    _steps,
    _targets,
    _train_state,
)
from jaxmoe.checkpoint._layout import check_dtype, flat_params, unflatten
from jaxmoe.config import ModelConfig
from jaxmoe.errors import CheckpointMismatch

FORMAT_VERSION = 1
_METADATA = "metadata.json"
_STATE = "state"
# Restoring onto another mesh reads whole chunks: small enough to waste little, large enough for
# fast disks.
_CHUNK_BYTES = 64 << 20


class Restored(NamedTuple):
    """What ``restore`` returns: ``params, config, *_ = restore(directory)``.

    Attributes:
      params: the parameters.
      config: their architecture.
      step: the step they were saved at.
      extra: the JSON-serialisable dict given to ``save``.
      train_state: the restored tree if a target was given, else None.
    """

    params: params_lib.Params
    config: ModelConfig
    step: int
    extra: dict[str, Any]
    train_state: Any = None

    def __repr__(self) -> str:
        size = sum(x.size for x in params_lib.flatten(self.params).values())
        nbytes = sum(x.nbytes for x in jax.tree.leaves(self.params))
        state = (
            "no"
            if self.train_state is None
            else f"{len(jax.tree.leaves(self.train_state))} leaves of"
        )
        return (
            f"Restored(step={self.step}, {self.config.model_type}, {size:,} parameters in "
            f"{nbytes:,} bytes, {state} train_state, extra={sorted(self.extra)})"
        )


# -- saving ----------------------------------------------------------------------------------------


def save(
    directory: str | os.PathLike[str],
    params: params_lib.Params,
    config: ModelConfig,
    step: int,
    *,
    train_state: Any = None,
    extra: dict[str, Any] | None = None,
    keep: int | None = None,
    overwrite: bool = False,
    topology: dict[str, Any] | None = None,
) -> pathlib.Path:
    """Saves one step, atomically: a crash at any moment leaves the steps before it whole.

    One writer per directory at a time; what killed saves left behind is removed. With several JAX
    processes all must call it, on a shared file system.

    Args:
      directory: holds one subdirectory per step; created if needed.
      params: parameters of ``config``, sharded or not, in SEFP or not.
      config: their architecture; saved along.
      step: non-negative step number.
      train_state: optional pytree of arrays, PRNG keys (typed or raw) and Python scalars, e.g. an
        optax state.
      extra: optional JSON-serialisable dict, e.g. the position in the data.
      keep: afterwards keep only this many highest-numbered steps (and this one); default: all.
      overwrite: replace a step that exists (also atomically) instead of raising.
      topology: of the state that ``params`` are a copy of (``topology_of``); default theirs.

    Returns:
      The step's directory.

    Raises:
      ValueError: params do not fit config, or the step exists.
      TypeError: ``extra`` is not JSON-serialisable, or a leaf is not an array.

    Example:
      >>> import jax, jaxmoe, tempfile
      >>> config = jaxmoe.presets["tiny"]
      >>> directory = tempfile.TemporaryDirectory()
      >>> params = jaxmoe.init_params(config, jax.random.key(0))
      >>> _ = save(directory.name, params, config, 100, extra={"file": 3})
      >>> restored = restore(directory.name)
      >>> restored.step, restored.extra
      (100, {'file': 3})
      >>> restore_experts(directory.name, layers=[2], experts=[5])[2][5]["down"].shape
      (64, 128)
      >>> directory.cleanup()
    """
    root = pathlib.Path(directory).absolute()
    step = _check_save(root, step, keep, overwrite)
    # numpy leaves go through device_put (no copy on CPU): Orbax chunks only jax arrays.
    flat, sefp = _sefp_leaves.apart(flat_params(params, config))
    flat = {name: x if isinstance(x, jax.Array) else jax.device_put(x) for name, x in flat.items()}
    packed = _train_state.pack(train_state)
    topology = topology or topology_of(flat)
    metadata = _metadata_json(flat, sefp, config, step, packed, extra, topology)

    arrays = {_orbax_name(name): leaf for name, leaf in flat.items()} | packed.arrays
    temporary = _steps.temporary(root, step)
    primary = jax.process_index() == 0
    if primary:
        root.mkdir(parents=True, exist_ok=True)
        _steps.sweep(root)
        temporary.mkdir()
    try:
        _orbax_save(temporary / _STATE, arrays)  # begins and ends with a barrier over all processes
        if primary:
            (temporary / _METADATA).write_text(metadata)
            _manifest.fsync(temporary / _METADATA)
            _manifest.write(temporary)
            _steps.commit(root, step)
    except BaseException:
        if primary:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if primary and keep is not None:
        _steps.drop_all_but(root, keep, step)
    if jax.process_count() > 1:
        ocp.multihost.sync_global_processes("jaxmoe:checkpoint:save")
    return root / str(step)


def _check_save(root: pathlib.Path, step: Any, keep: int | None, overwrite: bool) -> int:
    """The step to save; errors of ``save`` about it and ``keep``."""
    step = _steps.check_step(step)
    if keep is not None and keep < 1:
        raise ValueError(
            f"keep must be at least 1 (the step being saved); got {keep}. Use None to keep all."
        )
    if not overwrite and step in _steps.steps(root):
        raise ValueError(
            f"step {step} already exists in {root}; pass overwrite=True, or another step."
        )
    return step


def latest_step(directory: str | os.PathLike[str]) -> int | None:
    """The newest complete step below ``directory``, or None."""
    known = _steps.steps(pathlib.Path(directory))
    return known[-1] if known else None


def _orbax_name(leaf: str) -> str:
    return "params." + leaf.replace("/", ".")


def topology_of(params: params_lib.Params) -> dict[str, Any]:
    """Where arrays lie, for the metadata: mesh, device_count, process_count, device_kind."""
    shardings = [leaf.sharding for leaf in jax.tree.leaves(params)]
    meshes = [s.mesh for s in shardings if isinstance(s, NamedSharding)]
    devices = set().union(*(s.device_set for s in shardings))
    return {
        "mesh": dict(meshes[0].shape) if meshes else None,
        "device_count": len(devices),
        "process_count": jax.process_count(),
        "device_kind": next(iter(devices)).device_kind,
    }


def _metadata_json(
    flat: dict[str, jax.Array],
    sefp: dict[str, Any],
    config: ModelConfig,
    step: int,
    packed: _train_state.Packed,
    extra: dict[str, Any] | None,
    topology: dict[str, Any],
) -> str:
    metadata = {
        "format": "jaxmoe",
        "format_version": FORMAT_VERSION,
        "step": step,
        "saved_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": config.to_dict(),
        "topology": topology,
        "versions": {"jax": jax.__version__, "orbax": ocp.__version__},
        "params": {
            name: {"shape": list(x.shape), "dtype": x.dtype.name} for name, x in flat.items()
        },
        "sefp": sefp,
        "train_state": packed.entries,
        "extra": extra or {},
    }
    try:
        return json.dumps(metadata, indent=1)
    except TypeError as error:
        raise TypeError(
            f"extra must be JSON-serialisable: {error}; put arrays into train_state."
        ) from error


def _save_args(name: str, leaf: Any) -> ocp.SaveArgs:
    """Chunk shapes: one expert of one layer; for the rest whole leaves, or bounded pieces of them."""
    if name.startswith("params.") and ".experts." in name:
        return ocp.SaveArgs(shard_axes=(0, 1) if name.startswith("params.segments.") else (0,))
    if leaf.nbytes <= _CHUNK_BYTES:
        return ocp.SaveArgs()
    return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if leaf.ndim > 2 else ())


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Drops Orbax's messages below ERROR ("nothing to merge" at each save), no one else's."""

    def keep(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or "orbax" not in record.pathname

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _checkpointer(*, alone: bool = False) -> ocp.Checkpointer:
    """Orbax's; ``alone`` in this process, where otherwise all have to call it and meet at its barriers."""
    handlers = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
        (
            jax.Array,
            # Replicas share the writing of large arrays only: each slice compiles a program.
            ocp.type_handlers.ArrayHandler(
                use_replica_parallel=True,
                min_slice_bytes_for_replica_parallel=_CHUNK_BYTES,
                enable_write_sharding_file=False,
            ),
        ),
    )
    processes = ocp.options.MultiprocessingOptions()
    if alone:
        own = jax.process_index()
        processes = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(
            use_ocdbt=False,
            use_compression=False,
            type_handler_registry=handlers,
            multiprocessing_options=processes,
        ),
        multiprocessing_options=processes,
    )


def _orbax_save(path: pathlib.Path, arrays: dict[str, Any]) -> None:
    save_args = {name: _save_args(name, x) for name, x in arrays.items()}
    with _quiet_orbax(), _checkpointer() as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(arrays, save_args=save_args))


# -- restoring -------------------------------------------------------------------------------------


def restore(
    directory: str | os.PathLike[str],
    mesh: Mesh | None = None,
    *,
    rules: sharding_lib.Rules | None = None,
    dtype: Any = None,
    step: int | None = None,
    train_state: Any = None,
    verify: bool = True,
) -> Restored:
    """Restores a step, onto any mesh or the default device, whatever it was saved from.

    With a mesh of several processes all must call it; without one each may, alone.

    Args:
      directory: as given to ``save``.
      mesh: where to put the arrays (``sharding.make_mesh``); default: uncommitted on the default
        device.
      rules: logical axes to mesh axes; default ``sharding.Rules()``.
      dtype: converts all parameters whose spec fixes none; default: as saved.
      step: default: the latest.
      train_state: target tree for the saved train_state: ``jax.ShapeDtypeStruct``s
        (``jax.eval_shape``), arrays or Python scalars. A leaf's own sharding is honoured; without
        one, a leaf that mirrors a parameter (same path below, same shape: optimizer moments) is
        sharded like it, and others are replicated over ``mesh``.
      verify: compare the checksum of every file first, at memory speed; otherwise only existence
        and sizes.

    Returns:
      Restored(params, config, step, extra, train_state).

    Raises:
      CheckpointCorrupt: a file is missing, truncated or altered; all such files are named.
      CheckpointMismatch: the format is newer, or leaves do not fit this version or the
        ``train_state`` target.
      ValueError: no such step, or a mesh that sizes are not divisible by.
    """
    dtype = None if dtype is None else check_dtype(dtype)
    step, path = _steps.find(pathlib.Path(directory).absolute(), step)
    manifest = _manifest.read(path)
    _manifest.verify(path, manifest, contents=verify)
    metadata = read_metadata(path, manifest)
    config = ModelConfig.from_dict(metadata["config"])
    specs = params_lib.flatten(params_lib.spec(config))
    about = metadata.get("sefp", {})
    saved = _sefp_leaves.together(_targets.structs(metadata["params"]), about)
    _targets.check_params(path, specs, saved)
    targets = _targets.targets(config, saved, mesh, rules, dtype)
    parts = [_sefp_leaves.parts_of(name, target) for name, target in targets.items()]
    wanted = {_orbax_name(name): x for own in parts for name, x in own.items()}
    state = None
    if train_state is not None:
        state = _train_state.Targets(path, metadata["train_state"], train_state)
        wanted |= _targets.placed(state, config, mesh, rules)
    arrays = _orbax_restore(path / _STATE, wanted)
    flat = {name: arrays.pop(_orbax_name(name)) for own in parts for name in own}
    if mesh is None:  # one leaf at a time: on CPU an unaligned one is copied
        flat = {name: jax.device_put(flat.pop(name)) for name in list(flat)}
    flat = _sefp_leaves.together(flat, about)
    if dtype is not None:
        flat = {n: x.astype(dtype) if n in about else x for n, x in flat.items()}
    tree = None if state is None else state.build(arrays)
    return Restored(unflatten(flat, config), config, step, metadata["extra"], tree)


def restore_config(directory: str | os.PathLike[str], step: int | None = None) -> ModelConfig:
    """The config of a saved step (default: the latest); reads no arrays.

    Raises:
      CheckpointCorrupt: the metadata is missing or damaged.
      ValueError: no such step.
    """
    _, path = _steps.find(pathlib.Path(directory).absolute(), step)
    return ModelConfig.from_dict(read_metadata(path, _manifest.read(path))["config"])


def holds_sefp(directory: str | os.PathLike[str], step: int | None = None) -> bool:
    """Whether parameters of a saved step (default: the latest) are in SEFP; reads no arrays. Errors as of ``restore_config``."""
    _, path = _steps.find(pathlib.Path(directory).absolute(), step)
    return bool(read_metadata(path, _manifest.read(path)).get("sefp"))


def restore_extra(directory: str | os.PathLike[str], step: int | None = None) -> dict[str, Any]:
    """The ``extra`` of a saved step (default: the latest); reads no arrays.

    Raises:
      CheckpointCorrupt: the metadata is missing or damaged.
      ValueError: no such step.
    """
    _, path = _steps.find(pathlib.Path(directory).absolute(), step)
    return read_metadata(path, _manifest.read(path))["extra"]


def read_metadata(path: pathlib.Path, manifest: _manifest.Manifest) -> dict[str, Any]:
    """``metadata.json`` of a step directory, with its format version checked."""
    metadata = json.loads(_manifest.read_file(path, manifest, _METADATA))
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointMismatch(
            f"{path} has format version {version}; this jaxmoe reads version {FORMAT_VERSION}. "
            "Use the jaxmoe that wrote it."
        )
    return metadata


def _orbax_restore(path: pathlib.Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """The wanted arrays: jax arrays where there is a sharding, numpy arrays elsewhere."""

    def arguments(target: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
        if target.sharding is None:  # through numpy, because Orbax would commit it to a device
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=target.dtype)
        return ocp.ArrayRestoreArgs(
            sharding=target.sharding, global_shape=target.shape, dtype=target.dtype
        )

    restore_args = {name: arguments(target) for name, target in wanted.items()}
    alone = all(target.sharding is None for target in wanted.values())
    with _quiet_orbax(), _checkpointer(alone=alone) as checkpointer:
        arrays = checkpointer.restore(
            path,
            args=ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True),
        )
    return {name: arrays[name] for name in wanted}


def restore_experts(
    directory: str | os.PathLike[str],
    layers: Sequence[int] | None = None,
    experts: Sequence[int] | None = None,
    *,
    step: int | None = None,
    dtype: Any = None,
    verify: bool = True,
) -> dict[int, dict[int, dict[str, np.ndarray]]]:
    """Reads the weights of some experts, and beside them only the manifest and small metadata.

    Needs no mesh, no other process and no collective, so that a survivor can call it while its
    peers are gone.

    Args:
      directory: as given to ``save``.
      layers: absolute decoder layer indices (MTP layers follow the main ones); default: every layer
        with experts.
      experts: expert indices; default: all.
      step: default: the latest.
      dtype: converts; default: as saved.
      verify: check each file's checksum as it is read (once; other files are not looked at);
        otherwise sizes.

    Returns:
      ``{layer: {expert: {"gate_up": [D, 2, F], "down": [F, D]}}}`` of host arrays.

    Raises:
      CheckpointCorrupt: a file that is read is missing, truncated or altered; it is named.
      ValueError: no such step, layer or expert.
    """
    _, path = _steps.find(pathlib.Path(directory).absolute(), step)
    manifest = _manifest.read(path)
    metadata = read_metadata(path, manifest)
    config = ModelConfig.from_dict(metadata["config"])
    if metadata.get("sefp"):
        raise CheckpointMismatch(
            f"{path} holds parameters in SEFP, of which single experts cannot be read; restore it, or save unquantised weights."
        )
    store = _experts.Store(
        path, manifest, lambda leaf: f"{_STATE}/{_orbax_name(leaf)}", verify=verify
    )
    return _experts.read(store, config, layers, experts, dtype)
