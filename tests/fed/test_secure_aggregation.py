"""Secure aggregation: exact sums, recovery of dropped clients, what nobody may learn, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("cryptography")
pytest.importorskip("Crypto")

from fed.aggregate import Mean, by_name
from fed.secure_aggregation import (
    QuorumNotMet,
    SecureClient,
    SecureConfig,
    quantize,
    secure_mean,
    unmask,
)

CLIENTS = (3, 5, 8, 13, 21)
WEIGHTS = dict(zip(CLIENTS, (10, 0, 7, 1000, 250), strict=True))


@pytest.fixture
def trees(rng):
    """Updates of five clients whose numbers aren't consecutive; some values are beyond the clip range."""
    return {
        k: {
            "w": jnp.asarray(rng.standard_normal((6, 5)) * 6, jnp.float32),
            "b": jnp.asarray(rng.standard_normal(3), jnp.float32),
        }
        for k in CLIENTS
    }


def flat(tree):
    return np.concatenate([np.asarray(tree[k], np.float64).reshape(-1) for k in ("b", "w")])


def quantized_sum(trees, clients):
    return sum(quantize(flat(trees[k]), WEIGHTS[k], SecureConfig()) for k in clients)


@pytest.mark.parametrize("dropped", [(), (8,), (3,)])
def test_the_sum_is_exactly_that_of_the_quantised_updates_that_arrived(trees, dropped):
    got = secure_mean(trees, WEIGHTS, dropped=dropped)
    left = [k for k in CLIENTS if k not in dropped]
    assert got.arrived == tuple(left)
    np.testing.assert_array_equal(got.total, quantized_sum(trees, left))
    assert got.weight == sum(WEIGHTS[k] for k in left)


def test_the_mean_is_the_weighted_mean_of_the_clipped_updates_up_to_half_a_step_per_client(trees):
    config = SecureConfig(clip=8.0)
    got = secure_mean(trees, WEIGHTS, config)
    weights = np.array([WEIGHTS[k] for k in CLIENTS], np.float64)
    updates = np.stack([np.clip(flat(trees[k]), -8, 8) for k in CLIENTS])
    wanted = (weights[:, None] * updates).sum(0) / weights.sum()
    step = 2 * config.clip / config.levels * config.weight_limit / weights.sum()
    mean = flat(got.mean)
    assert np.abs(mean - wanted).max() <= step * len(CLIENTS) / 2 + 1e-6  # float32 results
    assert got.mean["w"].dtype == np.float32 and got.mean["w"].shape == (6, 5)


def test_fewer_clients_than_the_threshold_end_the_round_with_one_line(trees):
    with pytest.raises(QuorumNotMet, match="3 of 5 clients arrived and secure aggregation needs 4"):
        secure_mean(trees, WEIGHTS, dropped=(3, 5))
    assert secure_mean(trees, WEIGHTS, SecureConfig(threshold=0.6), dropped=(3, 5)).weight == 1257


def _until_masked(trees):
    clients = {k: SecureClient(k) for k in CLIENTS}
    keys = {k: c.advertise() for k, c in clients.items()}
    shares = {k: c.share(keys) for k, c in clients.items()}
    masked = {
        k: c.masked(flat(trees[k]), WEIGHTS[k], {s: shares[s][k] for s in CLIENTS})
        for k, c in clients.items()
    }
    return clients, keys, shares, masked


def test_what_the_server_sees_of_one_client_is_noise_even_when_all_are_the_same(trees):
    same = dict.fromkeys(CLIENTS, {"w": jnp.zeros((60, 50)), "b": jnp.zeros(3)})
    _, _, _, masked = _until_masked(same)
    for vector in masked.values():
        # Uniform on 32 bits: the mean of 3000 values is within five standard errors, and hardly one repeats.
        spread = 2**32 / np.sqrt(12 * vector.size)
        assert abs(vector.astype(np.float64).mean() - 2**31) < 5 * spread
        assert np.unique(vector).size > 0.99 * vector.size


def test_no_client_gives_both_secrets_of_another_nor_unmasks_too_few(trees):
    clients, *_ = _until_masked(trees)
    with pytest.raises(ValueError, match="both"):
        clients[3].reveal(CLIENTS, [5])
    with pytest.raises(ValueError, match="2 clients arrived and 4 are needed"):
        clients[3].reveal([3, 5], [8, 13, 21])
    with pytest.raises(ValueError, match="not those that shared"):
        clients[3].reveal(CLIENTS[:4], [])


