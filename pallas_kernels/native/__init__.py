"""Optional CPU kernels in C++, for what XLA:CPU cannot express: reading weights and cache rows where they lie.

Compiled with the system's C++ compiler on first use (about four seconds, then cached per user), and called
through XLA's foreign function interface on XLA's own threads. Without a compiler every backend that needs
them refuses, and the XLA backends take over: slower, same results up to rounding.
"""

import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib

from pallas_kernels import cache_rows

_HERE = pathlib.Path(__file__).parent
_SYMBOLS = (
    "jaxmoe_grouped_matmul",
    "jaxmoe_grouped_outer",
    "jaxmoe_index_topk",
    "jaxmoe_norm",
    "jaxmoe_sefp_matmul",
    "jaxmoe_sigmoid",
    "jaxmoe_sparse_mla",
)
# Not -ffast-math: linked into a library it would switch off subnormal numbers for the whole process.
_FLAGS = (
    "-w -std=c++17 -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math "
    "-fopenmp-simd -shared -fPIC"
).split()

logger = logging.getLogger(__name__)


def processor() -> str:
    """What -march=native depends on: a home directory may be shared by different machines."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _cache_directory() -> pathlib.Path:
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "jaxmoe" / "native"


def _library_path(compiler: list[str]) -> pathlib.Path:
    """Named after everything that the binary depends on."""
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, check=True, timeout=30, text=True
    )
    digest = hashlib.sha256()
    for part in (version.stdout, platform.machine(), processor(), jaxlib.__version__, *_FLAGS):
        digest.update(part.encode())
    for source in sorted((*_HERE.glob("*.cc"), *_HERE.glob("*.h"))):
        digest.update(source.read_bytes())
    return _cache_directory() / f"{digest.hexdigest()[:24]}.so"


def _compile(compiler: list[str], path: pathlib.Path) -> None:
    logger.info("compiling CPU kernels path=%s", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        output = pathlib.Path(directory) / path.name
        source = [f"-I{jax.ffi.include_dir()}", str(_HERE / "all.cc"), "-o", str(output)]
        run = functools.partial(subprocess.run, capture_output=True, timeout=300, text=True)
        # Some compilers do not know the flag: slower code then.
        if run([*compiler, *_FLAGS, "-march=native", *source]).returncode:
            run([*compiler, *_FLAGS, *source], check=True)
        output.replace(path)  # atomic: another process may be doing the same


def _built(compiler: list[str]) -> pathlib.Path:
    """The library, compiled unless it is there already."""
    path = _library_path(compiler)
    if not path.exists():
        _compile(compiler, path)
    return path


def _register() -> str | None:
    """Compiles and registers the kernels; returns why that is impossible, or None."""
    found = (shutil.which(name) for name in ("c++", "g++", "clang++"))
    compiler = shlex.split(os.environ.get("CXX", "")) or [path for path in found if path][:1]
    if not compiler:
        logger.warning("no C++ compiler found, decoding on CPU is slower; install one, or set CXX")
        return "no C++ compiler found (c++, g++, clang++, or the one that CXX names)"
    try:
        library = ctypes.CDLL(str(_built(compiler)))
        for symbol in _SYMBOLS:
            target = jax.ffi.pycapsule(getattr(library, symbol))
            jax.ffi.register_ffi_target(symbol, target, platform="cpu")
    # RuntimeError: no home directory; or XLA refused the registration.
    except (OSError, AttributeError, RuntimeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None)
        lines = (said if isinstance(said, str) and said else str(error)).splitlines()
        reason = next((line for line in lines if "error" in line), str(error))
        logger.warning("CPU kernels unavailable, using slower ones reason=%r", reason)
        return f"the C++ kernels could not be built: {reason}"
    return None


_lock = threading.Lock()
_outcome: list[str | None] = []


def _refusal() -> str | None:
    """Why the kernels cannot be used here, or None once they are registered; asked once per process."""
    with _lock:
        if not _outcome:
            _outcome.append(_register())
        return _outcome[0]


def available() -> bool:
    """Whether the kernels can be used here; builds them if need be."""
    return jax.default_backend() == "cpu" and _refusal() is None


def require(*operands: jax.Array, stored: Sequence[jax.Array] = ()) -> None:
    """Refuses unless the kernels can take float32 ``operands`` and ``stored`` cache rows here.

    Raises:
      NotImplementedError: with the reason.
    """
    if jax.default_backend() != "cpu":
        raise NotImplementedError(f"the C++ kernels run on CPU, not {jax.default_backend()}")
    wrong = [str(x.dtype) for x in operands if x.dtype != jnp.float32]
    if wrong:
        raise NotImplementedError(f"the C++ kernels take float32; got {wrong[0]}")
    wrong = [str(x.dtype) for x in stored if x.dtype not in cache_rows.FORMATS.values()]
    if wrong:
        raise NotImplementedError(
            f"the C++ kernels read rows in {', '.join(cache_rows.FORMATS)}; got {wrong[0]}"
        )
    if (reason := _refusal()) is not None:
        raise NotImplementedError(reason)


def call(symbol: str, result: Any, *operands: Any, **attributes: Any) -> Any:
    """Calls a kernel; ``require`` comes first.

    Args:
      symbol: one of the library's.
      result: ``ShapeDtypeStruct`` or a tuple of them.
      *operands: arrays in the kernel's order.
      **attributes: its attributes.

    Returns:
      Arrays as ``result`` describes them.
    """
    return jax.ffi.ffi_call(symbol, result, vmap_method="sequential")(*operands, **attributes)
