"""Differential privacy for clients: DP-SGD on their examples, or clipped and noised updates; and what either has cost.

Two units of privacy. Examples: each client trains by DP-SGD (``DpSgd`` as ``LocalOptions.gradient``; Abadi et al. 2016), so that what it uploads, and
so everything after, says little about any one of its examples, whoever runs the server. Users: the server clips each update, adds noise to
the sum and divides by the *expected* number of clients (``GaussianMean`` as aggregator; McMahan et al. 2018), so that the
model says little about whether a client took part; the server itself is trusted.

The accountant takes Poisson sampling (of clients: ``Sampling(sampler="poisson")``): each example, or client, takes part in a step with the same probability, independently of the others. A
batch of fixed size is not that, and its epsilon is another. Numbers of examples per client are taken as public: the weights of the mean
need them.

A simulation draws samples and noise from the run's seed, so that it can be repeated; who knows the seed can take the noise off again. A
deployment draws them from ``secret_key`` (``fed.flower``). ``check_private`` says where a run's options are not what the accountant
assumes, ``spent`` what a run has cost.

Distillation on the server's public proxy set, in either direction, is post-processing of what has been paid for: it costs no epsilon.
"""

import contextlib
import dataclasses
import logging
import secrets
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from fed.clients import ExampleLosses, LocalOptions, masked_mean
from fed.errors import need
from fed.models import Params
from fed.rounds import RunOptions

METHODS = ("rdp", "pld")
POST_PROCESSING = (
    "distillation on the public proxy set is post-processing and costs no further epsilon"
)


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive; got {value}.")


def secret_key() -> Array:
    """A key from the system's randomness, for noise that nobody else may know: all of its bits, where ``jax.random.key`` takes 32 of a seed."""
    shape = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
    words = [secrets.randbits(32) for _ in range(int(np.prod(shape)))]
    return jax.random.wrap_key_data(np.array(words, np.uint32).reshape(shape))


def _check_rate(rate: float) -> None:
    if not 0 < rate <= 1:
        raise ValueError(
            f"rate must be above 0 and at most 1, the probability of taking part in a step; got {rate}."
        )


