"""One tuning for every precision: each step trains one width of the same weights (OTARo, arXiv 2511.13147).

Weights stay arrays; a step sees them as SEFP has them at its width, and its gradient goes straight through (specification 2.4).
``bps`` says which width is next, ``laa`` when gradients become a step. With other settings of the same two the loop is every
baseline: one width, widths at random, or the mean loss of all widths in each step.

What is tuned is all of the weights, or something that makes them together with frozen ones (``quant.Lora``). Then a step rounds the merged
weights, since these are what one file stores, and gradients, moments and accumulation are of what is tuned only.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from pallas_kernels.sefp.format import check_rounding
from quant import bps, laa
from quant.bps import BpsConfig
from quant.fake_quant import fake_quantize
from quant.laa import LaaConfig
from quant.rules import DEFAULT_RULES, Rule

OBJECTIVES = ("single", "joint")
Loss = Callable[[Any, Any], Any]
Quantize = Callable[[Any, Any], Any]  # (params, width) -> params as they are at that width
Merge = Callable[[Any, Any], Any]  # (frozen, what is tuned) -> params


@dataclasses.dataclass(frozen=True)
class OtaroConfig:
    """A tuning run.

    Attributes:
      steps: in all; each reads one batch.
      bps: which widths, and in which order.
      laa: which widths' gradients are collected.
      objective: "single": the loss at one width per step; "joint": the mean of the losses at all widths, which costs as many
        passes (Matryoshka-style, for comparison).
      rules: which parameters are quantised, as of ``quantize_params``.
      rounding: how, as of ``sefp.encode``: "truncate" as the paper has it, or "nested".
    """

    steps: int = 1000
    bps: BpsConfig = BpsConfig()
    laa: LaaConfig = LaaConfig()
    objective: str = "single"
    rules: tuple[Rule, ...] = DEFAULT_RULES
    rounding: str = "truncate"

    def __post_init__(self):
        check_rounding(self.rounding)
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1; got {self.steps}.")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {OBJECTIVES}; got {self.objective!r}.")
        if self.objective == "joint" and self.laa.low:
            raise ValueError(
                f"a joint step has all widths, so none of them can be collected; got laa.low={self.laa.low}. Use LaaConfig(low=())."
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TuneState:
    """Everything that a run needs to go on; a pytree of arrays, for any checkpoint.

    Attributes:
      step: int32, steps taken.
      params: what is tuned: arrays, never quantised.
      opt_state: the optimiser's.
      bps, laa: what the search and the accumulation know.
    """

    step: Any
    params: Any
    opt_state: Any
    bps: Any
    laa: Any


@dataclasses.dataclass(frozen=True)
class Tuned:
    """Result of a run.

    Attributes:
      params: the tuned weights, unquantised; ``quantize_params`` makes one of all widths. With ``merge`` they must be merged first.
      state: the last one.
      history: one dict per step: "step" (from 1), "width" (0 for all), "loss", "grad_norm", "applied" (the weights moved) and
        "skipped" (loss or gradient wasn't finite, so nothing did).
    """

    params: Any
    state: TuneState
    history: list[dict[str, Any]]

    def losses(self) -> dict[int, list[float]]:
        """The training losses of each width, in the order of its steps."""
        found: dict[int, list[float]] = {}
        for record in self.history:
            found.setdefault(record["width"], []).append(record["loss"])
        return found


def init_state(
    params: Any, config: OtaroConfig, optimizer: optax.GradientTransformation
) -> TuneState:
    """The state before the first step; its parameters are a copy, since steps reuse their memory."""
    params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
    return TuneState(
        jnp.zeros((), jnp.int32),
        params,
        optimizer.init(params),
        bps.init(config.bps),
        laa.init(config.laa, params),
    )


def _settled(state: TuneState) -> TuneState:
    """The state bound to its device, as a step's results are: for arrays that may lie anywhere the step would be compiled again."""
    arrays = [x for x in jax.tree.leaves(state) if isinstance(x, jax.Array)]
    devices = set().union(*(x.devices() for x in arrays))
    return jax.device_put(state, *devices) if len(devices) == 1 else state


def _with_aux(loss: Loss, params: Any, batch: Any) -> tuple[jax.Array, Any]:
    value = loss(params, batch)
    return value if isinstance(value, tuple) else (value, None)


def _gradient(
    loss: Loss, quantize: Quantize, params: Any, width: jax.Array, batch: Any
) -> tuple[tuple[jax.Array, Any], Any]:
    """((loss, aux), gradient) at one width."""

    def at_width(params: Any) -> tuple[jax.Array, Any]:
        return _with_aux(loss, quantize(params, width), batch)

    return jax.value_and_grad(at_width, has_aux=True)(params)


def _joint_gradient(
    loss: Loss, quantize: Quantize, params: Any, widths: jax.Array, batch: Any
) -> tuple[tuple[jax.Array, Any], Any]:
    """The same of the mean over all widths, one after another; aux is the first width's."""

    def add(total: Any, width: jax.Array) -> tuple[Any, Any]:
        (value, aux), grads = _gradient(loss, quantize, params, width, batch)
        share = 1.0 / len(widths)
        return jax.tree.map(lambda a, b: a + b * share, total, (value, grads)), aux

    zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    (value, grads), auxes = lax.scan(add, zeros, widths)
    return (value, jax.tree.map(lambda x: x[0], auxes)), grads


def _apply(
    params: Any,
    opt_state: Any,
    grads: Any,
    aux: Any,
    scale: jax.Array | None,
    optimizer: optax.GradientTransformation,
    adjust: Callable[[Any, Any], Any] | None,
) -> tuple[Any, Any]:
    # optax mixes Python numbers and integers, which strict dtype promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        if scale is not None:
            updates = jax.tree.map(lambda u: (u * scale).astype(u.dtype), updates)
        params = optax.apply_updates(params, updates)
    return params if adjust is None else adjust(params, aux), opt_state


_STATIC = (
    "loss",
    "optimizer",
    "merge",
    "adjust",
    "schedule",
    "rules",
    "rounding",
    "laa_config",
    "joint",
)


# Not a closure: runs with the same loss and optimiser share the program, whatever their widths.
@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnums=(0,))
def _step(
    carry: tuple[Any, ...],
    frozen: Any,
    width: jax.Array,
    batch: Any,
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    merge: Merge | None,
    adjust: Callable[[Any, Any], Any] | None,
    schedule: Callable[[jax.Array], jax.Array] | None,
    rules: tuple[Rule, ...],
    rounding: str,
    laa_config: LaaConfig,
    joint: bool,
) -> tuple[tuple[Any, ...], dict[str, jax.Array]]:
    """One batch at ``width`` (with ``joint`` at each of [B]): (step, params, optimiser's and accumulation's state), figures."""
    step, params, opt_state, collected = carry
    of = _joint_gradient if joint else _gradient

    def quantize(tuned: Any, width: Any) -> Any:
        whole = tuned if merge is None else merge(frozen, tuned)
        return fake_quantize(whole, width, rules, rounding=rounding)

    (value, aux), grads = of(loss, quantize, params, width, batch)
    norm = optax.tree_utils.tree_norm(grads)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    applies, taken, after = laa.accumulate(laa_config, collected, width, grads)
    after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, collected)
    scale = None if schedule is None else schedule(step)
    params, opt_state = lax.cond(
        applies & finite,
        lambda p, o: _apply(p, o, taken, aux, scale, optimizer, adjust),
        lambda p, o: (p, o),
        params,
        opt_state,
    )
    figures = {"loss": value, "grad_norm": norm, "applied": applies & finite, "skipped": ~finite}
    return (step + 1, params, opt_state, after), figures


