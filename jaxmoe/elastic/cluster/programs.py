"""Where compiled programs are kept between runs: for all that they depend on a folder of its own, which nobody else can write to.

Programs are unpickled and run, so whoever can write there can run code in the ranks.
"""

import hashlib
import json
import os
import pathlib
import platform
import stat
from typing import Any

import jax
import jaxlib

import jaxmoe
import pallas_kernels
from jaxmoe.config import ModelConfig
from pallas_kernels import native

_SOURCES = (".py", ".cc", ".h", ".json")  # .json: measured sizes of kernels


def users_folder() -> pathlib.Path:
    """The user's own: ``$XDG_CACHE_HOME/jaxmoe/programs``, or the same below ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "jaxmoe" / "programs"


def folder_for(base: str | os.PathLike[str], config: ModelConfig, *others: Any) -> pathlib.Path:
    """The folder below ``base`` of programs for just these shapes, this code, JAX and processor. Made if it is not there.

    Args:
      base: folder of all such folders.
      config: the model.
      others: whatever else decides shapes or is built into programs: names, numbers, and tuples and dicts of them.

    Raises:
      ValueError: somebody else could write there.
    """
    folder = pathlib.Path(base).absolute() / fingerprint(config, *others)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = folder.resolve()
    for path in (folder, *folder.iterdir()):
        _check(path, own=True)
    for path in folder.parents:  # who can write there can put another folder into this one's place
        _check(path, own=False)
    return folder


def _check(path: pathlib.Path, *, own: bool) -> None:
    """Refuses what others can change; with ``own``, also what belongs to the system or lies in a shared place like /tmp."""
    info, me = path.stat(), os.geteuid()
    problem = None
    if info.st_uid != me and (own or info.st_uid != 0):
        problem = f"{path} belongs to user {info.st_uid}"
    elif info.st_mode & 0o022 and (own or not info.st_mode & stat.S_ISVTX):
        problem = f"{path} has mode {stat.S_IMODE(info.st_mode):o}"
    if problem is not None:
        raise ValueError(
            "the folder of compiled programs must be writable by you (and root) alone, for what lies there is run; "
            f"{problem}. Mend that with chmod go-w or chown, or name another folder with --programs."
        )


def fingerprint(config: ModelConfig, *others: Any) -> str:
    """A name for everything that decides what programs are compiled to; arguments as of ``folder_for``."""
    variables = {k: v for k, v in os.environ.items() if k.startswith(("XLA_", "JAX_"))}
    parts = {
        "config": config.to_dict(),
        "others": others,
        "versions": [jax.__version__, jaxlib.__version__, platform.python_version()],
        "machine": [platform.machine(), native.processor(), jax.config.jax_platforms],
        "variables": variables,
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for package in (jaxmoe, pallas_kernels):
        root = pathlib.Path(package.__file__).parent
        for path in sorted(p for p in root.rglob("*") if p.suffix in _SOURCES):
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:24]
