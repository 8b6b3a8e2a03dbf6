"""Where Pallas kernels run: compiled on their device, interpreted elsewhere. The one place that knows JAX's versions of it.

Kernels for Hopper are written in Mosaic GPU, those for TPU with ``pallas_call``. On another platform a kernel that is asked for
by name runs in JAX's simulator of its device, which checks reads past the end and races, slowly; ``None`` never chooses it there.
"""

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

try:
    from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
except ImportError:  # jax < 0.11
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

WARPGROUP = plgpu.LoweringSemantics.Warpgroup
# Of 16-bit operands of wgmma in shared memory: lines of 64 numbers, 128 bytes.
SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
SHARED_MEMORY = 227 * 1024  # bytes that a block of threads can have on Hopper


def interpret_gpu() -> Any:
    """``interpret=`` of a Mosaic GPU kernel.

    Raises:
      NotImplementedError: on a GPU that is not a Hopper, and on TPU.
    """
    match jax.default_backend():
        case "cpu":
            return InterpretGPUParams()
        case "gpu" if _capability().startswith("9."):
            return None
        case "gpu":
            raise NotImplementedError(
                f"the kernel is written for compute capability 9.0 (Hopper); this GPU has {_capability()}"
            )
        case platform:
            raise NotImplementedError(f"the kernel is written for Hopper GPUs; this is {platform}")


def interpret_tpu() -> Any:
    """``interpret=`` of a TPU kernel.

    Raises:
      NotImplementedError: on GPU.
    """
    match jax.default_backend():
        case "cpu":
            return pltpu.InterpretParams()
        case "tpu":
            return False
        case platform:
            raise NotImplementedError(f"the kernel is written for TPU; this is {platform}")


def multiprocessors() -> int:
    """Of the GPU; a small number under the simulator, which runs one thread for each."""
    return jax.devices()[0].core_count if jax.default_backend() == "gpu" else 2


def _capability() -> str:
    return str(getattr(jax.devices()[0], "compute_capability", "unknown"))
