"""The tuner on a small regression: widths as data, accumulation, resuming, and that it does what it is for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import quant
from quant import BpsConfig, LaaConfig, OtaroConfig, bps, otaro, otaro_tune

KEYS = jax.random.split(jax.random.key(0), 3)
X = jax.random.normal(KEYS[0], (64, 64))
W = jax.random.normal(KEYS[1], (64, 8)) * 0.1
PARAMS = {"proj": {"weight": W + 0.02 * jax.random.normal(KEYS[2], W.shape)}}
OPTIMIZER = optax.adam(3e-3)
EVERY = LaaConfig(every=2)  # one for all: it is part of the program


def loss(params, batch):
    x, y = batch
    return jnp.square(x @ params["proj"]["weight"] - y).mean()


def data(step):
    x = jnp.roll(X, step, 0)[:32]
    return x, x @ W


def tune(config, **options):
    return otaro_tune(PARAMS, config, data, loss=loss, optimizer=OPTIMIZER, **options)


def fixed(width, steps=60):
    return OtaroConfig(steps, BpsConfig(widths=(width,)), LaaConfig(low=()))


def test_one_program_serves_every_width_and_weights_move_when_they_should():
    otaro._step.clear_cache()
    config = OtaroConfig(steps=40, laa=EVERY)
    states = []
    tuned = tune(config, on_step=lambda s, r: states.append(np.asarray(s.params["proj"]["weight"])))
    assert otaro._step._cache_size() == 1
    widths = [r["width"] for r in tuned.history]
    assert widths[:6] == [8, 7, 6, 5, 4, 3] and set(widths) == set(bps.WIDTHS)
    low, before = 0, np.asarray(PARAMS["proj"]["weight"])
    for record, after in zip(tuned.history, states, strict=True):
        low += record["width"] <= 4
        moves = record["width"] > 4 or low % 2 == 0
        assert record["applied"] == moves == bool((after != before).any())
        before = after
    applied = sum(r["applied"] for r in tuned.history)
    assert int(tuned.state.opt_state[0].count) == applied < 40
    assert sorted(map(len, tuned.losses().values())) == sorted(map(widths.count, set(widths)))


def test_a_run_that_goes_on_equals_one_that_was_never_interrupted():
    config = OtaroConfig(steps=30, laa=EVERY)
    whole = tune(config)
    saved = []

    def stop(state, record):
        saved.append(jax.tree.map(np.asarray, state))
        return record["step"] == 17

    first = tune(config, on_step=stop)
    assert len(first.history) == 17
    rest = tune(config, state=jax.tree.map(jnp.asarray, saved[-1]))
    assert first.history + rest.history == whole.history
    jax.tree.map(np.testing.assert_array_equal, rest.state, whole.state)


@pytest.mark.slow
def test_tuning_at_every_width_beats_tuning_at_the_highest_where_bits_are_few():
    batches = [data(0), data(31)]
    score = lambda tuned: otaro.losses_by_width(tuned.params, batches, loss=loss)  # noqa: E731
    highest, lowest = score(tune(fixed(8))), score(tune(fixed(3)))
    joint = score(tune(joint_config()))
    search = score(tune(OtaroConfig(60, BpsConfig(exploration=5.0), EVERY)))
    for other in (joint, search, lowest):
        assert other[3] < 0.9 * highest[3]
    for other in (joint, search):
        assert other[8] < 0.2 * lowest[8] and sum(other.values()) < sum(lowest.values())


def joint_config(steps=60):
    return OtaroConfig(steps, laa=LaaConfig(low=()), objective="joint")


def test_the_joint_gradient_is_the_mean_of_the_widths():
    widths = jnp.asarray(bps.WIDTHS, jnp.int32)
    (value, _), grads = otaro._joint_gradient(loss, quant.fake_quantize, PARAMS, widths, data(0))
    each = [
        jax.value_and_grad(lambda p, w=w: loss(quant.fake_quantize(p, w), data(0)))(PARAMS)
        for w in bps.WIDTHS
    ]
    np.testing.assert_allclose(value, np.mean([v for v, _ in each]), rtol=1e-5)
    mean = np.mean([g["proj"]["weight"] for _, g in each], axis=0)
    np.testing.assert_allclose(grads["proj"]["weight"], mean, rtol=1e-4, atol=1e-7)
    assert [r["width"] for r in tune(joint_config(2)).history] == [0, 0]


def test_a_step_that_is_not_finite_moves_nothing_and_is_reported():
    def bad_data(step):
        x, y = data(step)
        return (x * jnp.nan if step in (2, 5) else x), y

    config = OtaroConfig(steps=8, laa=EVERY)
    tuned = otaro_tune(PARAMS, config, bad_data, loss=loss, optimizer=OPTIMIZER)
    assert [r["step"] for r in tuned.history if r["skipped"]] == [3, 6]
    assert np.isfinite(tuned.params["proj"]["weight"]).all()
    low = sum(r["width"] <= 4 and not r["skipped"] for r in tuned.history)
    assert int(tuned.state.laa.count) == low % 2


def test_the_schedule_is_over_steps_and_adjust_sees_aux():
    def with_aux(params, batch):
        return loss(params, batch), jnp.float32(0.5)

    params = {**PARAMS, "bias": jnp.zeros(())}
    tuned = otaro_tune(
        params,
        OtaroConfig(steps=4),
        data,
        loss=with_aux,
        optimizer=optax.sgd(1.0),
        schedule=lambda step: jnp.where(step < 2, 0.0, 1.0),
        adjust=lambda p, aux: {**p, "bias": p["bias"] + aux},
        on_step=lambda s, r: moved.append(bool((s.params["proj"]["weight"] != W0).any())),
    )
    assert moved == [False, False, True, True] and float(tuned.params["bias"]) == 2.0


moved: list[bool] = []
W0 = np.asarray(PARAMS["proj"]["weight"])


def test_the_caller_keeps_the_parameters_and_may_apply_what_is_left():
    left = OtaroConfig(steps=5, laa=dataclasses.replace(EVERY, flush="apply"))  # 8 7 6 5 4
    tuned, dropped = tune(left), tune(OtaroConfig(steps=5, laa=EVERY))
    np.testing.assert_array_equal(PARAMS["proj"]["weight"], W0)
    assert int(tuned.state.laa.count) == int(dropped.state.laa.count) == 0
    assert (tuned.params["proj"]["weight"] != dropped.params["proj"]["weight"]).any()


@pytest.mark.misuse
def test_settings_are_checked():
    with pytest.raises(TypeError, match="quant.OtaroConfig"):
        otaro_tune(PARAMS, {"steps": 3}, data, loss=loss, optimizer=OPTIMIZER)
    for options in ({"steps": 0}, {"objective": "both"}, {"objective": "joint"}):
        with pytest.raises(ValueError):
            OtaroConfig(**options)
