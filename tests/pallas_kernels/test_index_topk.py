"""Index scores and exact top-k: every backend against NumPy, with ties, plateaus and missing keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels import index_topk, native
from pallas_kernels.index_topk import (
    index_scores,
    reference,
    select_indices,
    select_mask,
    select_positions,
)

select_indices_jit = jax.jit(select_indices, static_argnums=1)
select_mask_jit = jax.jit(select_mask, static_argnums=1)
select_positions_jit = jax.jit(select_positions, static_argnums=1)


def oracle_scores(q, k, weights):
    """Index scores in float64, one query at a time."""
    q, k, weights = (np.asarray(a, np.float64) for a in (q, k, weights))
    scores = np.zeros((*q.shape[:2], k.shape[1]))
    for b, t in np.ndindex(*q.shape[:2]):
        scores[b, t] = weights[b, t] @ np.maximum(q[b, t] @ k[b].T, 0)
    return scores


def oracle_indices(scores, topk):
    """Best first, lowest position first among equals, -1 where there is no visible key left."""
    scores = np.asarray(scores) + 0.0  # -0.0 and 0.0 are equal
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :topk]
    return np.where(np.take_along_axis(scores, order, -1) > -np.inf, order, -1)


def check_selection(scores, topk):
    """Asserts that indices, mask and positions equal the oracle."""
    scores = np.asarray(scores, np.float32)
    expected = oracle_indices(scores, topk)
    indices = select_indices_jit(scores, topk)
    np.testing.assert_array_equal(indices, expected)
    assert indices.dtype == jnp.int32
    mask = np.zeros(scores.shape, bool)
    for row in np.ndindex(*scores.shape[:-1]):
        mask[row][expected[row][expected[row] >= 0]] = True
    np.testing.assert_array_equal(select_mask_jit(scores, topk), mask)
    last = np.where(expected < 0, scores.shape[-1], expected)  # -1 comes after the last
    ascending = np.sort(last, -1)
    ascending[ascending == scores.shape[-1]] = -1
    np.testing.assert_array_equal(select_positions_jit(scores, topk), ascending)


@pytest.fixture(scope="class", params=["cpu", "accelerator"])
def machine(request):
    """Selections as CPUs and as accelerators make them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "on_accelerator", lambda: request.param == "accelerator")
        jax.clear_caches()
        yield
    jax.clear_caches()


@pytest.mark.usefixtures("machine")
class TestSelection:
    """The selections that every layer relies on."""

    @pytest.mark.parametrize("topk", [1, 3, 11, 12, 13, 40])
    def test_random_scores(self, topk, rng):
        check_selection(rng.standard_normal((2, 5, 12)), topk)

    @pytest.mark.parametrize("topk", [1, 4, 7])
    def test_a_plateau_of_zeros_fills_from_the_lowest_position(self, topk):
        check_selection([[0, 0, 5, 0, -1, 0, 0, 2, 0, -3]], topk)

    def test_negative_and_positive_zero_are_equal(self):
        scores = np.asarray([[-0.0, 0.0, -0.0, 0.0], [0.0, -0.0, 0.0, -0.0]])
        check_selection(scores, 2)
        np.testing.assert_array_equal(
            select_indices_jit(scores.astype(np.float32), 2), [[0, 1]] * 2
        )

    def test_all_equal_scores_select_the_first(self):
        check_selection(np.full((3, 9), 0.5), 4)

    def test_fewer_visible_keys_than_topk_give_minus_one(self):
        scores = np.full((4, 6), -np.inf)
        scores[1, 2], scores[2, [1, 4]], scores[3] = 1.0, -2.0, 0.0
        check_selection(scores, 3)

    @given(
        hnp.arrays(
            np.float32, (3, 11), elements=st.sampled_from([-np.inf, -1.0, -0.0, 0.0, 1e-6, 2.0])
        ),
        st.sampled_from([1, 3, 11, 12]),  # each compiles
    )
    def test_any_pattern_of_ties(self, scores, topk):
        check_selection(scores, topk)

    @given(
        hnp.arrays(
            np.float32, (2, 9), elements=st.floats(width=32, allow_nan=False, allow_subnormal=False)
        ),
        st.sampled_from([1, 4, 9]),
    )
    def test_any_finite_or_infinite_scores(self, scores, topk):
        check_selection(scores, topk)

    @given(hnp.arrays(np.float32, (7,), elements=st.integers(-2, 2)), st.sampled_from([1, 3, 7]))
    def test_a_larger_topk_keeps_what_a_smaller_one_chose(self, scores, topk):
        smaller, larger = select_mask_jit(scores, topk), select_mask_jit(scores, topk + 1)
        assert smaller.sum() == topk and (larger | ~smaller).all()

    def test_long_rows_select_exactly_topk(self, rng):
        scores = np.maximum(rng.standard_normal((2, 3000)), 0)  # half of it one plateau
        check_selection(scores, 2000)


@functools.partial(jax.jit, static_argnames=("topk", "implementation"))
def run(q, k, weights, topk, implementation, visible=None):
    return index_topk(q, k, weights, topk, visible=visible, implementation=implementation)