def test_a_share_that_was_altered_on_its_way_is_noticed(trees):
    clients, _, shares, _ = _until_masked(trees)
    clients[3]._sealed[5] = shares[5][8]  # another client's
    with pytest.raises(ValueError, match="from client 5 for client 3 was altered"):
        clients[3].reveal(CLIENTS, [])


def test_too_few_answers_after_masking_end_the_round(trees):
    clients, keys, _, masked = _until_masked(trees)
    revealed = {k: clients[k].reveal(CLIENTS, []) for k in CLIENTS[:3]}
    with pytest.raises(QuorumNotMet, match="3 of 5 clients revealed shares"):
        unmask(masked, keys, CLIENTS, revealed)


def test_any_threshold_of_answers_gives_the_same_sum(trees):
    clients, keys, _, masked = _until_masked(trees)
    revealed = {k: clients[k].reveal(CLIENTS, []) for k in CLIENTS}
    wanted = quantized_sum(trees, CLIENTS)
    for left_out in CLIENTS[:2]:
        some = {k: v for k, v in revealed.items() if k != left_out}
        np.testing.assert_array_equal(unmask(masked, keys, CLIENTS, some), wanted)


def test_a_nan_names_the_client(trees):
    trees[8] = {"w": trees[8]["w"].at[0, 0].set(jnp.nan), "b": trees[8]["b"]}
    with pytest.raises(ValueError, match="client 8: an update has NaN"):
        secure_mean(trees, WEIGHTS)


def test_two_never_are_a_sum(trees):
    # Each of them would learn the other's update from it.
    three = {k: trees[k] for k in CLIENTS[:3]}
    assert SecureConfig().needed(3) == SecureConfig().needed(4) == 3
    with pytest.raises(QuorumNotMet, match="2 of 3 clients arrived and secure aggregation needs 3"):
        secure_mean(three, WEIGHTS, dropped=CLIENTS[:1])


def test_weights_that_could_wrap_are_refused_before_a_round(trees):
    most = SecureConfig(weight_limit=2**29)
    assert most.most_clients() == 3 and SecureConfig(weight_limit=4_000_000).most_clients() == 536
    with pytest.raises(ValueError, match="from 3 to 3 clients"):
        secure_mean(trees, WEIGHTS, most)
    largest = {k: trees[k] for k in CLIENTS[:3]}
    assert secure_mean(largest, dict.fromkeys(largest, 2**29), most).weight == 3 * 2**29
    with pytest.raises(ValueError, match="weight_limit must be at most 715827882"):
        SecureConfig(weight_limit=2**30)


def test_numbers_out_of_range_are_refused(trees):
    for options, said in (
        ({"threshold": 0.5}, "above 1/2"),
        ({"levels": 2**31}, "levels"),
        ({"clip": 0.0}, "positive"),
    ):
        with pytest.raises(ValueError, match=said):
            SecureConfig(**options)
    with pytest.raises(ValueError, match="weight_limit=1000"):
        secure_mean(trees, {**WEIGHTS, 3: 1001})
    with pytest.raises(ValueError, match="from 3 to"):
        secure_mean({k: trees[k] for k in (3, 5)}, WEIGHTS)
    with pytest.raises(ValueError, match="from 3 to 3 clients"):
        secure_mean(trees, WEIGHTS, SecureConfig(levels=2**30))
    with pytest.raises(QuorumNotMet, match="no examples"):
        secure_mean(trees, dict.fromkeys(CLIENTS, 0))


def test_as_a_runs_aggregator_it_is_the_weighted_mean(trees):
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *trees.values())
    clipped = jax.tree.map(lambda x: jnp.clip(x, -8, 8), stacked)
    weights = jnp.array([10.0, 5.0, 7.0, 900.0, 250.0])
    got = by_name("secure").combine(stacked, weights, jnp.array(CLIENTS), jax.random.key(0))
    wanted = Mean().combine(clipped, weights, jnp.array(CLIENTS), jax.random.key(0))
    for name in ("w", "b"):
        # Half a step of 16 / 2^22 per client, times the weight limit over the weights' sum, and float32.
        np.testing.assert_allclose(got[name], wanted[name], atol=2e-5)
    assert not by_name("secure").individual and not by_name("private:1:1:4").individual
