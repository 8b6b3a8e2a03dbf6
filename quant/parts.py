"""A tensor in SEFP as arrays with names, and what is not in them: how files and checkpoints hold it.

A parameter PATH is ``PATH@exponent``, ``PATH@base`` and ``PATH@plane3`` to ``PATH@plane7`` (the plane that width 4 adds is plane3).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.sefp import Sefp
from pallas_kernels.sefp.format import BASE_WIDTH, GROUP, MASTER_WIDTH
from quant.tensor import Layout, SefpTensor


def parts_of(name: str, t: SefpTensor) -> dict[str, Any]:
    """A tensor's arrays, or what stands for them, by name."""
    planes = {f"{name}@plane{i}": plane for i, plane in enumerate(t.stored.planes, BASE_WIDTH)}
    return {f"{name}@exponent": t.stored.exponent, f"{name}@base": t.stored.base} | planes


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


def described(name: str, about: Mapping[str, Any], arrays: Mapping[str, Any]) -> SefpTensor:
    """The tensor that ``parts_of`` and ``describe`` took apart.

    Args:
      name: the parameter's.
      about: what ``describe`` gave.
      arrays: by name, or what has their shapes and dtypes; others may be among them.

    Raises:
      ValueError: if a part is missing, or the parts aren't of one tensor; the array is named.
    """
    planes = [f"{name}@plane{i}" for i in range(BASE_WIDTH, MASTER_WIDTH)]
    planes = planes[: max((i + 1 for i, plane in enumerate(planes) if plane in arrays), default=0)]
    try:
        stored = Sefp(
            arrays[f"{name}@exponent"],
            arrays[f"{name}@base"],
            tuple(arrays[plane] for plane in planes),
            about["inner"],
        )
        t = SefpTensor(
            stored,
            tuple(about["inputs"]),
            tuple(about["outputs"]),
            Layout(**about["layout"]),
            np.dtype(jnp.dtype(about["dtype"])),
            about["pinned"],
        )
    except KeyError as error:
        raise ValueError(f"{name}: {error.args[0]} is missing.") from None
    except TypeError as error:
        raise ValueError(f"{name}: its description is of another form ({error}).") from None
    _check(name, t)
    return t


def _check(name: str, t: SefpTensor) -> None:
    """Raises ValueError unless sizes agree: kernels count on it, and read beyond the end of what is too small."""
    groups = t.stored.exponent.shape
    if len(groups) < 2:
        raise ValueError(f"{name}@exponent must be [..., groups, outputs]; it has shape {groups}.")
    for part, array in parts_of(name, t).items():
        dtype, tail = np.uint16, (4,)
        if part.endswith("@exponent"):
            dtype, tail = np.int8, ()
        elif part.endswith("@base"):
            dtype, tail = np.uint32, (8,)
        if tuple(array.shape) != (*groups, *tail) or array.dtype != dtype:
            raise ValueError(
                f"{part} must be {np.dtype(dtype)} {[*groups, *tail]}; it is {array.dtype} {list(array.shape)}."
            )
    inner, columns = math.prod(t.inputs), math.prod(t.outputs)
    if (t.layout.inputs, t.layout.outputs) != (len(t.inputs), len(t.outputs)):
        raise ValueError(f"{name}: {t.layout} doesn't fit inputs {t.inputs}, outputs {t.outputs}.")
    if t.stored.inner != inner or tuple(groups[-2:]) != (-(-inner // GROUP), columns):
        raise ValueError(
            f"{name}@exponent must have {-(-inner // GROUP)} groups of {columns} outputs, for inputs {t.inputs} and outputs "
            f"{t.outputs}; it has shape {list(groups)}, for {t.stored.inner} inputs."
        )