@functools.partial(jax.jit, static_argnames=("config",))
def _choose(config: BpsConfig, state: bps.BpsState) -> jax.Array:
    return bps.choose(config, state)


@functools.partial(jax.jit, static_argnames=("config",))
def _observe(
    config: BpsConfig, state: bps.BpsState, index: jax.Array, loss: jax.Array
) -> bps.BpsState:
    return bps.observe(config, state, index, loss)


def otaro_tune(
    params: Any,
    config: OtaroConfig,
    data: Callable[[int], Any],
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array] | None = None,
    adjust: Callable[[Any, Any], Any] | None = None,
    frozen: Any = None,
    merge: Merge | None = None,
    state: TuneState | None = None,
    on_step: Callable[[TuneState, dict[str, Any]], bool | None] | None = None,
) -> Tuned:
    """Tunes ``params`` for every width at once.

    The width is data: one program serves all of them. A step costs one forward and backward pass, however many widths there are.

    Args:
      params: a tree of floating arrays, of a model of any kind; with ``merge`` what is tuned in their place.
      config: the run.
      data: the batch of step 0, 1, ...: a function of the step, so that a run that goes on sees what it would have seen.
      loss: (params, batch) -> float32 scalar, or (scalar, aux).
      optimizer: of what is tuned. Its own step count counts updates, of which accumulation makes fewer than steps.
      schedule: step -> factor on the optimiser's updates: a learning rate over steps rather than updates.
      adjust: (params, aux) -> params, after an update: what moves without a gradient, such as routers' biases. Of what is tuned only:
        what is frozen stays.
      frozen: what ``merge`` takes; steps read it and have no gradient or moments of it.
      merge: (frozen, what is tuned) -> the model's parameters; hashable, static. ``Lora`` is one.
      state: of the run to go on with; ``params`` are then ignored.
      on_step: called with the state and the record of each step; may save the state before the next step reuses its memory, and ends
        the run by returning True.

    Returns:
      ``Tuned``.

    Raises:
      TypeError: if config is none.
      ValueError: for ``frozen`` without ``merge``, or the other way around.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> x = jax.random.normal(jax.random.key(0), (32, 64))
      >>> y = x @ jnp.linspace(-1.0, 1.0, 64)[:, None]
      >>> tuned = otaro_tune(
      ...     {"proj": {"weight": jnp.zeros((64, 1))}},
      ...     OtaroConfig(steps=6),
      ...     lambda step: (x, y),
      ...     loss=lambda p, xy: jnp.square(xy[0] @ p["proj"]["weight"] - xy[1]).mean(),
      ...     optimizer=optax.adam(0.1),
      ... )
      >>> [record["width"] for record in tuned.history]
      [8, 7, 6, 5, 4, 3]
    """
    if not isinstance(config, OtaroConfig):
        raise TypeError(
            f"config must be a quant.OtaroConfig; got {type(config).__name__}. The model's own belongs into loss."
        )
    if (frozen is None) != (merge is None):
        given = "merge" if frozen is None else "frozen"
        raise ValueError(
            f"frozen and merge belong together; got {given} only. Give both, or neither to tune params as they are."
        )
    state = _settled(init_state(params, config, optimizer) if state is None else state)
    joint, widths = config.objective == "joint", config.bps.widths
    options = {
        "loss": loss,
        "optimizer": optimizer,
        "merge": merge,
        "adjust": adjust,
        "schedule": schedule,
        "rules": tuple(config.rules),
        "rounding": config.rounding,
        "laa_config": dataclasses.replace(
            config.laa, flush="drop"
        ),  # what the end does is no step's matter
        "joint": joint,
    }
    history: list[dict[str, Any]] = []
    for number in range(int(state.step), config.steps):
        index = _choose(config.bps, state.bps)
        chosen = 0 if joint else widths[int(index)]
        width = jnp.asarray(widths if joint else chosen, jnp.int32)
        carry = (state.step, state.params, state.opt_state, state.laa)
        carry, figures = _step(carry, frozen, width, data(number), **options)
        step, new, opt_state, collected = carry
        search = _observe(config.bps, state.bps, index, figures["loss"])
        state = TuneState(step, new, opt_state, search, collected)
        record = {"step": number + 1, "width": chosen} | _plain(jax.device_get(figures))
        history.append(record)
        if number + 1 == config.steps:
            state = _flushed(config, state, optimizer, schedule)
        if on_step is not None and on_step(state, record):
            break
    return Tuned(state.params, state, history)


