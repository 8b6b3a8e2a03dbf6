"""Balance loss and bias update against arithmetic done by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxmoe.moe.balance import sequence_balance_loss, update_bias


def test_balance_loss_by_hand():
    # One sequence of two tokens, three experts, two choices each.
    scores = jnp.asarray([[[0.5, 0.3, 0.2], [0.2, 0.2, 0.4]]])
    ids = jnp.asarray([[[0, 1], [0, 2]]], jnp.int32)
    # f = 3 / (2 * 2) * counts [2, 1, 1] = [1.5, 0.75, 0.75]
    # P = mean of [0.5, 0.3, 0.2] and [0.25, 0.25, 0.5] = [0.375, 0.275, 0.35]
    expected = 1.5 * 0.375 + 0.75 * 0.275 + 0.75 * 0.35
    np.testing.assert_allclose(sequence_balance_loss(scores, ids), expected, rtol=1e-6)


def test_balance_loss_is_averaged_over_sequences():
    scores = jnp.asarray([[[0.9, 0.1]], [[0.1, 0.9]]])
    ids = jnp.asarray([[[0]], [[0]]], jnp.int32)
    # f = 2 * [1, 0]; P = [0.9, 0.1] and [0.1, 0.9]: losses 1.8 and 0.2.
    np.testing.assert_allclose(sequence_balance_loss(scores, ids), (1.8 + 0.2) / 2, rtol=1e-6)


def test_balance_loss_is_one_when_balanced_and_the_number_of_experts_when_collapsed():
    even = jnp.full((1, 4, 4), 0.5)
    ids = jnp.arange(4, dtype=jnp.int32).reshape(1, 4, 1)
    np.testing.assert_allclose(sequence_balance_loss(even, ids), 1.0, rtol=1e-6)
    collapsed = jnp.full((1, 4, 4), 1e-9).at[..., 0].set(1.0)
    np.testing.assert_allclose(sequence_balance_loss(collapsed, 0 * ids), 4.0, rtol=1e-5)


def test_balance_loss_has_a_gradient_through_the_scores_alone():
    # f is a count: the gradient is f_e times that of P_e.
    ids = jnp.asarray([[[0], [0], [1]]], jnp.int32)
    scores = jnp.asarray([[[0.5, 0.25], [0.4, 0.1], [0.2, 0.3]]])
    share = jnp.asarray([2 * 2 / 3, 2 * 1 / 3])

    def by_hand(scores):
        return (share * (scores[0] / scores[0].sum(-1, keepdims=True)).mean(0)).sum()

    expected = jax.grad(by_hand)(scores)
    np.testing.assert_allclose(
        jax.grad(sequence_balance_loss)(scores, ids), expected, rtol=1e-5, atol=1e-7
    )


def test_bias_moves_by_speed_towards_the_mean_load():
    bias = jnp.asarray([0.5, 0.0, -0.5, 0.25])
    load = jnp.asarray([9, 1, 4, 2], jnp.int32)  # mean 4
    np.testing.assert_allclose(
        update_bias(bias, load, 0.1), [0.5 - 0.1, 0.1, -0.5, 0.25 + 0.1], rtol=1e-6
    )


def test_biases_of_stacked_layers_are_updated_independently():
    bias = jnp.zeros((2, 2))
    load = jnp.asarray([[3, 1], [2, 2]], jnp.int32)
    np.testing.assert_allclose(update_bias(bias, load, 0.5), [[-0.5, 0.5], [0, 0]], rtol=1e-6)


@given(hnp.arrays(np.int32, (6,), elements=st.integers(0, 1000)), st.sampled_from([0.0, 1e-3, 0.5]))
def test_bias_never_moves_by_more_than_speed_nor_towards_imbalance(load, speed):
    moved = np.asarray(update_bias(jnp.zeros(6), jnp.asarray(load), speed))
    assert np.abs(moved).max() <= np.float32(speed)
    assert (moved[load > load.mean() + 0.5] <= 0).all() and (
        moved[load < load.mean() - 0.5] >= 0
    ).all()


@pytest.mark.parametrize("tokens", [64, 257])
def test_repeated_updates_balance_a_skewed_router(tokens, rng):
    # A router that would always take expert 0: bias alone must bring every expert to work.
    scores = rng.uniform(0, 1, (tokens, 8)).astype(np.float32)
    scores[:, 0] += 1
    bias = jnp.zeros(8)
    for _ in range(300):
        chosen = np.argmax(scores + np.asarray(bias)[None], 1)
        bias = update_bias(bias, jnp.asarray(np.bincount(chosen, minlength=8)), 0.01)
    load = np.bincount(np.argmax(scores + np.asarray(bias)[None], 1), minlength=8)
    assert load.max() < 2.5 * tokens / 8
