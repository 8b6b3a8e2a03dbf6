"""Thousands of clients at once give what a plain loop over ragged clients gives, however they are grouped."""

import dataclasses
import functools
import logging
import os
import subprocess
import sys

import fed_support as support
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fed
from fed import clients, cohort, schedule
from fed.compress import Codec

SIZES = [17, 0, 3, 40, 8, 1, 25, 33, 5, 12, 2, 21]
EVERYBODY = range(len(SIZES))
DATA = support.blobs(200)
ARRAYS = (jnp.asarray(DATA.inputs), jnp.asarray(DATA.labels))
PART = support.ragged(200, SIZES)
WEIGHTS = PART.sizes.astype(np.float32)
KEY = jax.random.key(3)
# float32 sums in another order; the specification measured 1.8e-7 (SGD) and 1.8e-6 (Adam).
CLOSE = 1e-6
OPTIMIZERS = {
    "sgd": (0.1, optax.sgd(0.1)),
    "momentum": (0.05, optax.sgd(0.05, momentum=0.9)),
    "adam": (3e-3, optax.adam(3e-3)),
}


@pytest.fixture(scope="module")
def model():
    return support.mlp()


@pytest.fixture(scope="module")
def start(model):
    return model.init(jax.random.key(1))


def buckets(options, which=EVERYBODY, most=4):
    return list(
        schedule.buckets(
            PART,
            which,
            seed=0,
            round_number=0,
            epochs=options.epochs,
            batch_size=options.batch_size,
            most=most,
        )
    )


def train(model, start, options, engine=fed.EngineOptions(), which=EVERYBODY, **more):
    given = buckets(options, which, engine.buckets)
    return cohort.train_cohort(
        model, start, ARRAYS, given, KEY, options, engine, weights=WEIGHTS, **more
    )