def inputs(rng, batch=2, tokens=5, keys=9, heads=3, size=4):
    """Random q, k, weights; weights have both signs."""
    shapes = ((batch, tokens, heads, size), (batch, keys, size), (batch, tokens, heads))
    return tuple(rng.standard_normal(shape, np.float32) for shape in shapes)


class Cases:
    """What every backend must satisfy; a subclass names the backend and inherits all of it."""

    implementation: str

    def check(self, q, k, weights, topk, visible):
        """Asserts that the backend selects what the oracle selects."""
        counts = np.asarray(visible)
        scores = oracle_scores(q, k, weights)
        scores[np.arange(k.shape[1]) >= counts[..., None]] = -np.inf
        got = run(q, k, weights, topk, self.implementation, jnp.asarray(counts, jnp.int32))
        np.testing.assert_array_equal(got, oracle_indices(scores, topk))

    @pytest.mark.parametrize("topk", [1, 4, 9, 20])
    def test_selects_the_best_visible_keys(self, topk, rng):
        self.check(*inputs(rng), topk, rng.integers(0, 10, (2, 5)))

    @pytest.mark.parametrize("keys", [5, 9])
    def test_by_default_the_last_query_sees_all_keys_and_each_earlier_one_a_key_less(
        self, keys, rng
    ):
        q, k, weights = inputs(rng, keys=keys)
        got = run(q, k, weights, keys, self.implementation)
        for t in range(5):
            seen = keys - 5 + t + 1
            assert (np.sort(got[:, t])[:, -seen:] == np.arange(seen)).all()
            assert (np.asarray(got)[:, t, seen:] == -1).all()

    def test_keys_rejected_by_all_heads_tie_and_go_to_the_lowest_position(self, rng):
        q, k, weights = inputs(rng)
        q, k = np.abs(q), -np.abs(k)  # every dot product negative: every score exactly 0
        got = run(q, k, weights, 4, self.implementation, jnp.full((2, 5), 9, jnp.int32))
        np.testing.assert_array_equal(got, np.broadcast_to(np.arange(4), (2, 5, 4)))

    def test_nan_in_invisible_keys_reaches_nothing(self, rng):
        q, k, weights = inputs(rng)
        visible = jnp.full((2, 5), 6, jnp.int32)
        clean = run(q, k, weights, 4, self.implementation, visible)
        k[:, 6:] = np.nan
        np.testing.assert_array_equal(run(q, k, weights, 4, self.implementation, visible), clean)

    def test_the_selection_is_the_set_that_select_mask_gives(self, rng):
        q, k, weights = inputs(rng, keys=30)
        got = run(q, k, weights, 7, self.implementation, jnp.full((2, 5), 30, jnp.int32))
        mask = select_mask_jit(jax.jit(index_scores)(q, k, weights), 7)
        np.testing.assert_array_equal(np.sort(got), np.nonzero(mask)[-1].reshape(2, 5, 7))


class TestXla(Cases):
    implementation = "xla"


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
class TestNative(Cases):
    implementation = "native"


def test_index_scores_equal_the_oracle(rng):
    q, k, weights = inputs(rng, keys=7, heads=16, size=32)
    got = jax.jit(index_scores)(q, k, weights)
    assert got.dtype == jnp.float32
    # float32 sums of 16 * 32 products of size 1: relative error 512 * 2**-24 = 3e-5 at worst.
    np.testing.assert_allclose(got, oracle_scores(q, k, weights), rtol=3e-5, atol=3e-5)


def test_index_scores_of_bfloat16_inputs_are_float32(rng):
    q, k, weights = (jnp.asarray(a, jnp.bfloat16) for a in inputs(rng, heads=4, size=8))
    got = index_scores(q, k, weights)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, oracle_scores(q, k, weights), rtol=3e-5, atol=3e-5)


@pytest.mark.misuse
@pytest.mark.parametrize(
    ("q", "k", "weights", "topk", "message"),
    [
        ((1, 2, 4), (1, 2, 4), (1, 2, 3), 1, r"q must be \[B, T, I, K\].*\(1, 2, 4\)"),
        ((1, 2, 3, 4), (1, 2, 4), (1, 2, 5), 1, r"weights \[B, T, I\]; got .*\(1, 2, 5\)"),
        ((1, 2, 3, 4), (1, 2, 5), (1, 2, 3), 1, r"q and k must share B and K; got .*\(1, 2, 5\)"),
        ((1, 2, 3, 4), (1, 2, 4), (1, 2, 3), 0, r"topk must be >= 1; got 0"),
        ((1, 3, 3, 4), (1, 2, 4), (1, 3, 3), 1, r"3 queries but 2 keys; pass visible="),
    ],
)
def test_arguments_that_do_not_fit_are_named(q, k, weights, topk, message):
    with pytest.raises(ValueError, match=message):
        index_topk(jnp.ones(q), jnp.ones(k), jnp.ones(weights), topk)