# -- examples --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DpSgd:
    """A ``GradientRule``: Poisson-sampled, per-example clipped, noised gradient, divided by the expected batch.

    The batch that it is given must be all of the client's examples, once each (``dp_options`` sees to it): the sample is drawn here, from the
    step's key.

    Attributes:
      clip: L2 norm that no example's gradient exceeds.
      noise_multiplier: standard deviation of the noise in units of ``clip``.
      rate: probability of each example to be in a step.
      microbatch: examples whose gradients exist at once; bounds memory, changes nothing else. It must divide the batch.
      private: says to a deployment that sample and noise, and the client's loss, are to stay with the client.

    Raises:
      ValueError: for numbers out of range.
    """

    private: ClassVar[bool] = True
    clip: float = 1.0
    noise_multiplier: float = 1.0
    rate: float = 0.1
    microbatch: int | None = None

    def __post_init__(self):
        _positive(clip=self.clip)
        _check_rate(self.rate)
        if self.noise_multiplier < 0 or (self.microbatch is not None and self.microbatch < 1):
            raise ValueError(
                f"noise_multiplier must be at least 0 and microbatch at least 1; got {self.noise_multiplier} and {self.microbatch}."
            )

    def __call__(
        self,
        losses: ExampleLosses,
        params: Params,
        inputs: Array,
        labels: Array,
        mask: Bool[Array, " B"],
        key: Array,
    ) -> tuple[Float[Array, ""], Params]:
        """(mean loss of the sampled examples, gradient).

        The loss is for the client's own eyes: it isn't noised, so it must not be sent. A simulation reports it; a deployment leaves it out.

        Raises:
          ValueError: if ``microbatch`` doesn't divide the batch.
        """
        draw, model, noise = (jax.random.fold_in(key, i) for i in range(3))
        chosen = mask & jax.random.bernoulli(draw, self.rate, mask.shape)
        size = mask.shape[0]
        step = size if self.microbatch is None else min(self.microbatch, size)
        if size % step:
            raise ValueError(
                f"microbatch must divide the batch of {size}; got {step}. Choose a divisor."
            )

        def loss(p: Params, x: Array, y: Array) -> Array:
            return losses(p, x[None], y[None], model)[0]

        def clipped_sum(rows: tuple[Array, Array, Array]) -> tuple[Array, Params]:
            x, y, live = rows
            values, grads = jax.vmap(jax.value_and_grad(loss), (None, 0, 0))(params, x, y)
            # A padded row may give NaN, and 0 * NaN is NaN: select before anything is multiplied.
            grads = jax.tree.map(
                lambda g: jnp.where(live.reshape(-1, *[1] * (g.ndim - 1)), g, 0.0), grads
            )
            clipped = jax.vmap(lambda g: clip_update(g, self.clip))(grads)
            return values, jax.tree.map(lambda g: g.sum(0), clipped)

        rows = jax.tree.map(
            lambda a: a.reshape(size // step, step, *a.shape[1:]), (inputs, labels, chosen)
        )
        values, sums = jax.lax.map(clipped_sum, rows)
        total = jax.tree.map(lambda g: g.sum(0), sums)
        noised = _add_noise(total, self.clip * self.noise_multiplier, noise)
        expected = jnp.maximum(self.rate * mask.sum().astype(jnp.float32), 1e-6)
        return masked_mean(values.reshape(-1), chosen), jax.tree.map(lambda g: g / expected, noised)


def dp_options(
    rule: DpSgd, largest: int, steps: int, *, optimizer: str = "sgd", learning_rate: float = 0.1
) -> LocalOptions:
    """Local training under which ``rule`` is DP-SGD as the accountant understands it.

    Every step sees all of a client's examples and samples from them. (An epoch of one batch that holds all.)

    Args:
      rule: clipping, noise and rate.
      largest: examples of the largest client.
      steps: per round.
      optimizer: see ``LocalOptions``.
      learning_rate: of the optimiser.

    Raises:
      ValueError: for numbers that ``LocalOptions`` refuses.

    Example:
      >>> options = dp_options(DpSgd(rate=0.1, noise_multiplier=1.0), largest=40, steps=10)
      >>> options.batch_size, options.epochs, round(epsilon(0.1, 1.0, 10 * 10, 1e-5), 3)
      (40, 10, 7.904)
    """
    step = 1 if rule.microbatch is None else min(rule.microbatch, largest)
    return LocalOptions(
        epochs=steps,
        batch_size=-(-largest // step) * step,
        optimizer=optimizer,
        learning_rate=learning_rate,
        gradient=rule,
    )


# -- users -----------------------------------------------------------------------------------------


def clip_update(update: Params, clip: float) -> Params:
    """``update`` scaled down to L2 norm ``clip`` if it is longer; pure."""
    norm = optax.tree.norm(update)
    factor = jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda u: u * factor.astype(u.dtype), update)


@dataclasses.dataclass(frozen=True)
class GaussianMean:
    """An ``Aggregator``: the sum of clipped updates plus noise, over the expected number of clients. Weights are not used: every user counts alike.

    Attributes:
      clip: L2 norm that no user's update exceeds.
      noise_multiplier: standard deviation of the noise of the sum in units of ``clip``.
      expected_clients: participation times population, never the number that came.
      individual: False: what looks at single updates would not be covered, so koala refuses to combine the two.

    Raises:
      ValueError: for numbers out of range.
    """

    clip: float = 1.0
    noise_multiplier: float = 1.0
    expected_clients: float = 10.0
    individual: bool = False

    def __post_init__(self):
        _positive(clip=self.clip, expected_clients=self.expected_clients)
        if self.noise_multiplier < 0 or self.individual:
            raise ValueError(
                f"noise_multiplier must be at least 0, and individual False; got {self.noise_multiplier} and {self.individual}."
            )

    def combine(
        self, updates: Params, weights: Float[Array, " K"], clients: Int[Array, " K"], key: Array
    ) -> Params:
        """The noised mean update."""
        clipped = jax.vmap(lambda u: clip_update(u, self.clip))(updates)
        total = jax.tree.map(lambda u: u.sum(0), clipped)
        noised = _add_noise(total, self.clip * self.noise_multiplier, key)
        return jax.tree.map(lambda u: u / self.expected_clients, noised)


def _add_noise(tree: Params, deviation: float, key: Array) -> Params:
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    noisy = [
        x + deviation * jax.random.normal(k, x.shape, x.dtype)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, noisy)


# -- accounting ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the accountant's lines on orders that it leaves out; the epsilon is over those that it keeps, and stays a bound."""

    def tells(record: logging.LogRecord) -> bool:
        return "failed to converge" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(tells)
    try:
        yield
    finally:
        logger.removeFilter(tells)


def _event(rate: float, noise_multiplier: float) -> Any:
    accounting = need("dp_accounting", "fed")
    event = accounting.GaussianDpEvent(noise_multiplier)
    return event if rate == 1 else accounting.PoissonSampledDpEvent(rate, event)


def _accountant(method: str) -> Any:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}.")
    if method == "rdp":
        return need("dp_accounting.rdp", "fed").RdpAccountant()
    return need("dp_accounting.pld", "fed").PLDAccountant()


def epsilon(
    rate: float, noise_multiplier: float, steps: int, delta: float, *, method: str = "rdp"
) -> float:
    """Epsilon of ``steps`` Poisson-subsampled Gaussian mechanisms, one after another, by ``dp_accounting``.

    Args:
      rate: probability of each example (or client) to take part in a step; 1: everybody always does.
      noise_multiplier: noise in units of the clipping norm; 0 gives infinity.
      steps: how many, over all rounds.
      delta: of (epsilon, delta); below one over the number of examples (or clients).
      method: "rdp" (fast, an upper bound) or "pld" (tighter: privacy loss distributions).

    Raises:
      ValueError: for numbers out of range.

    Example:
      >>> round(epsilon(0.01, 1.0, 1000, 1e-5), 4)
      2.1014
    """
    _check_rate(rate)
    if noise_multiplier < 0 or steps < 0 or not 0 < delta < 1:
        raise ValueError(
            f"noise_multiplier and steps must be at least 0, and delta between 0 and 1; got {noise_multiplier}, {steps} and {delta}."
        )
    if noise_multiplier == 0 or steps == 0:
        return 0.0 if steps == 0 else float("inf")
    accountant = _accountant(method)
    with _quiet():
        accountant.compose(_event(rate, noise_multiplier), steps)
        return float(accountant.get_epsilon(delta))


