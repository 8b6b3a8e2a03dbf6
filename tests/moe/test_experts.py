"""Expert MLPs on grouped rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.moe.experts import Experts, every_expert, grouped_experts

SIZES = [3, 0, 4, 2]


@pytest.fixture
def weights(rng):
    """gate_up and down of three layers of four experts, [12, ...]."""
    gate_up = rng.standard_normal((12, 6, 2, 5), np.float32)
    return jnp.asarray(gate_up), jnp.asarray(rng.standard_normal((12, 5, 6), np.float32))


def by_hand(gate_up, down, x):
    """One expert in float64 with silu."""
    gate, up = (np.asarray(x, np.float64) @ np.asarray(gate_up, np.float64)[:, i] for i in range(2))
    return gate / (1 + np.exp(-gate)) * up @ np.asarray(down, np.float64)


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("layer", [0, 2])
def test_rows_go_through_the_expert_of_their_group_and_layer(weights, layer, implementation, rng):
    gate_up, down = weights
    rows = rng.standard_normal((9, 6), np.float32)

    @jax.jit
    def run(offset):
        experts = Experts(gate_up, down, 4, offset)
        return grouped_experts(
            experts, jnp.asarray(rows), jnp.asarray(SIZES), "silu", implementation
        )

    expected, start = [], 0
    for e, size in enumerate(SIZES):
        g = 4 * layer + e
        expected.append(by_hand(gate_up[g], down[g], rows[start : start + size]))
        start += size
    # Products of three standard normals summed over 6 and 5 terms: values of size 50.
    np.testing.assert_allclose(run(4 * layer), np.concatenate(expected), rtol=1e-5, atol=1e-4)


def test_every_expert_gives_all_slots_of_its_layer(weights, rng):
    gate_up, down = weights
    x = rng.standard_normal((7, 6), np.float32)
    y = jax.jit(
        lambda offset: every_expert(Experts(gate_up, down, 4, offset), jnp.asarray(x), "silu")
    )(8)
    assert y.shape == (4, 7, 6)
    for e in range(4):
        expected = by_hand(gate_up[8 + e], down[8 + e], x)
        np.testing.assert_allclose(y[e], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("function", [grouped_experts, every_expert])
def test_experts_may_be_an_argument_of_a_compiled_function(function, weights, rng):
    rest = (jnp.asarray(SIZES), "silu") if function is grouped_experts else ("silu",)
    rows = jnp.asarray(rng.standard_normal((9, 6), np.float32))
    experts = Experts(*weights, 4, 8)
    compiled = jax.jit(lambda experts, rows: function(experts, rows, *rest))
    np.testing.assert_allclose(
        compiled(experts, rows), function(experts, rows, *rest), rtol=1e-6, atol=1e-5
    )
