"""Routing against a plain NumPy transcription of the model's rules (spec 5)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.moe import route
from jaxmoe.moe.route import expert_load

# name -> changes to the tiny preset
CONFIGS = {
    "four of eight groups": dict(
        n_routed_experts=32, n_group=8, topk_group=4, num_experts_per_tok=6
    ),
    "one of two groups": dict(n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2),
    "no groups": dict(n_routed_experts=7, n_group=1, topk_group=1, num_experts_per_tok=3),
    "all groups kept": dict(n_routed_experts=8, n_group=4, topk_group=4, num_experts_per_tok=2),
    "weights not normalised": dict(
        n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2, norm_topk_prob=False
    ),
    "every reachable expert": dict(
        n_routed_experts=12,
        n_group=3,
        topk_group=2,
        num_experts_per_tok=8,
        routed_scaling_factor=1.0,
    ),
}


@pytest.fixture(scope="module")
def config(request, tiny_config):
    return tiny_config.replace(hidden_size=16, **CONFIGS[request.param])


every_config = pytest.mark.parametrize("config", list(CONFIGS), indirect=True)


def oracle(config, weight, bias, x):
    """(expert ids, weights) in float64, one token at a time."""
    per_group = config.n_routed_experts // config.n_group
    all_ids, all_weights = [], []
    for token in np.asarray(x, np.float64):
        score = 1 / (1 + np.exp(-token @ np.asarray(weight, np.float64)))
        biased = score + np.asarray(bias, np.float64)
        group_scores = [
            sum(sorted(biased[g * per_group : (g + 1) * per_group])[-2:])
            for g in range(config.n_group)
        ]
        kept = sorted(range(config.n_group), key=lambda g: (-group_scores[g], g))[
            : config.topk_group
        ]
        candidates = [e for e in range(config.n_routed_experts) if e // per_group in kept]
        candidates.sort(key=lambda e: (-biased[e], e))
        chosen = candidates[: config.num_experts_per_tok]
        gate = score[chosen]
        if config.norm_topk_prob:
            gate = gate / gate.sum()
        all_ids.append(chosen)
        all_weights.append(gate * config.routed_scaling_factor)
    return np.asarray(all_ids), np.asarray(all_weights)


@functools.partial(jax.jit, static_argnums=0)
def run(config, weight, bias, x):
    return route({"weight": weight, "bias": bias}, config, x)


def router(rng, config):
    """(weight, bias); the bias is as large as the scores' spread and of both signs."""
    weight = rng.standard_normal((config.hidden_size, config.n_routed_experts), np.float32)
    return weight, 0.3 * rng.standard_normal(config.n_routed_experts, np.float32)


def check(config, weight, bias, x):
    """Asserts that route equals the oracle; returns its result."""
    routing = run(config, weight, bias, x)
    ids, weights = oracle(config, weight, bias, x)
    np.testing.assert_array_equal(routing.expert_ids, ids)
    # float32 logits of size 10 carry an error of 1e-5, and so does, relatively, the sigmoid of a very negative one.
    np.testing.assert_allclose(routing.weights, weights, rtol=1e-5)
    return routing


@every_config
def test_equals_the_oracle(config, rng):
    weight, bias = router(rng, config)
    routing = check(config, weight, bias, rng.standard_normal((40, 16), np.float32))
    assert routing.expert_ids.dtype == jnp.int32
    assert routing.weights.dtype == routing.scores.dtype == jnp.float32
    assert routing.scores.shape == (40, config.n_routed_experts)


@every_config
def test_a_very_negative_bias_never_lets_an_excluded_group_in(config, rng):
    # All biased scores are far below 0: an excluded expert set to 0 instead of -inf would win.
    weight, bias = router(rng, config)
    check(config, weight, bias - 5, rng.standard_normal((40, 16), np.float32))


@every_config
def test_equal_scores_go_to_the_lower_expert_of_the_lower_groups(config):
    shape = (config.hidden_size, config.n_routed_experts)
    routing = run(config, jnp.zeros(shape), jnp.zeros(shape[1]), jnp.ones((3, 16)))
    expected = np.arange(config.num_experts_per_tok)
    np.testing.assert_array_equal(routing.expert_ids, np.broadcast_to(expected, (3, len(expected))))


@every_config
def test_the_bias_chooses_but_does_not_weigh(config, rng):
    weight, bias = router(rng, config)
    x = rng.standard_normal((40, 16), np.float32)
    routing = run(config, weight, bias, x)
    scores = np.asarray(run(config, weight, 0 * bias, x).scores)
    np.testing.assert_array_equal(routing.scores, scores)
    gate = np.take_along_axis(scores, np.asarray(routing.expert_ids), 1)
    if config.norm_topk_prob:
        gate = gate / gate.sum(1, keepdims=True)
    np.testing.assert_allclose(routing.weights, gate * config.routed_scaling_factor, rtol=2e-6)


@pytest.mark.parametrize("config", ["four of eight groups"], indirect=True)
def test_a_group_is_scored_by_its_two_best_experts_not_by_its_best(config):
    bias = np.zeros(32, np.float32)
    bias[[0, 4, 8, 12]] = 0.9  # four groups with one excellent expert: sum of two is 0.5 + 1.4
    bias[16:] = 0.6  # four groups of good ones: 1.1 + 1.1
    routing = run(config, jnp.zeros((16, 32)), bias, jnp.ones((1, 16)))
    assert (np.asarray(routing.expert_ids) >= 16).all()


@pytest.mark.parametrize("config", ["one of two groups"], indirect=True)
def test_gradients_flow_through_the_weights_and_never_to_the_bias(config, rng):
    weight, bias = router(rng, config)
    x = rng.standard_normal((8, 16), np.float32)

    def loss(weight, bias, x):
        gate = route({"weight": weight, "bias": bias}, config, x).weights
        return (gate * jnp.arange(1.0, 3.0)[None]).sum()

    d_weight, d_bias, dx = jax.jit(jax.grad(loss, (0, 1, 2)))(weight, bias, x)
    assert not np.asarray(d_bias).any()
    assert np.asarray(d_weight).any() and np.asarray(dx).any()


@pytest.mark.parametrize("config", ["four of eight groups"], indirect=True)
def test_bfloat16_activations_are_routed_in_float32(config, rng):
    weight, bias = router(rng, config)
    x = jnp.asarray(rng.standard_normal((20, 16), np.float32), jnp.bfloat16)
    weight = jnp.asarray(weight, jnp.bfloat16)
    check(config, weight, bias, x)


@pytest.mark.parametrize("config", ["four of eight groups"], indirect=True)
@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0.01, 0.3, 2.0]))
def test_choices_are_distinct_and_come_from_at_most_topk_group_groups(config, seed, spread):
    rng = np.random.default_rng(seed)
    weight, _ = router(rng, config)
    bias = spread * rng.standard_normal(32, np.float32)
    routing = run(config, weight, bias, rng.standard_normal((40, 16), np.float32))
    for ids in np.asarray(routing.expert_ids):
        assert len(set(ids)) == config.num_experts_per_tok
        assert len(set(ids // 4)) <= config.topk_group
    np.testing.assert_allclose(np.sum(routing.weights, 1), config.routed_scaling_factor, rtol=1e-5)


def test_expert_load_counts_choices_and_ignores_padding():
    ids = jnp.asarray([[0, 2], [2, -1], [4, 0]], jnp.int32)
    np.testing.assert_array_equal(expert_load(ids, 5), [2, 0, 2, 0, 1])
