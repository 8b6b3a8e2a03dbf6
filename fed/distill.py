"""Knowledge transfer over the proxy set (spec 1.3): refining and merging outputs, reverse and forward distillation.

The paper's formulas are not public; these are the specification's reconstruction. Nothing here takes labels.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from fed.clients import OPTIMIZERS, cross_entropy, make_optimizer, update_params
from fed.models import Model, Params

MERGES = ("uniform", "size", "confidence", "entropy", "agreement", "reliability")


@dataclasses.dataclass(frozen=True)
class Merge:
    """How the outputs of an ensemble become one soft label (spec 1.3's menu).

    Attributes:
      weights: uniform; size (examples trained on); confidence (variance of the logits over classes, as Fed-ET); entropy
        (exp(-H / scale)); agreement (members that contradict the majority, weighted by size, are left out); reliability (examples of the
        class that the member itself predicts; clients must share their label counts).
      sharpen: theta of p ** (1 / theta), below 1 sharper (ERA); 1 leaves outputs as they are.
      scale: of entropy.
      space: probabilities, or logits (the product of experts; FedDF's published runs).
    """

    weights: str = "confidence"
    sharpen: float = 1.0
    scale: float = 1.0
    space: str = "probabilities"

    def __post_init__(self) -> None:
        if self.weights not in MERGES:
            raise ValueError(f"weights must be one of {', '.join(MERGES)}; got {self.weights!r}.")
        if not self.sharpen > 0 or not self.scale > 0:
            raise ValueError(
                f"sharpen and scale must be positive; got {self.sharpen} and {self.scale}."
            )
        if self.space not in ("probabilities", "logits"):
            raise ValueError(f"space must be probabilities or logits; got {self.space!r}.")
        if self.space == "logits" and self.sharpen != 1.0:
            raise ValueError(
                f"sharpen must be 1 with space='logits', where nothing is sharpened; got {self.sharpen}; take space='probabilities'."
            )


def merge(
    logits: Float[Array, "m B *S C"],
    sizes: Float[Array, " m"],
    options: Merge,
    temperature: float,
    counts: Float[Array, "m D"] | None = None,
) -> Float[Array, "B *S C"]:
    """Refines and merges members' outputs: q(x) = sum_m alpha_m(x) r_m(x).

    Args:
      logits: of each member on each example.
      sizes: examples that each member was trained on.
      options: the strategy.
      temperature: tau of the softmax that comes first.
      counts: examples per class of each member, for "reliability" (D = C there).

    Returns:
      probabilities, float32.
    """
    refined = jax.nn.softmax(logits / temperature, axis=-1)
    alpha = _weights(logits, sizes, options, counts)
    if options.space == "logits":
        return jax.nn.softmax(jnp.sum(alpha[..., None] * logits, axis=0) / temperature, axis=-1)
    if options.sharpen != 1.0:
        refined = jax.nn.softmax(jax.nn.log_softmax(logits / temperature) / options.sharpen)
    return jnp.sum(alpha[..., None] * refined, axis=0)


def _weights(
    logits: Float[Array, "m B *S C"],
    sizes: Float[Array, " m"],
    options: Merge,
    counts: Float[Array, "m D"] | None,
) -> Float[Array, "m B *S"]:
    """alpha_m(x): not negative, and 1 in sum over members."""
    shape = logits.shape[:-1]
    by_size = jnp.broadcast_to(sizes.reshape(-1, *[1] * (len(shape) - 1)), shape)
    if options.weights == "uniform":
        raw = jnp.ones(shape, jnp.float32)
    elif options.weights == "size":
        raw = by_size
    elif options.weights == "confidence":
        raw = jnp.var(logits, axis=-1)
    elif options.weights == "entropy":
        log = jax.nn.log_softmax(logits, axis=-1)
        raw = jnp.exp(jnp.sum(jnp.exp(log) * log, axis=-1) / options.scale)
    else:
        chosen = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=jnp.float32)
        if options.weights == "agreement":
            votes = jnp.sum(by_size[..., None] * chosen, axis=0)
            majority = jnp.argmax(votes, axis=-1)[None]
            raw = (jnp.argmax(logits, axis=-1) == majority).astype(jnp.float32)
        else:
            if counts is None or counts.shape[-1] != logits.shape[-1]:
                raise ValueError(
                    "weights='reliability' needs the clients' label counts, one per output; got "
                    f"{'none' if counts is None else counts.shape[-1]} for {logits.shape[-1]}; choose confidence."
                )
            raw = jnp.sum(
                chosen * counts.reshape(-1, *[1] * (len(shape) - 1), counts.shape[-1]), -1
            )
    # Where every member says zero (constant logits, a class nobody has), all count alike.
    total = jnp.sum(raw, axis=0, keepdims=True)
    return jnp.where(total > 0, raw / jnp.where(total > 0, total, 1.0), 1.0 / shape[0])


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Server-side training on proxy inputs, in either direction; the figures are our defaults, not the paper's.

    Attributes:
      steps: per round.
      batch_size: proxy examples per step.
      optimizer: of the student; its state lasts over the rounds for the large model, and begins anew for small ones.
      learning_rate: of the optimiser.
      temperature: tau.
      weight: beta, of the distilled term.
      hard: lambda_h, of cross-entropy with the teacher's choice.
      anchor: lambda_a, of the squared distance from where the phase began.
      features: gamma, of the squared distance of projected pooled features (forward only).
      consensus: delta, of the ensemble's soft label (forward only).
    """

    steps: int = 100
    batch_size: int = 64
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    temperature: float = 2.0
    weight: float = 1.0
    hard: float = 0.0
    anchor: float = 0.0
    features: float = 0.0
    consensus: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch_size < 1:
            raise ValueError(
                f"steps must not be negative and batch_size at least 1; got {self.steps} and {self.batch_size}."
            )
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer must be one of {', '.join(OPTIMIZERS)}; got {self.optimizer!r}."
            )
        for name in ("temperature", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}.")
        for name in ("weight", "hard", "anchor", "features", "consensus"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}.")


@struct.dataclass
class Lesson:
    """What a teacher says about the proxy inputs.

    Attributes:
      inputs: [M, ...].
      soft: probabilities at the distillation's temperature [M, ..., C].
      features: pooled features [M, D], or None.
      consensus: the ensemble's soft label beside the teacher's [M, ..., C], or None.
    """

    inputs: Array
    soft: Float[Array, "M *S C"]
    features: Float[Array, "M D"] | None = None
    consensus: Float[Array, "M *S C"] | None = None


def divergence(target: Float[Array, "B *S C"], logits: Float[Array, "B *S C"]) -> Float[Array, ""]:
    """KL(target || softmax(logits)), mean over examples and positions. Zeros in the target contribute zero."""
    log_q = jnp.log(jnp.where(target > 0, target, 1.0))
    each = jnp.sum(target * (log_q - jax.nn.log_softmax(logits, axis=-1)), axis=-1)
    return jnp.mean(each)


@struct.dataclass
class Student:
    """A student's trainable parameters, the optimiser's state, and the projector of its features, if any."""

    params: Params
    optimizer: Any
    projector: Float[Array, "d D"] | None = None


def begin(params: Params, options: Distillation, projector: Array | None = None) -> Student:
    """A student before its first step."""
    trained = (params, projector)
    return Student(
        params, make_optimizer(options.optimizer, options.learning_rate).init(trained), projector
    )


def orders(key: Array, examples: int, steps: int, batch_size: int) -> Int[Array, "steps B"]:
    """Batches of shuffled epochs over the proxy set, as int32 [steps, B]."""
    batch_size = min(batch_size, examples)
    per_epoch = examples // batch_size
    epochs = -(-steps // per_epoch)
    keys = jax.random.split(key, max(epochs, 1))
    drawn = [jax.random.permutation(k, examples)[: per_epoch * batch_size] for k in keys]
    return jnp.concatenate(drawn).reshape(-1, batch_size)[:steps].astype(jnp.int32)


def _loss(
    trained: tuple[Params, Any],
    part: Lesson,
    first: Params,
    base: Params,
    model: Model,
    options: Distillation,
    combine: Any,
) -> Float[Array, ""]:
    """L_rev or L_fwd on a batch of the lesson, for (params, projector); ``first``: params where the phase began."""
    params, projector = trained
    logits, features = model.forward(combine(params, base), part.inputs, None)
    tau = options.temperature
    total = options.weight * tau**2 * divergence(part.soft, logits / tau)
    if options.hard:
        chosen = jnp.argmax(part.soft, axis=-1).astype(jnp.int32)
        total += options.hard * jnp.mean(cross_entropy(logits, chosen))
    if options.consensus and part.consensus is not None:
        total += options.consensus * tau**2 * divergence(part.consensus, logits / tau)
    if options.features and part.features is not None:
        total += options.features * jnp.mean(jnp.square(features @ projector - part.features))
    if options.anchor:
        moved = jax.tree.map(lambda a, b: jnp.sum(jnp.square(a - b)), params, first)
        total += options.anchor * sum(jax.tree.leaves(moved))
    return total


@functools.partial(jax.jit, static_argnames=("model", "options", "combine"))
def distill(
    student: Student,
    base: Params,
    lesson: Lesson,
    batches: Int[Array, "steps B"],
    *,
    model: Model,
    options: Distillation,
    combine: Any,
) -> tuple[Student, Float[Array, ""]]:
    """Teaches a student, L_rev or L_fwd of spec 1.3.

    Args:
      student: where it stands.
      base: parameters that are not trained, for ``combine``.
      lesson: the teacher's answers.
      batches: rows of the lesson per step.
      model: the student's architecture.
      options: loss and optimiser.
      combine: (trained, base) -> the model's parameters; static (:mod:`fed.trainable`).

    Returns:
      (student after, mean loss over the steps).
    """
    optimizer = make_optimizer(options.optimizer, options.learning_rate)
    first = student.params

    def loss(trained: tuple[Params, Any], index: Array) -> Array:
        part = jax.tree.map(lambda x: jnp.take(x, index, axis=0), lesson)
        return _loss(trained, part, first, base, model, options, combine)

    def step(carry: Student, index: Array) -> tuple[Student, Array]:
        trained = (carry.params, carry.projector)
        value, gradient = jax.value_and_grad(loss)(trained, index)
        (params, projector), moments = update_params(optimizer, gradient, carry.optimizer, trained)
        return Student(params, moments, projector), value

    student, losses = jax.lax.scan(step, student, batches)
    return student, jnp.mean(losses) if batches.shape[0] else jnp.float32(0.0)


@functools.partial(jax.jit, static_argnames=("model", "many", "block"))
def outputs(
    params: Params, inputs: Array, *, model: Model, many: bool = False, block: int = 512
) -> tuple[Array, Array]:
    """Logits and features on many inputs, in blocks so that activations stay small.

    Args:
      params: of the model; with ``many`` stacked [m, ...].
      inputs: [M, ...].
      model: the architecture.
      many: evaluates each member: results [m, M, ...].
      block: inputs at a time.
    """
    rows = inputs.shape[0]
    block = min(block, rows)
    padded = -(-rows // block) * block
    filled = jnp.concatenate([inputs, jnp.zeros((padded - rows, *inputs.shape[1:]), inputs.dtype)])
    blocks = filled.reshape(-1, block, *inputs.shape[1:])

    def one(params: Params) -> tuple[Array, Array]:
        found = jax.lax.map(lambda x: model.forward(params, x, None), blocks)
        return jax.tree.map(lambda x: x.reshape(padded, *x.shape[2:])[:rows], found)

    return jax.lax.map(one, params) if many else one(params)