def noise_for(
    target: float, rate: float, steps: int, delta: float, *, method: str = "rdp"
) -> float:
    """The least noise multiplier with which ``epsilon`` is at most ``target``, to 1e-3.

    Args:
      target: epsilon, positive.
      rate: as of ``epsilon``.
      steps: how many, over all rounds.
      delta: as of ``epsilon``.
      method: as of ``epsilon``.

    Raises:
      ValueError: for numbers out of range.

    Example:
      >>> abs(noise_for(7.9039, 0.1, 100, 1e-5) - 1.0) < 2e-3
      True
    """
    _positive(target=target, steps=steps)
    _check_rate(rate)
    accounting = need("dp_accounting", "fed")

    def event(noise: float) -> Any:
        return accounting.SelfComposedDpEvent(_event(rate, noise), steps)

    with _quiet():
        calibrate = accounting.calibrate_dp_mechanism
        return float(calibrate(lambda: _accountant(method), event, target, delta, tol=1e-3))


def statement(
    rate: float, noise_multiplier: float, steps: int, delta: float, *, unit: str = "example"
) -> str:
    """One line for reports: what a run has cost, and per what.

    Args:
      rate: as of ``epsilon``.
      noise_multiplier: as of ``epsilon``.
      steps: over all rounds.
      delta: as of ``epsilon``.
      unit: "example" or "user".

    Raises:
      ValueError: for numbers out of range.
    """
    spent = epsilon(rate, noise_multiplier, steps, delta)
    return (
        f"({spent:.4g}, {delta:g})-differential privacy per {unit} (RDP; {steps} steps, rate {rate:g}, noise {noise_multiplier:g}); "
        f"{POST_PROCESSING}"
    )


# -- a run -------------------------------------------------------------------------------------------


def check_private(
    options: RunOptions,
    sizes: Int[np.ndarray, " N"],
    assignment: Int[np.ndarray, " N"] | None = None,
) -> None:
    """Refuses private runs whose sampling isn't what the accountant assumes; says nothing of others.

    Args:
      options: of the run.
      sizes: examples of each client.
      assignment: architecture of each client; default: one for all.

    Raises:
      ValueError: for ``DpSgd`` on batches that aren't all of a client's examples, once each; for ``GaussianMean`` with other than Poisson
        sampling of clients, or another expected number than the sampler's.
    """
    local, rule, sampling = options.local, options.aggregator, options.sampling
    if isinstance(local.gradient, DpSgd) and (
        local.steps is not None or local.batch_size < sizes.max()
    ):
        raise ValueError(
            f"DpSgd needs each step to see all of a client's examples once, {sizes.max()} at most; got batch_size={local.batch_size} and "
            f"steps={local.steps}. Make LocalOptions with fed.privacy.dp_options."
        )
    if not isinstance(rule, GaussianMean):
        return
    if sampling.buffer or (sampling.sampler != "poisson" and sampling.participation < 1):
        raise ValueError(
            f"a private mean needs Poisson sampling of clients in rounds; got sampler={sampling.sampler!r} with buffer={sampling.buffer}. "
            "Take sampler='poisson'."
        )
    groups = np.zeros(len(sizes), np.int64) if assignment is None else np.asarray(assignment)
    for group in np.unique(groups[sizes > 0]):
        wanted = sampling.participation * int(((groups == group) & (sizes > 0)).sum())
        if abs(rule.expected_clients - wanted) > 0.01 * wanted:
            raise ValueError(
                f"expected_clients must be participation times the clients of an architecture, {wanted:g}; got "
                f"{rule.expected_clients:g}. Set either."
            )


def spent(options: RunOptions, rounds: int, delta: float = 1e-5) -> list[str]:
    """``statement`` of each private rule of a run; empty for a run without one.

    Args:
      options: of the run, as ``check_private`` accepts them.
      rounds: that were run; a client is taken to have been in each.
      delta: of (epsilon, delta); below one over a client's examples, and over the number of clients.

    Raises:
      ValueError: for numbers out of range.

    Example:
      >>> private = RunOptions(local=dp_options(DpSgd(rate=0.1), largest=40, steps=10))
      >>> [line[:13] for line in spent(private, 10)], spent(RunOptions(), 10)
      (['(7.904, 1e-05'], [])
    """
    lines = []
    rule, users = options.local.gradient, options.aggregator
    if isinstance(rule, DpSgd):
        steps = rounds * (options.local.steps or options.local.epochs)
        lines.append(statement(rule.rate, rule.noise_multiplier, steps, delta))
    if isinstance(users, GaussianMean):
        rate = options.sampling.participation
        lines.append(statement(rate, users.noise_multiplier, rounds, delta, unit="user"))
    return lines
