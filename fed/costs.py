"""What a model costs a client, from XLA's analysis of its own training step; savings are computed from the actual pair."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from fed.clients import LocalOptions, begin, local_step
from fed.models import Model


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one client and one model.

    Attributes:
      storage_bytes: parameters.
      step_flops: floating-point operations of one training step, as XLA counts them before optimisation.
      peak_bytes: arguments, results and temporaries of the compiled step: parameters, optimiser state, activations, gradients.
    """

    storage_bytes: int
    step_flops: float
    peak_bytes: int


def _lower(model: Model, options: LocalOptions) -> Any:
    """One training step of ``model``, lowered for this machine."""
    plain = dataclasses.replace(options, gradient=None)
    size = options.batch_size
    logits = model.outputs[0]
    inputs = jax.ShapeDtypeStruct((size, *model.inputs.shape), model.inputs.dtype)
    labels = jax.ShapeDtypeStruct((size, *logits.shape[:-1]), jnp.int32)
    mask = jax.ShapeDtypeStruct((size,), jnp.bool_)
    state = jax.eval_shape(lambda p: begin(p, plain), model.shapes)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def step(start: Any, state: Any, x: Any, y: Any, m: Any, key: Any) -> Any:
        return local_step(model, start, state, x, y, m, key, plain)

    given = (model.shapes, state, inputs, labels, mask, key)
    return jax.jit(step, donate_argnums=1).lower(*given)


def _flops(lowered: Any) -> float:
    analysis = lowered.cost_analysis()
    return float((analysis[0] if isinstance(analysis, list) else analysis)["flops"])


@functools.cache
def step_flops(model: Model, options: LocalOptions) -> float:
    """Floating-point operations of one training step; compiles nothing."""
    return _flops(_lower(model, options))


@functools.cache
def measure(model: Model, options: LocalOptions) -> Cost:
    """Costs of a training step of ``model``; compiles it once, runs nothing."""
    lowered = _lower(model, options)
    memory: Any = lowered.compile().memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return Cost(model.nbytes, _flops(lowered), int(peak))


def savings(small: Cost, large: Cost) -> dict[str, float]:
    """Shares that the small model saves a client against the large one, as fractions."""
    return {
        "storage": 1 - small.storage_bytes / large.storage_bytes,
        "flops": 1 - small.step_flops / large.step_flops,
        "peak_memory": 1 - small.peak_bytes / large.peak_bytes,
    }
