"""Bit-width path search and low-precision accumulation: the specification's tables and properties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant import bps, laa
from quant.bps import BpsConfig
from quant.laa import LaaConfig

FROZEN = {8: 2.00, 7: 2.00, 6: 2.02, 5: 2.06, 4: 2.20, 3: 2.80}
# (reading, lambda) -> the first 24 widths, visits of 8/7/6/5/4/3 after 60 steps (specification 2.2).
TABLE = {
    ("loss_seeking", 0.1): ("876543" + "3" * 18, "1/1/1/1/1/55"),
    ("loss_seeking", 1.0): ("876543333433536873333334", "3/3/3/3/4/44"),
    ("loss_seeking", 5.0): ("876543345687345687334568", "8/8/9/9/10/16"),
    ("loss_avoiding", 0.1): ("876543876878765878768787", "23/23/9/3/1/1"),
    ("loss_avoiding", 1.0): ("876543876548765876458765", "14/14/12/11/7/2"),
    ("loss_avoiding", 5.0): ("876543876543876543876548", "11/11/11/11/9/7"),
}


def path(config, steps, losses=FROZEN):
    """The widths of so many steps with losses that never change."""
    table = jnp.asarray([losses[w] for w in config.widths], jnp.float32)

    def body(state, _):
        index = bps.choose(config, state)
        return bps.observe(config, state, index, table[index]), index

    _, indices = jax.jit(lambda s: jax.lax.scan(body, s, length=steps))(bps.init(config))
    return [config.widths[i] for i in np.asarray(indices)]


@pytest.mark.parametrize("case", TABLE)
def test_the_specifications_paths(case):
    reading, exploration = case
    widths = path(BpsConfig(reading=reading, exploration=exploration), 60)
    first, visits = TABLE[case]
    assert "".join(map(str, widths[:24])) == first
    assert "/".join(str(widths.count(w)) for w in bps.WIDTHS) == visits


def test_the_baselines_schedules():
    assert path(BpsConfig(schedule=bps.round_robin), 8) == [8, 7, 6, 5, 4, 3, 8, 7]
    drawn = path(BpsConfig(schedule=bps.uniform, seed=1), 600)
    assert all(70 < drawn.count(w) < 130 for w in bps.WIDTHS)
    assert path(BpsConfig(schedule=bps.uniform, seed=2), 600) != drawn
    assert path(BpsConfig(widths=(3,)), 5, {3: 1.0}) == [3] * 5


def test_another_score_takes_the_place_of_the_default():
    def least_visited(config, state):
        return -state.visits.astype(jnp.float32)

    assert path(BpsConfig(score=least_visited), 12) == [8, 7, 6, 5, 4, 3] * 2


def test_running_losses_begin_with_the_first_and_forget():
    config = BpsConfig(widths=(8, 3), decay=0.75)
    state = bps.observe(config, bps.init(config), 1, 4.0)
    state = bps.observe(config, state, 1, 8.0)
    assert (state.losses.tolist(), state.visits.tolist(), int(state.step)) == ([0, 5], [0, 2], 2)
    after = bps.observe(config, state, 1, jnp.nan)
    assert (after.losses.tolist(), after.visits.tolist()) == ([0, 5], [0, 3])


@jax.jit
def seventh(losses):
    """The first six choices, the state after them, and its scores and choice."""
    config = BpsConfig()

    def body(state, loss):
        index = bps.choose(config, state)
        return bps.observe(config, state, index, loss), index

    state, first = jax.lax.scan(body, bps.init(config), losses)
    return first, state, bps.upper_confidence(config, state), bps.choose(config, state)


@given(st.lists(st.floats(-100, 100, width=32), min_size=6, max_size=6))
def test_every_width_comes_first_once_whatever_the_losses(values):
    first, state, score, following = seventh(jnp.asarray(values, jnp.float32))
    assert first.tolist() == [0, 1, 2, 3, 4, 5]
    assert np.isfinite(score).all()
    best = np.flatnonzero(np.asarray(state.losses) == np.max(state.losses))
    assert int(following) == best[0]  # of equal ones the larger width


LONGEST = 20


@functools.partial(jax.jit, static_argnames="config")
def sgd(config, widths, gradients, real):
    """A scalar of 1 under SGD with learning rate 0.1, after each step that is ``real``; the last state; whether each moved it."""

    def body(carry, step):
        width, gradient, real = step
        w, state = carry
        applies, taken, after = laa.accumulate(config, state, width, gradient)
        w = jnp.where(applies & real, w - 0.1 * taken, w)
        state = jax.tree.map(lambda new, old: jnp.where(real, new, old), after, state)
        return (w, state), (w, applies & real)

    w = jnp.ones((), jnp.float32)
    (_, state), (weights, applied) = jax.lax.scan(
        body, (w, laa.init(config, w)), (widths, gradients, real)
    )
    return weights, state, applied


def run_toy(config, sequence):
    """The scalar weight after each (width, gradient), the last state, and the number of optimiser steps."""
    short = LONGEST - len(sequence)
    widths = jnp.asarray([w for w, _ in sequence] + [8] * short, jnp.int32)
    gradients = jnp.asarray([g for _, g in sequence] + [0.0] * short, jnp.float32)
    weights, state, applied = sgd(config, widths, gradients, jnp.arange(LONGEST) < len(sequence))
    return np.asarray(weights)[: len(sequence)], state, int(applied.sum())


SEQUENCE = [(8, 0.5), (3, 1), (5, -0.2), (4, 3), (7, 0.1), (3, -2), (8, 0.4), (3, 4)]


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [
        ("sum", [0.95, 0.95, 0.97, 0.57, 0.56, 0.56, 0.52, 0.32]),
        ("mean", [0.95, 0.95, 0.97, 0.77, 0.76, 0.76, 0.72, 0.62]),
    ],
)
def test_the_specifications_accumulation(reduce, expected):
    weights, state, _ = run_toy(LaaConfig(low=(4, 3), every=2, reduce=reduce), SEQUENCE)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert int(state.count) == 0 and float(state.total) == 0


paths = st.lists(st.tuples(st.integers(3, 8), st.floats(-4, 4, width=16)), min_size=1, max_size=20)


@given(paths, st.integers(1, 5), st.sampled_from(["sum", "mean"]))
def test_optimiser_steps_are_counted_as_the_specification_says(sequence, every, reduce):
    low = sum(w <= 4 for w, _ in sequence)
    _, state, steps = run_toy(LaaConfig(every=every, reduce=reduce), sequence)
    assert steps == len(sequence) - low + low // every
    assert int(state.count) == low % every


@given(paths)
def test_no_accumulation_is_plain_training(sequence):
    plain = np.cumsum([0.0] + [-0.1 * g for _, g in sequence])[1:] + 1
    high = [(max(w, 5), g) for w, g in sequence]
    for config, steps in (
        (LaaConfig(every=1, reduce="sum"), sequence),
        (LaaConfig(low=()), sequence),
        (LaaConfig(), high),
    ):
        np.testing.assert_allclose(run_toy(config, steps)[0], plain, atol=1e-5)


def test_what_is_left_at_the_end_is_dropped_or_applied():
    sequence = [(3, 1.0), (4, 3.0)]
    _, state, _ = run_toy(LaaConfig(), sequence)
    assert laa.flush(LaaConfig(), state)[0] is None
    grads, empty = laa.flush(LaaConfig(flush="apply"), state)
    assert float(grads) == 2.0 and int(empty.count) == 0 and float(empty.total) == 0
    assert laa.flush(LaaConfig(flush="apply"), empty)[0] is None


def test_settings_are_checked():
    for make in (
        lambda: BpsConfig(widths=(3, 8)),
        lambda: BpsConfig(widths=()),
        lambda: BpsConfig(widths=(9,)),
        lambda: BpsConfig(widths=(5, 5)),
        lambda: BpsConfig(reading="loss"),
        lambda: BpsConfig(exploration=float("nan")),
        lambda: BpsConfig(decay=1.0),
        lambda: LaaConfig(every=0),
        lambda: LaaConfig(reduce="max"),
        lambda: LaaConfig(flush="keep"),
    ):
        with pytest.raises(ValueError, match="must be"):
            make()
