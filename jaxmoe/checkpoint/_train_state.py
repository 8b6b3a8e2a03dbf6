"""Arbitrary pytrees in a native checkpoint: leaves by number in the files, by path in the metadata.

Only leaves are stored; containers (optax's named tuples and the like) come from the caller's target
tree. So no class needs to be registered or importable by name, and no path can break a file name.
"""

import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmoe.checkpoint._layout import summarise
from jaxmoe.errors import CheckpointMismatch

_SCALARS = (bool, int, float, str)


def _path_name(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(p, "key", getattr(p, "idx", getattr(p, "name", p)))) for p in path)


def _named_leaves(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {_path_name(path): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ValueError(
            "train_state has two leaves of the same path; rename keys that contain '/'."
        )
    return named


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


class Packed(NamedTuple):
    """``entries`` go into the metadata (None: no train state), ``arrays`` into the files."""

    entries: list[dict[str, Any]] | None
    arrays: dict[str, Any]


def _array_name(i: int) -> str:
    return f"train.{i:05d}"


def pack(tree: Any) -> Packed:
    """Splits a tree into described leaves and arrays.

    Raises:
      TypeError: a leaf is neither an array nor a Python scalar.
    """
    if tree is None:
        return Packed(None, {})
    entries: list[dict[str, Any]] = []
    arrays = {}
    for i, (path, leaf) in enumerate(_named_leaves(tree).items()):
        entry: dict[str, Any] = {"path": path}
        entries.append(entry)
        if isinstance(leaf, _SCALARS):
            entry["value"] = leaf
            continue
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise TypeError(
                f"train_state leaf {path!r} must be an array or a Python scalar; "
                f"got {type(leaf).__name__}."
            )
        if _is_key(leaf):
            entry["key_impl"] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        arrays[_array_name(i)] = np.asarray(leaf) if isinstance(leaf, np.generic) else leaf
        entry |= {"shape": list(leaf.shape), "dtype": np.dtype(leaf.dtype).name}
    return Packed(entries, arrays)


class Targets:
    """Matches a target tree with the saved entries, and fills it.

    Args:
      path: the step directory, for messages.
      entries: saved descriptions, or None.
      tree: the target.

    Raises:
      CheckpointMismatch: listing every leaf that differs in path, shape or dtype.
    """

    def __init__(self, path: pathlib.Path, entries: list[dict[str, Any]] | None, tree: Any):
        if entries is None:
            raise CheckpointMismatch(
                f"{path} holds no train_state; restore it without the train_state argument."
            )
        self._structure = jax.tree.structure(tree)
        self._leaves = _named_leaves(tree)
        saved = {entry["path"]: (i, entry) for i, entry in enumerate(entries)}
        problems = [
            f"missing {name}: not in the checkpoint" for name in self._leaves if name not in saved
        ]
        problems += [
            f"unexpected {name}: not in the target" for name in saved if name not in self._leaves
        ]
        for name in self._leaves.keys() & saved.keys():
            problem = _difference(self._leaves[name], saved[name][1])
            if problem:
                problems.append(f"{name}: {problem}")
        if problems:
            raise CheckpointMismatch(
                summarise(f"{path}: train_state does not fit the target", sorted(problems))
            )
        self._saved = [saved[name] for name in self._leaves]
        self.paths = {_array_name(i): entry["path"] for i, entry in self._saved}
        self.on_host = {n for n, path in self.paths.items() if _on_host(self._leaves[path])}

    def arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What to read: stored shapes and dtypes, with the targets' NamedShardings."""
        out = {}
        for i, entry in self._saved:
            if "value" not in entry:
                sharding = getattr(self._leaves[entry["path"]], "sharding", None)
                named = sharding if isinstance(sharding, jax.sharding.NamedSharding) else None
                out[_array_name(i)] = jax.ShapeDtypeStruct(
                    tuple(entry["shape"]), entry["dtype"], sharding=named
                )
        return out

    def build(self, arrays: dict[str, Any]) -> Any:
        """The target tree with restored leaves."""
        leaves = [
            _convert(self._leaves[entry["path"]], entry, arrays.get(_array_name(i)))
            for i, entry in self._saved
        ]
        return jax.tree.unflatten(self._structure, leaves)


def _on_host(target: Any) -> bool:
    return isinstance(target, (*_SCALARS, np.ndarray, np.generic))


def _difference(target: Any, entry: dict[str, Any]) -> str | None:
    if isinstance(target, _SCALARS):
        return (
            None
            if "value" in entry or entry["shape"] == []
            else f"expected a scalar, found shape {entry['shape']}"
        )
    if not hasattr(target, "shape"):
        return (
            f"target must be an array, a ShapeDtypeStruct or a scalar; got {type(target).__name__}"
        )
    if "value" in entry:
        return (
            None
            if tuple(target.shape) == ()
            else f"expected shape {tuple(target.shape)}, found a scalar"
        )
    if _is_key(target) != ("key_impl" in entry):
        return "one of target and checkpoint is a typed PRNG key, the other is raw"
    described = jax.eval_shape(jax.random.key_data, target) if _is_key(target) else target
    expected = (tuple(described.shape), np.dtype(described.dtype).name)
    found = (tuple(entry["shape"]), entry["dtype"])
    return (
        None
        if expected == found
        else f"expected {expected[1]} {expected[0]}, found {found[1]} {found[0]}"
    )


def _convert(target: Any, entry: dict[str, Any], value: Any) -> Any:
    """A restored leaf in the target's type."""
    if "value" in entry:
        value = entry["value"]
        if not isinstance(target, _SCALARS):
            value = np.asarray(value, target.dtype)
    if isinstance(target, _SCALARS):
        return value if "value" in entry else np.asarray(value).item()
    if isinstance(target, np.generic):
        return np.asarray(value)[()]
    if isinstance(target, np.ndarray):
        return value
    value = jax.device_put(value) if isinstance(value, np.ndarray) else value
    return jax.random.wrap_key_data(value, impl=entry["key_impl"]) if "key_impl" in entry else value