def ragged_loop(model, start, options, optimizer):
    """Plain optax on unpadded batches, one client after the other: what everything must equal."""

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        gradient = jax.jit(jax.grad(loss))
        update = jax.jit(optimizer.update)
        total, weight = jax.tree.map(jnp.zeros_like, start), 0
        for bucket in buckets(options):
            for i, client in enumerate(bucket.clients):
                params, moments = start, optimizer.init(start)
                for index, mask in zip(bucket.index[i], bucket.mask[i], strict=True):
                    if mask.any():
                        rows = index[mask]
                        g = gradient(params, ARRAYS[0][rows], ARRAYS[1][rows])
                        step, moments = update(g, moments, params)
                        params = optax.apply_updates(params, step)
                n = SIZES[client]
                total = jax.tree.map(lambda t, p, s, n=n: t + n * (p - s), total, params, start)
                weight += n
        return jax.tree.map(lambda t: t / weight, total)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_cohort_equals_a_plain_loop_over_ragged_clients(model, start, name):
    rate, optimizer = OPTIMIZERS[name]
    options = fed.LocalOptions(epochs=2, batch_size=8, optimizer=name, learning_rate=rate)
    expected = ragged_loop(model, start, options, optimizer)
    for engine in (fed.EngineOptions(), fed.EngineOptions("sequential")):
        found = train(model, start, options, engine)
        assert support.largest_difference(found.mean, expected) < CLOSE
        assert found.steps.tolist() == [2 * -(-n // 8) for n in SIZES if n]
        assert found.examples.tolist() == [2 * n for n in SIZES if n]


def test_a_cohort_of_convolutions_equals_a_plain_loop(monkeypatch):
    images = np.random.default_rng(0).normal(size=(200, 5, 5)).astype(np.float32)
    monkeypatch.setattr(sys.modules[__name__], "ARRAYS", (jnp.asarray(images), ARRAYS[1]))
    model = fed.architectures.cnn((5, 5), (4,), int(ARRAYS[1].max()) + 1, hidden=5)
    start = model.init(jax.random.key(1))
    options = fed.LocalOptions(epochs=1, batch_size=8, learning_rate=0.1)
    expected = ragged_loop(model, start, options, optax.sgd(0.1))
    found = train(model, start, options, fed.EngineOptions(chunk=4))
    assert support.largest_difference(found.mean, expected) < CLOSE


def mutate_freeze(monkeypatch):
    monkeypatch.setattr(clients, "freeze", lambda live, new, old: new)


def mutate_mean(monkeypatch):
    monkeypatch.setattr(clients, "masked_mean", lambda values, mask: jnp.mean(values))


@pytest.mark.parametrize("mutation", [mutate_freeze, mutate_mean])
def test_the_comparison_would_notice_moving_on_padding(model, start, monkeypatch, mutation):
    rate, optimizer = OPTIMIZERS["adam"]
    options = fed.LocalOptions(epochs=2, batch_size=8, optimizer="adam", learning_rate=rate)
    expected = ragged_loop(model, start, options, optimizer)
    mutation(monkeypatch)
    # Another model object: nothing traced before the mutation is used again.
    found = train(support.mlp(), start, options, fed.EngineOptions(buckets=1))
    assert support.largest_difference(found.mean, expected) > 100 * CLOSE


def test_the_comparison_would_notice_weights_of_padded_counts(model, start):
    options = fed.LocalOptions(epochs=2, batch_size=8, optimizer="sgd", learning_rate=0.1)
    expected = ragged_loop(model, start, options, OPTIMIZERS["sgd"][1])
    given = buckets(options)
    padded = np.zeros(len(SIZES), np.float32)
    for bucket in given:
        padded[bucket.clients] = bucket.mask[0].size
    found = cohort.train_cohort(model, start, ARRAYS, given, KEY, options, weights=padded)
    assert support.largest_difference(found.mean, expected) > 100 * CLOSE


SGD = fed.LocalOptions(epochs=2, batch_size=8)


@pytest.fixture(scope="module")
def usual(model, start):
    """SGD, everybody, kept updates, one chunk."""
    return train(model, start, SGD, keep=True)


@pytest.mark.parametrize("chunk", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_the_size_of_chunks_does_not_matter(model, start, usual, chunk):
    found = train(model, start, SGD, fed.EngineOptions(chunk=chunk, buckets=2))
    assert support.largest_difference(found.mean, usual.mean) < CLOSE


@pytest.mark.parametrize("count", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_the_number_of_devices_does_not_matter(model, start, usual, count, devices):
    found = train(model, start, SGD, fed.EngineOptions(devices=count))
    assert support.largest_difference(found.mean, usual.mean) < CLOSE
    assert np.array_equal(found.clients, usual.clients)


def test_devices_meet_only_in_the_final_sum(model, start, devices):
    bucket = buckets(SGD)[0]
    rows = {
        "index": bucket.index[:4],
        "mask": bucket.mask[:4],
        "clients": bucket.clients[:4],
        "weights": np.ones(4, np.float32),
    }
    static = {"model": model, "options": SGD, "uploads": (), "largest": float("inf")}
    run = cohort._program(cohort._mesh(4), **static, personal=False, keep=False)
    zero = jax.tree.map(jnp.zeros_like, start)
    total = cohort._Sum(zero, jnp.float32(0.0))
    text = run.lower(total, start, ARRAYS, rows, KEY).compile().as_text()
    assert "all-reduce" in text
    for other in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert other not in text


def test_kept_updates_average_to_the_mean(usual):
    shares = usual.weights / usual.weights.sum()
    mean = jax.tree.map(lambda u: jnp.tensordot(shares, u, axes=1), usual.updates)
    assert support.largest_difference(mean, usual.mean) < CLOSE


def test_a_client_trains_the_same_whoever_else_does(model, start, usual):
    few = train(model, start, SGD, which=[3, 9], keep=True)
    for row, client in enumerate(few.clients):
        there = int(np.flatnonzero(usual.clients == client)[0])
        mine, theirs = (
            jax.tree.map(lambda u, i=i: u[i], c.updates) for c, i in ((few, row), (usual, there))
        )
        assert support.largest_difference(mine, theirs) < CLOSE


def test_order_of_clients_does_not_matter(model, start, usual):
    shuffled = np.random.default_rng(0).permutation(len(SIZES))
    assert support.equal(train(model, start, SGD, which=shuffled).mean, usual.mean)


@pytest.mark.parametrize("backend", ["vmap", "sequential"])
def test_dropout_draws_the_same_numbers_in_every_backend(backend, usual):
    model = _dropout_model()
    params = model.init(jax.random.key(1))
    found = train(model, params, SGD, fed.EngineOptions(backend, chunk=2))
    other = train(model, params, SGD, fed.EngineOptions(chunk=64))
    assert support.largest_difference(found.mean, other.mean) < CLOSE
    assert support.largest_difference(found.mean, usual.mean) > 1e-3  # it does draw


@functools.cache
def _dropout_model():
    return support.mlp(dropout=0.5)


@pytest.mark.parametrize("backend", ["vmap", "sequential"])
def test_a_nan_update_is_rejected_and_leaves_no_trace(model, start, backend):
    attack = (fed.Attack((3,), "nan"),)
    engine = fed.EngineOptions(backend)
    found = train(model, start, SGD, engine, uploads=attack)
    without = train(model, start, SGD, engine, which=[k for k in range(len(SIZES)) if k != 3])
    assert found.rejected == [3] and found.weights[found.clients.tolist().index(3)] == 0
    assert support.largest_difference(found.mean, without.mean) < CLOSE


@pytest.mark.parametrize("where", ["trained", "sent"])
def test_a_codec_does_not_make_an_update_of_nan(model, start, where):
    """SEFP stores NaN as 0: the client, or an attack before the codec, would be accepted with an update of zeros."""
    inputs = ARRAYS[0].at[PART[3]].set(jnp.nan) if where == "trained" else ARRAYS[0]
    attack = (fed.Attack((3,), "nan"),) if where == "sent" else ()
    options = dataclasses.replace(SGD, epochs=1)
    found = cohort.train_cohort(
        model,
        start,
        (inputs, ARRAYS[1]),
        buckets(options, which=[3, 10]),
        KEY,
        options,
        weights=WEIGHTS,
        uploads=(*attack, Codec("sefp", width=8)),
    )
    assert found.rejected == [3] and np.isnan(found.norm[0]) and found.norm[1] > 0


def test_an_update_with_too_large_a_norm_is_rejected(model, start, usual):
    limit = float(np.sort(usual.norm)[-2])
    found = train(model, start, SGD, fed.EngineOptions(largest_norm=limit))
    assert found.rejected == [int(usual.clients[usual.norm.argmax()])]


def test_personal_clients_begin_where_they_left(model, start, usual):
    rows = np.arange(len(SIZES))
    stacked = jax.tree.map(lambda p: jnp.stack([p] * len(SIZES)), start)
    found = train(model, stacked, SGD, personal=rows, keep=True)
    assert support.largest_difference(found.updates, usual.updates) < CLOSE


def test_the_proximal_term_holds_clients_back(model, start, usual):
    near = train(model, start, fed.LocalOptions(epochs=2, batch_size=8, proximal=5.0))
    assert near.norm.mean() < 0.7 * usual.norm.mean()


def test_nobody_with_data_gives_an_empty_cohort(model, start, caplog):
    with caplog.at_level(logging.WARNING):
        found = train(model, start, SGD, which=[1])
    assert found.mean is None and len(found.clients) == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"backend": "ray"}, "backend must be one of auto, vmap, sequential; got 'ray'"),
        ({"chunk": 0}, "chunk and buckets must be at least 1"),
        ({"devices": -1}, "devices must be at least 0, which is all; got -1"),
        ({"largest_norm": 0.0}, "largest_norm must be positive; got 0"),
    ],
)
def test_wrong_engines_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        fed.EngineOptions(**wrong)


def test_more_devices_than_there_are_are_refused(model, start):
    with pytest.raises(ValueError, match="devices must be at most 8, what JAX has; got 99"):
        train(model, start, SGD, fed.EngineOptions(devices=99))


def test_importing_the_package_leaves_jax_s_backends_to_the_user():
    code = "import fed, jax; jax.config.update('jax_num_cpu_devices', 2); print(len(jax.devices('cpu')))"
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True
    )
    assert result.stdout.split()[-1] == "2"


def test_a_joined_cohort_knows_what_each_client_began_with():
    figures = [np.ones(1, np.float32)] * 5
    one, two = (
        fed.Cohort(np.array([k], np.int32), np.ones(1, bool), *figures, {"w": jnp.ones(2)}, None)
        for k in (4, 2)
    )
    found = cohort.join([one, two], [0, 3])
    assert found.clients.tolist() == [2, 4] and found.ages.tolist() == [3, 0]
    assert cohort.join([one], [2]).ages.tolist() == [2]
