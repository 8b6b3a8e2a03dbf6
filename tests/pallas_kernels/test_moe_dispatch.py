"""Dispatch and combine: every backend against stable NumPy sorting, in both ranking methods."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels import combine, dispatch
from pallas_kernels.moe_dispatch import api

# Sums of a few float32 numbers of size 1 to 10.
TOLERANCE = {"rtol": 1e-6, "atol": 1e-5}


def oracle_order(ids, experts):
    """(pair of each row, group sizes, position), from a stable sort with -1 last."""
    flat = ids.reshape(-1)
    order = np.argsort(np.where(flat >= 0, flat, experts), kind="stable")
    position = np.empty(flat.size, np.int64)
    position[order] = np.arange(flat.size)
    sizes = np.bincount(flat[flat >= 0], minlength=experts)
    return order, sizes, np.where(flat >= 0, position, -1).reshape(ids.shape)


def oracle_rows(x, ids, experts):
    """The dispatched rows; zeros for ids of -1."""
    order, sizes, _ = oracle_order(ids, experts)
    rows = x[order // ids.shape[1]].copy()
    rows[sizes.sum() :] = 0
    return rows


def oracle_combine(rows, position, weights):
    """Weighted sums in float64, skipping -1."""
    y = np.zeros((len(position), rows.shape[1]))
    for t, a in np.argwhere(position >= 0):
        y[t] += np.float64(weights[t, a]) * rows[position[t, a]].astype(np.float64)
    return y


@functools.partial(jax.jit, static_argnames=("experts", "implementation"))
def run_dispatch(x, ids, d_rows, experts, implementation):
    """(dispatched, dx)."""

    def forward(x):
        moved = dispatch(x, ids, experts, implementation=implementation)
        return moved.rows, moved

    _, pullback, moved = jax.vjp(forward, x, has_aux=True)
    return moved, pullback(d_rows)[0]


@functools.partial(jax.jit, static_argnames="implementation")
def run_combine(rows, position, weights, dy, implementation):
    """(y, d_rows, d_weights)."""

    def forward(rows, weights):
        return combine(rows, position, weights, implementation=implementation)

    y, pullback = jax.vjp(forward, rows, weights)
    return y, *pullback(dy)


# name -> (tokens, choices, experts, share of -1); 130 * 3 pairs are above the all-pairs ranking's limit.
CASES = {
    "odd sizes": (7, 3, 5, 0.0),
    "padding": (7, 3, 5, 0.4),
    "one choice": (13, 1, 4, 0.2),
    "more experts than pairs": (2, 2, 9, 0.0),
    "one expert": (6, 1, 1, 0.0),
    "all padding": (4, 2, 3, 1.0),
    "enough pairs to sort": (130, 3, 5, 0.1),
}
assert 130 * 3 > api._PAIRWISE_LIMIT > 13


def random_ids(rng, tokens, active, experts, missing):
    """Distinct experts per token where there are enough, then -1 with the given frequency."""
    ids = np.argsort(rng.random((tokens, max(experts, active))), axis=1)[:, :active] % experts
    return np.where(rng.random(ids.shape) < missing, -1, ids).astype(np.int32)


drawn_ids = hnp.arrays(np.int32, (5, 2), elements=st.integers(-1, 3))


class Cases:
    """What every backend must satisfy; a subclass names the backend and inherits all of it."""

    implementation: str
    width = 4  # numbers in a row, which some kernels need more of

    @pytest.mark.parametrize("case", list(CASES))
    def test_dispatch_sorts_rows_stably_by_expert(self, case, rng):
        tokens, active, experts, missing = CASES[case]
        ids = random_ids(rng, tokens, active, experts, missing)
        x = rng.standard_normal((tokens, self.width), np.float32)
        d_rows = rng.standard_normal((tokens * active, self.width), np.float32)
        moved, dx = run_dispatch(x, ids, d_rows, experts, self.implementation)
        _, sizes, position = oracle_order(ids, experts)
        np.testing.assert_array_equal(moved.rows, oracle_rows(x, ids, experts))
        np.testing.assert_array_equal(moved.group_sizes, sizes)
        np.testing.assert_array_equal(moved.position, position)
        expected = oracle_combine(d_rows, position, np.ones(ids.shape))
        np.testing.assert_allclose(dx, expected, **TOLERANCE)

    def test_all_tokens_to_one_expert_keep_their_order(self, rng):
        x = rng.standard_normal((9, self.width), np.float32)
        ids = np.full((9, 1), 2, np.int32)
        moved, _ = run_dispatch(x, ids, np.zeros_like(x), 5, self.implementation)
        np.testing.assert_array_equal(moved.rows, x)
        np.testing.assert_array_equal(moved.group_sizes, [0, 0, 9, 0, 0])
        np.testing.assert_array_equal(moved.position[:, 0], np.arange(9))

    @pytest.mark.parametrize("case", list(CASES))
    def test_combine_and_its_gradients_equal_the_oracle(self, case, rng):
        tokens, active, experts, missing = CASES[case]
        position = oracle_order(random_ids(rng, tokens, active, experts, missing), experts)[2]
        rows = rng.standard_normal((tokens * active, self.width), np.float32)
        weights = rng.standard_normal((tokens, active), np.float32)
        dy = rng.standard_normal((tokens, self.width), np.float32)
        y, d_rows, d_weights = run_combine(
            rows, position.astype(np.int32), weights, dy, self.implementation
        )
        np.testing.assert_allclose(y, oracle_combine(rows, position, weights), **TOLERANCE)
        expected_rows, expected_weights = np.zeros(rows.shape), np.zeros(weights.shape)
        for t, a in np.argwhere(position >= 0):
            expected_rows[position[t, a]] = weights[t, a] * dy[t]
            expected_weights[t, a] = rows[position[t, a]].astype(np.float64) @ dy[t]
        np.testing.assert_allclose(d_rows, expected_rows, **TOLERANCE)
        np.testing.assert_allclose(d_weights, expected_weights, **TOLERANCE)

    @given(drawn_ids)
    def test_no_pair_is_lost_or_doubled(self, ids):
        x = np.full((5, self.width), np.arange(5)[:, None] + 1, np.float32)
        d_rows = np.zeros((10, self.width), np.float32)
        moved, _ = run_dispatch(x, ids, d_rows, 4, self.implementation)
        assert moved.group_sizes.sum() == (ids >= 0).sum()
        positions, rows, sizes = (
            np.asarray(a) for a in (moved.position, moved.rows, moved.group_sizes)
        )
        used = positions[positions >= 0]
        assert sorted(used) == list(range(len(used)))
        ends = np.cumsum(sizes)
        for t, a in np.argwhere(ids >= 0):
            assert rows[positions[t, a], 0] == t + 1
            assert ends[ids[t, a]] - sizes[ids[t, a]] <= positions[t, a] < ends[ids[t, a]]

    @given(drawn_ids)
    def test_combine_of_dispatch_with_unit_weights_counts_each_token_once_per_choice(self, ids):
        x = np.linspace(-2, 2, 5 * self.width, dtype=np.float32).reshape(5, -1)
        d_rows = np.zeros((10, self.width), np.float32)
        moved, _ = run_dispatch(x, ids, d_rows, 4, self.implementation)
        ones, dy = jnp.ones((5, 2)), jnp.zeros((5, self.width))
        y, _, _ = run_combine(moved.rows, moved.position, ones, dy, self.implementation)
        np.testing.assert_array_equal(y, x * (ids >= 0).sum(1, keepdims=True))

    def test_combine_does_not_depend_on_where_the_rows_lie(self, rng):
        rows = rng.standard_normal((30, self.width), np.float32)
        position = rng.permutation(30).astype(np.int32).reshape(10, 3)
        weights = rng.standard_normal((10, 3), np.float32)
        dy = np.zeros((10, self.width), np.float32)
        moved_to = rng.permutation(30)
        elsewhere = np.empty_like(rows)
        elsewhere[moved_to] = rows
        a, _, _ = run_combine(rows, position, weights, dy, self.implementation)
        b, _, _ = run_combine(
            elsewhere, moved_to[position].astype(np.int32), weights, dy, self.implementation
        )
        np.testing.assert_array_equal(a, b)

    def test_nothing_unused_reaches_a_result_or_a_gradient(self, rng):
        rows = rng.standard_normal((6, self.width), np.float32)
        position = np.asarray([[1, 3], [-1, 4], [-1, -1]], np.int32)
        weights = rng.standard_normal((3, 2), np.float32)
        dy = rng.standard_normal((3, self.width), np.float32)
        clean = run_combine(rows, position, weights, dy, self.implementation)
        rows[[0, 2, 5]], weights[position < 0] = np.nan, np.inf
        dirty = run_combine(rows, position, weights, dy, self.implementation)
        for a, b in zip(clean, dirty, strict=True):
            np.testing.assert_array_equal(a, b)

    def test_gradients_of_padding_rows_reach_no_token(self, rng):
        ids = np.asarray([[1, -1], [0, 1]], np.int32)
        x = np.ones((2, self.width), np.float32)
        d_rows = rng.standard_normal((4, self.width), np.float32)
        d_rows[3] = np.nan
        _, dx = run_dispatch(x, ids, d_rows, 2, self.implementation)
        np.testing.assert_allclose(dx, [d_rows[1], d_rows[0] + d_rows[2]], **TOLERANCE)

    def test_bfloat16_rows_are_summed_in_float32(self):
        # 1 + 16 times 2**-9 is 1.03125; in bfloat16 each addend would be lost.
        rows = jnp.full((17, self.width), 2**-9, jnp.bfloat16).at[0].set(1)
        position = jnp.arange(17, dtype=jnp.int32)[None]
        weights = jnp.ones((1, 17), jnp.float32)
        y = combine(rows, position, weights, implementation=self.implementation)
        assert y.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(y, np.float32), np.full((1, self.width), 1.03125))


class TestXla(Cases):
    implementation = "xla"

    def test_no_rows_sum_to_zeros(self):
        position, weights, dy = jnp.full((3, 2), -1, jnp.int32), jnp.ones((3, 2)), jnp.ones((3, 4))
        y, d_rows, d_weights = run_combine(jnp.ones((0, 4)), position, weights, dy, "xla")
        np.testing.assert_array_equal(y, np.zeros((3, 4)))
        np.testing.assert_array_equal(d_weights, np.zeros((3, 2)))
        assert d_rows.shape == (0, 4)


class Simulated(Cases):
    """Fewer examples: a call takes a tenth of a second."""

    @settings(max_examples=4)
    @given(drawn_ids)
    def test_no_pair_is_lost_or_doubled(self, ids):
        Cases.test_no_pair_is_lost_or_doubled.hypothesis.inner_test(self, ids)

    @settings(max_examples=4)
    @given(drawn_ids)
    def test_combine_of_dispatch_with_unit_weights_counts_each_token_once_per_choice(self, ids):
        inherited = (
            Cases.test_combine_of_dispatch_with_unit_weights_counts_each_token_once_per_choice
        )
        inherited.hypothesis.inner_test(self, ids)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="refused there")
class TestMosaicTpu(Simulated):
    implementation = "mosaic_tpu"


@pytest.mark.skipif(jax.default_backend() == "tpu", reason="refused there")
class TestMosaicGpu(Simulated):
    implementation = "mosaic_gpu"
    width = 128


@pytest.mark.misuse
@pytest.mark.parametrize(("x", "ids"), [((2, 3, 4), (2, 1)), ((2, 3), (2,)), ((2, 3), (5, 1))])
def test_dispatch_names_shapes_that_do_not_fit(x, ids):
    with pytest.raises(ValueError, match=r"dispatch: x must be \[T, D\].*one T; got \(2, 3"):
        dispatch(jnp.ones(x), jnp.zeros(ids, jnp.int32), 2)


@pytest.mark.misuse
@pytest.mark.parametrize(
    ("rows", "position", "weights"),
    [((6,), (3, 2), (3, 2)), ((6, 4), (3, 2), (3, 1)), ((6, 4), (6,), (6,))],
)
def test_combine_names_shapes_that_do_not_fit(rows, position, weights):
    with pytest.raises(ValueError, match=r"combine: rows must be \[R, D\].*got \(6"):
        combine(jnp.ones(rows), jnp.zeros(position, jnp.int32), jnp.ones(weights))