def _plain(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: value.item() for name, value in figures.items()}


def _flushed(
    config: OtaroConfig,
    state: TuneState,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array] | None,
) -> TuneState:
    """The state after what was left in the accumulation had its end."""
    grads, empty = laa.flush(config.laa, state.laa)
    params, opt_state = state.params, state.opt_state
    if grads is not None:
        scale = None if schedule is None else schedule(state.step)
        params, opt_state = _apply(params, opt_state, grads, None, scale, optimizer, None)
    return dataclasses.replace(state, params=params, opt_state=opt_state, laa=empty)


def losses_by_width(
    params: Any,
    batches: Sequence[Any],
    *,
    loss: Loss,
    widths: Sequence[int] = bps.WIDTHS,
    rules: Sequence[Rule] = DEFAULT_RULES,
    rounding: str = "truncate",
) -> dict[int, float]:
    """Mean loss over ``batches`` at each width of ``params``, merged if only a part was tuned: one program."""
    total = {}
    for width in widths:
        values = [
            float(
                _loss_at(params, jnp.asarray(width, jnp.int32), batch, loss, tuple(rules), rounding)
            )
            for batch in batches
        ]
        total[width] = sum(values) / len(values)
    return total


@functools.partial(jax.jit, static_argnames=("loss", "rules", "rounding"))
def _loss_at(
    params: Any,
    width: jax.Array,
    batch: Any,
    loss: Loss,
    rules: tuple[Rule, ...],
    rounding: str,
) -> jax.Array:
    return _with_aux(loss, fake_quantize(params, width, rules, rounding=rounding), batch)[0]
