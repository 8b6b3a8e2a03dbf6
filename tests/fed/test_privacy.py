"""Clipping, noise and sampling do what the accountant takes for granted; the accountant knows the known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("dp_accounting")

from fed.clients import Batches, LocalOptions, local_train
from fed.models import from_functions
from fed.privacy import (
    POST_PROCESSING,
    DpSgd,
    GaussianMean,
    check_private,
    dp_options,
    epsilon,
    noise_for,
    secret_key,
    spent,
    statement,
)
from fed.rounds import RunOptions
from fed.sampling import Sampling

# The specification's table (dp-accounting 0.6.0): q, sigma, steps, delta, epsilon by RDP, by PLD.
KNOWN = (
    (0.1, 1.0, 100, 1e-5, 7.9039, 7.0466),
    (0.1, 0.7, 100, 1e-5, 16.4394, 14.5924),
    (0.01, 1.0, 1000, 1e-5, 2.1014, 1.8282),
    (1.0, 5.0, 50, 1e-5, 7.0774, 6.5730),
    (0.2, 2.0, 200, 1e-4, 7.1092, 6.4286),
)


@pytest.mark.parametrize("row", KNOWN, ids=lambda r: f"q{r[0]}-sigma{r[1]}")
def test_the_accountant_gives_the_known_epsilons(row):
    rate, noise, steps, delta, by_rdp, by_pld = row
    assert epsilon(rate, noise, steps, delta) == pytest.approx(by_rdp, abs=1e-3)
    assert epsilon(rate, noise, steps, delta, method="pld") == pytest.approx(by_pld, abs=1e-3)


def test_noise_for_a_target_gives_that_epsilon():
    noise = noise_for(4.0, 0.1, 100, 1e-5)
    assert 3.9 < epsilon(0.1, noise, 100, 1e-5) <= 4.0 + 1e-6
    assert epsilon(0.1, 0.0, 5, 1e-5) == np.inf and epsilon(0.1, 1.0, 0, 1e-5) == 0.0


def test_the_statement_names_the_unit_and_says_what_distillation_costs():
    said = statement(0.1, 1.0, 100, 1e-5, unit="user")
    assert "(7.904, 1e-05)" in said and "per user" in said and said.endswith(POST_PROCESSING)


def losses(params, x, y, key):
    """Gradients of known length: of example i it is x[i], times y[i]."""
    del key
    return (x @ params["w"]) * y.astype(jnp.float32)


PARAMS = {"w": jnp.zeros(3)}


def gradient(rule, x, y, mask, seed=0):
    return rule(
        losses, PARAMS, jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32), jnp.asarray(mask, bool),
        jax.random.key(seed),
    )[1]["w"]  # fmt: skip


def test_without_noise_the_gradient_is_the_sum_of_clipped_ones_over_the_expected_batch():
    x = np.array([[3.0, 0, 0], [0, 0.5, 0], [0, 0, 9.0], [np.nan, 1, 1]])
    got = gradient(DpSgd(clip=1.0, noise_multiplier=0.0, rate=1.0), x, [1, 1, 1, 1], [1, 1, 0, 0])
    np.testing.assert_allclose(got, np.array([1.0, 0.5, 0.0]) / 2, rtol=1e-6)
    split = DpSgd(clip=1.0, noise_multiplier=0.0, rate=1.0, microbatch=2)
    np.testing.assert_allclose(gradient(split, x, [1, 1, 1, 1], [1, 1, 0, 0]), got, rtol=1e-6)


def test_one_example_moves_the_gradient_by_no_more_than_the_clip():
    rule = DpSgd(clip=0.7, noise_multiplier=2.0, rate=1.0)
    x = np.random.default_rng(0).normal(size=(5, 3)) * 10
    full = gradient(rule, x, np.ones(5), [1, 1, 1, 1, 1])
    less = gradient(rule, x, np.ones(5), [1, 1, 1, 1, 0])
    # The same noise; the divisor is the expected batch.
    assert np.linalg.norm(np.asarray(full * 5 - less * 4)) == pytest.approx(0.7, rel=1e-4)


def test_sampling_is_poisson_and_the_divisor_does_not_follow_it():
    rule = jax.jit(
        lambda key: DpSgd(clip=1.0, noise_multiplier=0.0, rate=0.25)(
            losses, {"w": jnp.zeros(40)}, jnp.eye(40), jnp.ones(40, jnp.int32),
            jnp.arange(40) < 30, key,
        )[1]["w"]
    )  # fmt: skip
    drawn = np.stack([np.asarray(rule(jax.random.key(i))) for i in range(200)])
    taken = drawn > 0
    assert not taken[:, 30:].any()
    np.testing.assert_allclose(drawn[taken], 1 / (0.25 * 30), rtol=1e-5)
    sizes = taken.sum(1)
    # Binomial(30, 1/4): mean 7.5, variance 5.6; five standard errors over 200 draws.
    assert abs(sizes.mean() - 7.5) < 0.84 and 3.5 < sizes.var() < 8.5


def test_noise_has_the_standard_deviation_that_the_accountant_takes():
    rule = DpSgd(clip=2.0, noise_multiplier=1.5, rate=1.0)
    value = rule(
        lambda p, x, y, k: jnp.zeros(x.shape[0]) * p["w"].sum(), {"w": jnp.zeros(20_000)},
        jnp.zeros((4, 1)), jnp.zeros(4, jnp.int32), jnp.ones(4, bool), jax.random.key(3),
    )[1]["w"]  # fmt: skip
    assert np.std(np.asarray(value * 4)) == pytest.approx(3.0, rel=0.03)


def test_a_client_trains_on_all_its_examples_at_each_step():
    model = from_functions(
        lambda key: {"w": jnp.zeros((2, 3))}, lambda p, x: x @ p["w"], (2,), name="linear"
    )
    rule = DpSgd(clip=1.0, noise_multiplier=0.0, rate=1.0, microbatch=4)
    options = dp_options(rule, largest=6, steps=5)
    assert (options.epochs, options.batch_size) == (5, 8)
    index = np.tile(np.arange(8) % 6, (5, 1))
    mask = np.tile(np.arange(8) < 6, (5, 1))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)), jnp.float32)
    y = (x[:, 0] > 0).astype(jnp.int32)
    batches = Batches(x, y, jnp.asarray(index), jnp.asarray(mask))
    params, metrics = local_train(
        model, model.init(jax.random.key(0)), batches, jax.random.key(1), options
    )
    assert int(metrics["steps"]) == 5
    assert (jnp.argmax(model.apply(params, x), -1) == y).mean() >= 0.8


def test_users_are_clipped_alike_and_the_sum_is_divided_by_the_expected_cohort():
    updates = {"w": jnp.array([[3.0, 4.0], [0.3, 0.4]])}
    rule = GaussianMean(clip=1.0, noise_multiplier=0.0, expected_clients=4.0)
    got = rule.combine(updates, jnp.array([100.0, 1.0]), jnp.arange(2), jax.random.key(0))["w"]
    np.testing.assert_allclose(got, [0.9 / 4, 1.2 / 4], rtol=1e-6)
    wide = {"w": jnp.zeros((2, 20_000))}
    noisy = GaussianMean(clip=2.0, noise_multiplier=3.0, expected_clients=4.0)
    got = noisy.combine(wide, jnp.ones(2), jnp.arange(2), jax.random.key(0))["w"]
    assert np.std(np.asarray(got)) == pytest.approx(6.0 / 4, rel=0.03)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DpSgd(clip=0.0), "clip must be positive"),
        (lambda: DpSgd(rate=0.0), "rate must be"),
        (lambda: GaussianMean(expected_clients=0.0), "expected_clients"),
        (lambda: GaussianMean(individual=True), "individual"),
        (lambda: epsilon(0.1, 1.0, 10, 1.5), "delta"),
        (lambda: epsilon(0.1, 1.0, 10, 1e-5, method="x"), "method must be one of"),
    ],
)
def test_numbers_out_of_range_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


SIZES = np.array([40, 25, 0, 31])


def test_a_private_run_says_what_it_has_cost():
    local = dp_options(DpSgd(rate=0.1), largest=40, steps=10)
    users = GaussianMean(noise_multiplier=2.0, expected_clients=1.5)
    sampling = Sampling(participation=0.5, sampler="poisson")
    options = RunOptions(local=local, aggregator=users, sampling=sampling)
    check_private(options, SIZES)
    examples, clients = spent(options, 10)
    assert "(7.904, 1e-05)" in examples and "per example" in examples
    assert clients.startswith(f"({epsilon(0.5, 2.0, 10, 1e-5):.4g}, ") and "per user" in clients
    assert spent(RunOptions(), 10) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"local": LocalOptions(batch_size=39, gradient=DpSgd())}, "batch_size=39"),
        ({"local": LocalOptions(batch_size=40, steps=3, gradient=DpSgd())}, "steps=3"),
        ({"sampling": Sampling(participation=0.5)}, "sampler='uniform'"),
        ({"sampling": Sampling(sampler="poisson", buffer=2)}, "buffer=2"),
        ({"sampling": Sampling(participation=0.2, sampler="poisson")}, "clients.*, 0.6; got 3"),
    ],
)
def test_what_the_accountant_does_not_assume_is_refused(options, said):
    check_private(RunOptions(local=LocalOptions(batch_size=39)), SIZES)
    users = {} if "local" in options else {"aggregator": GaussianMean(expected_clients=3.0)}
    with pytest.raises(ValueError, match=said):
        check_private(RunOptions(**users, **options), SIZES)


def test_secret_keys_are_of_all_bits_and_never_the_same():
    words = np.array([jax.random.key_data(secret_key()) for _ in range(20)])
    assert len(np.unique(words)) == words.size  # a collision: once in 10^7 runs
    assert (words > 0).all(1).all() and float(jax.random.normal(secret_key(), ())) < 10
