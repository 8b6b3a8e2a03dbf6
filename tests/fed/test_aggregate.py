"""Robust aggregation: known answers, and what it withstands."""

import dataclasses

import fed_support as support
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fed
from fed.aggregate import by_name, minimum_replies

GENERATOR = np.random.default_rng(0)
HONEST = GENERATOR.normal(1.0, 0.1, (7, 3, 2)).astype(np.float32)
WRONG = np.full((2, 3, 2), -50, np.float32)
UPDATES = {"w": jnp.asarray(np.concatenate([HONEST, WRONG]))}
WEIGHTS = jnp.asarray([1.0, 2, 3, 1, 2, 3, 1, 9, 9], jnp.float32)
CLIENTS = jnp.arange(9, dtype=jnp.int32)


def combined(aggregator, updates=UPDATES, weights=WEIGHTS):
    return np.asarray(aggregator.combine(updates, weights, CLIENTS, jax.random.key(0))["w"])


def test_the_mean_is_weighted():
    expected = np.average(np.asarray(UPDATES["w"]), axis=0, weights=np.asarray(WEIGHTS))
    np.testing.assert_allclose(combined(fed.Mean()), expected, rtol=1e-5)


def test_the_median_is_numpy_s():
    np.testing.assert_allclose(combined(fed.Median()), np.median(UPDATES["w"], axis=0), rtol=1e-6)


def test_the_trimmed_mean_is_scipy_s():
    from scipy import stats

    expected = stats.trim_mean(np.asarray(UPDATES["w"]), 2 / 9, axis=0)
    np.testing.assert_allclose(combined(fed.TrimmedMean(2 / 9)), expected, rtol=1e-5)


def test_krum_picks_an_honest_update():
    found = combined(fed.Krum(malicious=2))
    assert any(np.array_equal(found, h) for h in HONEST)
    several = combined(fed.Krum(malicious=2, keep=5))
    assert abs(several - 1).max() < 0.2


@pytest.mark.parametrize("aggregator", [fed.Median(), fed.TrimmedMean(0.25), fed.Krum(2)])
def test_robust_aggregation_withstands_what_breaks_the_mean(aggregator):
    assert abs(combined(fed.Mean()) - 1).max() > 10
    assert abs(combined(aggregator) - 1).max() < 0.3


def test_poisoned_clients_break_averaging_and_not_the_median():
    cut = support.splits()
    part = support.ragged(len(cut.train), [24] * 7)
    run = fed.RunOptions(
        rounds=5,
        local=fed.LocalOptions(epochs=2, batch_size=8),
        uploads=(fed.Attack((1, 4), "sign", 10.0),),
        evaluate_every=5,
    )
    model = support.mlp()
    robust = fed.fedavg(model, cut, part, dataclasses.replace(run, aggregator=fed.Median()))
    plain = fed.fedavg(model, cut, part, run)
    assert robust.final["small_accuracy"] > 0.75
    assert plain.final["small_accuracy"] < robust.final["small_accuracy"] - 0.2


def test_krum_refuses_too_few_replies():
    with pytest.raises(ValueError, match=r"at least malicious \+ 3 = 11 replies"):
        combined(fed.Krum(8))


@pytest.mark.parametrize(
    ("name", "aggregator"),
    [
        ("mean", fed.Mean()),
        ("median", fed.Median()),
        ("trimmed:0.2", fed.TrimmedMean(0.2)),
        ("krum:2:3", fed.Krum(2, 3)),
    ],
)
def test_aggregators_have_names(name, aggregator):
    assert by_name(name) == aggregator


@pytest.mark.parametrize(
    ("aggregator", "least"), [("mean", 1), ("krum", 4), ("krum:2:6", 6), ("secure", 3)]
)
def test_aggregators_say_how_many_replies_they_need(aggregator, least):
    assert minimum_replies(by_name(aggregator)) == least


@pytest.mark.parametrize("name", ["best", "krum:a", "mean:1", "trimmed:0.5", "krum:-1", "krum:1:0"])
def test_wrong_names_are_refused(name):
    with pytest.raises(ValueError, match="aggregator|share must lie"):
        by_name(name)
