"""Index scores and exact top-k: every backend against NumPy, with ties, plateaus and missing keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels import _pallas, cache_rows, index_topk, index_topk_step, native
from pallas_kernels.index_topk import (
    index_scores,
    mosaic_gpu,
    select_indices,
    select_mask,
    select_positions,
    selection,
    xla,
)
from pallas_kernels.index_topk.config import Config


@functools.partial(jax.jit, static_argnums=1)
def select(scores, topk):
    """All three forms, which compile together."""
    return (
        select_indices(scores, topk),
        select_mask(scores, topk),
        select_positions(scores, topk),
    )


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


ROWS, SIZE, TOPK = 6, 70, (7, 64, 80)  # one shape, so that each number compiles once


def check_selection(scores, topk):
    """Asserts that indices, mask and positions equal the oracle; what is missing to the one shape is not visible."""
    scores = np.asarray(scores, np.float32)
    padded = np.full((ROWS, SIZE), -np.inf, np.float32)
    padded[: scores.shape[0], : scores.shape[1]] = scores
    known = np.where(np.isnan(padded), -np.inf, padded)
    expected = oracle_indices(known, topk)
    indices, mask, positions = select(padded, topk)
    np.testing.assert_array_equal(indices, expected)
    assert indices.dtype == jnp.int32
    chosen = np.zeros(padded.shape, bool)
    for row in range(ROWS):
        chosen[row][expected[row][expected[row] >= 0]] = True
    np.testing.assert_array_equal(mask, chosen)
    np.testing.assert_array_equal(positions, ascending(expected, SIZE))


def ascending(rows, size):
    """Rows of positions in ascending order, -1 after the last."""
    rows = np.sort(np.where(rows < 0, size, rows), -1)
    return np.where(rows == size, -1, rows)


@pytest.fixture(scope="class", params=["cpu", "accelerator", "accelerator, long rows"])
def machine(request):
    """Selections as CPUs and as accelerators make them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "on_accelerator", lambda: request.param != "cpu")
        patch.setattr(selection, "SORTED", 0 if "long" in request.param else selection.SORTED)
        jax.clear_caches()
        yield
    jax.clear_caches()


@pytest.mark.usefixtures("machine")
class TestSelection:
    """The selections that every layer relies on."""

    @pytest.mark.parametrize("topk", TOPK)
    def test_random_scores(self, topk, rng):
        check_selection(rng.standard_normal((ROWS, SIZE)), topk)

    def test_a_plateau_of_zeros_fills_from_the_lowest_position(self):
        check_selection([[0, 0, 5, 0, -1, 0, 0, 2, 0, -3]], 7)
        check_selection(np.zeros((2, SIZE)), 64)

    def test_negative_and_positive_zero_are_equal(self):
        check_selection([[-0.0, 0.0] * 8, [0.0, -0.0] * 8], 7)

    def test_fewer_visible_keys_than_topk_give_minus_one(self):
        scores = np.full((4, 6), -np.inf)
        scores[1, 2], scores[2, [1, 4]], scores[3] = 1.0, -2.0, 0.0
        check_selection(scores, 7)

    def test_nan_and_minus_infinity_are_never_chosen_and_infinity_first(self):
        check_selection([[np.nan, 1.0, -np.inf, np.inf, -1.0, -np.nan, 3e38, -3e38]], 7)

    @given(
        hnp.arrays(
            np.float32, (3, 40), elements=st.sampled_from([-np.inf, -1.0, -0.0, 0.0, 1e-6, 2.0])
        ),
        st.sampled_from(TOPK),
    )
    def test_any_pattern_of_ties(self, scores, topk):
        check_selection(scores, topk)

    @given(
        hnp.arrays(
            np.float32, (2, 9), elements=st.floats(width=32, allow_nan=True, allow_subnormal=False)
        ),
        st.sampled_from(TOPK),
    )
    def test_any_scores(self, scores, topk):
        check_selection(scores, topk)

    @given(hnp.arrays(np.float32, (ROWS, SIZE), elements=st.integers(-2, 2)))
    def test_a_larger_topk_keeps_what_a_smaller_one_chose(self, scores):
        (_, smaller, _), (_, larger, _) = select(scores, 7), select(scores, 64)
        assert (smaller.sum(-1) == 7).all() and (larger.sum(-1) == 64).all()
        assert (larger | ~smaller).all()


@functools.partial(jax.jit, static_argnames=("topk", "implementation"))
def run(q, k, weights, topk, implementation, visible=None):
    return index_topk(q, k, weights, topk, visible=visible, implementation=implementation)


@functools.partial(jax.jit, static_argnums=(6, 9))
def step(q, cached, layer, own, weights, lengths, topk, pages, spans, implementation):
    operands = (q, cached, layer, own, weights, lengths, topk)
    return index_topk_step(*operands, pages=pages, spans=spans, implementation=implementation)


def inputs(rng, batch=2, tokens=5, keys=9, heads=3, size=4):
    """Random q, k, weights; weights have both signs."""
    shapes = ((batch, tokens, heads, size), (batch, keys, size), (batch, tokens, heads))
    return tuple(rng.standard_normal(shape, np.float32) for shape in shapes)


class Cases:
    """What every backend must satisfy; a subclass names the backend and inherits all of it."""

    implementation: str
    heads, size, dtype = 3, 4, "float32"
    step_heads, step_size, page = 16, 8, 4  # a page of so many keys

    def inputs(self, rng, **shapes):
        """Random (q, k, weights) that the backend takes."""
        return inputs(rng, heads=self.heads, size=self.size, **shapes)

    def check(self, q, k, weights, topk, visible):
        """Asserts that the backend selects what the oracle selects."""
        counts = np.asarray(visible)
        scores = oracle_scores(q, k, weights)
        scores[np.arange(k.shape[1]) >= counts[..., None]] = -np.inf
        got = run(q, k, weights, topk, self.implementation, jnp.asarray(counts, jnp.int32))
        np.testing.assert_array_equal(got, oracle_indices(scores, topk))

    def test_ties_across_blocks_of_keys_a_nan_score_and_a_query_that_sees_nothing(self, rng):
        """Exactly representable numbers, of which many scores tie."""
        q, k, weights = (np.round(x) for x in self.inputs(rng, batch=1, tokens=2, keys=130))
        k[0, 1], k[0, 70, 2] = np.nan, np.nan
        self.check(q, k, weights, 40, [[130, 0]])

    @given(st.integers(0, 2**32 - 1), hnp.arrays(np.int32, (2, 5), elements=st.integers(0, 9)))
    def test_what_is_selected_is_distinct_visible_and_no_worse_than_the_rest(self, seed, visible):
        """Of exactly representable numbers. Nor does it depend on a sequence's place in the batch."""
        q, k, weights = (np.round(x) for x in self.inputs(np.random.default_rng(seed)))
        got = np.asarray(run(q, k, weights, 4, self.implementation, visible))
        scores = oracle_scores(q, k, weights)
        for place, count in np.ndenumerate(visible):
            chosen, missing = np.split(got[place], [min(4, count)])
            assert len(np.unique(chosen)) == len(chosen) and (missing == -1).all()
            assert ((chosen >= 0) & (chosen < count)).all()
            others = np.setdiff1d(np.arange(count), chosen)
            least, most = scores[place][chosen], scores[place][others]
            assert least.min(initial=np.inf) >= most.max(initial=-np.inf)
        turned = (a[::-1] for a in (q, k, weights))
        np.testing.assert_array_equal(
            run(*turned, 4, self.implementation, visible[::-1]), got[::-1]
        )

    @pytest.mark.parametrize("topk", [1, 4, 20])
    def test_selects_the_best_visible_keys(self, topk, rng):
        self.check(*self.inputs(rng), topk, rng.integers(0, 10, (2, 5)))

    @pytest.mark.parametrize("keys", [5, 9])
    def test_by_default_the_last_query_sees_all_keys_and_each_earlier_one_a_key_less(
        self, keys, rng
    ):
        q, k, weights = self.inputs(rng, keys=keys)
        got = run(q, k, weights, keys, self.implementation)
        for t in range(5):
            seen = keys - 5 + t + 1
            assert (np.sort(got[:, t])[:, -seen:] == np.arange(seen)).all()
            assert (np.asarray(got)[:, t, seen:] == -1).all()

    def test_keys_rejected_by_all_heads_tie_and_go_to_the_lowest_position(self, rng):
        q, k, weights = self.inputs(rng)
        q, k = np.abs(q), -np.abs(k)  # every dot product negative: every score exactly 0
        got = run(q, k, weights, 4, self.implementation, jnp.full((2, 5), 9, jnp.int32))
        np.testing.assert_array_equal(got, np.broadcast_to(np.arange(4), (2, 5, 4)))

    def test_nan_in_invisible_keys_reaches_nothing(self, rng):
        q, k, weights = self.inputs(rng)
        visible = jnp.full((2, 5), 6, jnp.int32)
        clean = run(q, k, weights, 4, self.implementation, visible)
        k[:, 6:] = np.nan
        np.testing.assert_array_equal(run(q, k, weights, 4, self.implementation, visible), clean)

    def test_a_visible_key_whose_score_is_nan_is_not_chosen(self, rng):
        q, k, weights = self.inputs(rng)
        k[0, 1], k[1, 7, 2] = np.nan, np.nan
        self.check(q, k, weights, 4, np.full((2, 5), 9) - np.arange(5)[None])

    def test_the_selection_is_the_set_that_select_mask_gives(self, rng):
        q, k, weights = self.inputs(rng, keys=30)
        got = run(q, k, weights, 7, self.implementation, jnp.full((2, 5), 30, jnp.int32))
        mask = jax.jit(select_mask, static_argnums=1)(jax.jit(index_scores)(q, k, weights), 7)
        np.testing.assert_array_equal(np.sort(got), np.nonzero(mask)[-1].reshape(2, 5, 7))

    def step_operands(self, rng, dtype, tokens, own):
        """Exactly representable numbers, so that the scores of all backends are the same bits; ``own`` as [B or 1, O]."""

        def whole(*shape):
            return jnp.asarray(rng.integers(-2, 3, shape), jnp.float32)

        def stored(*shape):
            numbers = whole(*shape, self.step_size)
            return cache_rows.encode(numbers, self.step_size, cache_rows.FORMATS[dtype])

        q = whole(3, tokens, self.step_heads, self.step_size).astype(self.dtype)
        lengths = jnp.asarray([3 * self.page, 3 * self.page // 2, 0], jnp.int32)
        cached, own = stored(2, 8, self.page), stored(*own)
        return q, cached, 1, own, whole(3, tokens, self.step_heads), lengths

    def check_step(self, q, cached, layer, own, weights, lengths, spans=None):
        """Asserts that a step over scattered pages selects seven rows as the oracle does."""
        pages = np.asarray([[5, 2, 7], [0, 3, -1], [-1, -1, -1]], np.int32)
        operands = (q, cached, layer, own, weights, lengths, 7, pages, spans)
        got = step(*operands, self.implementation)
        past, mine = (
            np.asarray(cache_rows.decode(a, self.step_size, jnp.float32))
            for a in (cached[layer], own)
        )
        past = past[np.maximum(pages, 0)].reshape(3, -1, self.step_size)
        mine = np.broadcast_to(mine, (3, *mine.shape[1:]))
        scores = oracle_scores(q, np.concatenate([past, mine], 1), weights)
        if spans is None:
            end = np.arange(1, q.shape[1] + 1)
            spans = np.broadcast_to(np.stack([0 * end, end], -1), (3, q.shape[1], 2))
        row = np.arange(scores.shape[2]) - past.shape[1]  # of the step's own
        seen = (spans[..., :1] <= row) & (row < spans[..., 1:])
        in_cache = row + past.shape[1] < np.asarray(lengths)[:, None, None]
        scores[~np.where(row < 0, in_cache, seen)] = -np.inf
        expected = ascending(oracle_indices(scores, 7), scores.shape[2])
        np.testing.assert_array_equal(got, expected)

    @pytest.mark.parametrize("tokens", [1, 3])
    @pytest.mark.parametrize("dtype", ["float32", "fp8"])
    def test_a_step_selects_among_scattered_pages_and_its_own_keys(self, dtype, tokens, rng):
        self.check_step(*self.step_operands(rng, dtype, tokens, own=(3, tokens)))

    @pytest.mark.parametrize("own", [(3, 4), (1, 6)], ids=["of each sequence", "of all"])
    def test_a_query_of_a_step_sees_the_own_keys_in_its_span(self, own, rng):
        first = rng.integers(0, own[1], (3, 2, 1), np.int32)
        spans = np.concatenate([first, rng.integers(first, own[1] + 1, dtype=np.int32)], -1)
        spans[0, 0] = 2, 2  # none
        dtype = jnp.dtype(self.dtype).name
        self.check_step(*self.step_operands(rng, dtype, 2, own), spans)

    def test_temporary_memory_does_not_grow_with_the_context(self):
        """Peak is O(T k) and a bounded tile of scores, not O(T S)."""

        def temporary(keys):
            shapes = ((1, 256, 4, 8), (1, keys, 8), (1, 256, 4))
            f = functools.partial(index_topk, topk=16, implementation=self.implementation)
            compiled = jax.jit(f).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
            return compiled.compile().memory_analysis().temp_size_in_bytes

        short, long = temporary(2**15), temporary(2**17)
        scores = 4 * 256 * 2**17
        assert long < scores / 2, f"{long} bytes; all scores would be {scores}"
        assert long < 1.5 * short + 2**22, f"{short} bytes at a quarter of the context, {long} now"


class TestXla(Cases):
    implementation = "xla"

    @pytest.mark.parametrize("own", ["of each sequence", "of all"])
    def test_sequences_are_taken_some_at_a_time_if_all_have_too_many_scores(
        self, own, rng, monkeypatch
    ):
        q, k, weights = map(jnp.asarray, inputs(rng, batch=5, tokens=2))
        own = k[:, :2] if own == "of each sequence" else k[:1, :3]
        own = 0.7 * own  # no ties with the others
        spans = jnp.asarray(rng.integers(0, own.shape[1] + 1, (5, 2, 2)), jnp.int32)
        lengths, visible = (jnp.asarray(rng.integers(0, 10, n), jnp.int32) for n in (5, (5, 2)))

        def both(by):
            rows = index_topk(q, k, weights, 4, visible=visible, implementation=by)
            operands = (q, k[None], 0, own, weights, lengths, 4)
            return rows, index_topk_step(*operands, spans=spans, implementation=by)

        expected = both("reference")
        monkeypatch.setattr(
            xla, "scores_at_once", lambda: 2 * 2 * 12
        )  # 2 sequences, then 2, then 1
        for got, other in zip(both("xla"), expected, strict=True):
            np.testing.assert_array_equal(got, other)

    @pytest.mark.parametrize(("batch", "tokens", "keys"), [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
    def test_nothing_to_select_is_no_error(self, batch, tokens, keys, rng):
        q, k, weights = map(jnp.asarray, inputs(rng, batch, tokens, keys))
        visible = jnp.zeros((batch, tokens), jnp.int32)
        got = index_topk(q, k, weights, 2, visible=visible, implementation="xla")
        np.testing.assert_array_equal(got, np.full((batch, tokens, min(2, keys)), -1))
        operands = (q, k[None], 0, jnp.zeros((batch, tokens, 4)), weights)
        if keys + tokens >= 2:
            rows = index_topk_step(*operands, jnp.zeros(batch, jnp.int32), 2, implementation="xla")
            assert rows.shape == (batch, tokens, 2)


class TestReference(Cases):
    implementation = "reference"
    test_temporary_memory_does_not_grow_with_the_context = None  # It has all scores at once.


class Simulated(Cases):
    """Fewer examples: a call takes a tenth of a second."""

    @settings(max_examples=3)
    @given(st.integers(0, 2**32 - 1), hnp.arrays(np.int32, (2, 5), elements=st.integers(0, 9)))
    def test_what_is_selected_is_distinct_visible_and_no_worse_than_the_rest(self, seed, visible):
        inherited = Cases.test_what_is_selected_is_distinct_visible_and_no_worse_than_the_rest
        inherited.hypothesis.inner_test(self, seed, visible)


@pytest.mark.skipif(jax.default_backend() == "tpu", reason="refused there")
class TestMosaicGpu(Simulated):
    """In several tiles of queries, splits and chunks of keys, and rows that shared memory does not hold."""

    implementation = "mosaic_gpu"
    heads, size, dtype = 64, 64, jnp.bfloat16
    step_heads, step_size, page = 64, 64, 64
    sizes = Config(
        queries=1, together=1, warpgroups=1, split=64, chunk=128, resident=128, scores=256
    )
    # That of the simulator says nothing: test_scores_of_a_large_batch_do_not_exist_at_once.
    test_temporary_memory_does_not_grow_with_the_context = None

    @pytest.fixture(autouse=True)
    def chosen(self, monkeypatch):
        monkeypatch.setattr(mosaic_gpu, "chosen", lambda *_: self.sizes)

    def inputs(self, rng, **shapes):
        """Exactly representable, also their sums, however the kernel orders them."""
        q, k, weights = (np.round(x) for x in super().inputs(rng, **shapes))
        return q.astype(self.dtype), k.astype(self.dtype), weights

    def test_a_visible_key_whose_score_is_nan_is_not_chosen(self, rng):
        if jax.default_backend() == "cpu":
            pytest.skip(
                "XLA fuses the simulator's maximum on CPU to one that drops NaN; a GPU's keeps it"
            )
        super().test_a_visible_key_whose_score_is_nan_is_not_chosen(rng)

    @pytest.mark.parametrize("tokens", [1, 3])
    @pytest.mark.parametrize("dtype", ["bfloat16"])
    def test_a_step_selects_among_scattered_pages_and_its_own_keys(self, dtype, tokens, rng):
        super().test_a_step_selects_among_scattered_pages_and_its_own_keys(dtype, tokens, rng)


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
class TestNative(Cases):
    implementation = "native"


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="refused there")
class TestMosaicTpu(Simulated):
    """Fewer of the cases than elsewhere: in the simulator each shape takes seconds to compile."""

    implementation = "mosaic_tpu"
    test_a_query_of_a_step_sees_the_own_keys_in_its_span = None  # It refuses steps: see below.

    @pytest.mark.slow
    def test_the_selection_is_the_set_that_select_mask_gives(self, rng):
        super().test_the_selection_is_the_set_that_select_mask_gives(rng)

    @pytest.mark.slow
    def test_temporary_memory_does_not_grow_with_the_context(self):
        super().test_temporary_memory_does_not_grow_with_the_context()

    @pytest.mark.parametrize("topk", [4, 20])
    def test_selects_the_best_visible_keys(self, topk, rng):
        super().test_selects_the_best_visible_keys(topk, rng)

    @pytest.mark.parametrize("keys", [9])
    def test_by_default_the_last_query_sees_all_keys_and_each_earlier_one_a_key_less(
        self, keys, rng
    ):
        super().test_by_default_the_last_query_sees_all_keys_and_each_earlier_one_a_key_less(
            keys, rng
        )

    @pytest.mark.parametrize("dtype", ["float32"])
    @pytest.mark.parametrize("tokens", [1])
    def test_a_step_selects_among_scattered_pages_and_its_own_keys(self, dtype, tokens, rng):
        with pytest.raises(NotImplementedError, match="neither pages nor a step's own"):
            super().test_a_step_selects_among_scattered_pages_and_its_own_keys(dtype, tokens, rng)

    def test_several_blocks_of_keys_with_ties_across_them(self, rng):
        """Exactly representable numbers: many equal scores, and queries that see one block, all, or nothing."""
        q, k, weights = (np.round(x) for x in inputs(rng, batch=1, tokens=9, keys=4200, heads=2))
        self.check(q, k, weights, 600, [[4200, 4096, 513, 512, 511, 1, 0, 90, 4199]])


@pytest.mark.parametrize(("tokens", "keys"), [(4096, 65536), (5, 100)])
def test_the_tpu_kernel_lowers_at_real_sizes(tokens, keys, monkeypatch):
    monkeypatch.setattr(_pallas, "interpret_tpu", lambda: False)
    shapes = ((1, tokens, 64, 128), (1, keys, 128), (1, tokens, 64))
    operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    device = jax.sharding.AbstractDevice("TPU v5p", 1, "tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    f = functools.partial(index_topk, topk=2048, implementation="mosaic_tpu")
    with jax.sharding.use_abstract_mesh(mesh):
        exported = jax.export.export(jax.jit(f), platforms=["tpu"])(*operands)
    assert exported.out_avals[0].shape == (1, tokens, min(keys, 2048))


def test_mosaic_tpu_refuses_more_scores_than_vector_memory_holds():
    q, k, weights = jnp.ones((1, 1, 1, 1)), jnp.ones((1, 2**18 + 1, 1)), jnp.ones((1, 1, 1))
    with pytest.raises(NotImplementedError, match="scores of 262144 keys; got 262145"):
        index_topk(q, k, weights, 1, implementation="mosaic_tpu")


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
        ((1, 2, 3, 4), (1, 2, 4), (1, 2, 3), 0, r"topk must be at least 1; got 0"),
        ((1, 3, 3, 4), (1, 2, 4), (1, 3, 3), 1, r"3 queries but 2 keys; pass visible="),
    ],
)
def test_arguments_that_do_not_fit_are_named(q, k, weights, topk, message):
    with pytest.raises(ValueError, match=message):
        index_topk(jnp.ones(q), jnp.ones(k), jnp.ones(weights), topk)


@pytest.mark.misuse
def test_queries_and_keys_of_different_dtypes_are_named():
    q, k = jnp.ones((1, 1, 2, 4)), jnp.ones((1, 3, 4), jnp.bfloat16)
    with pytest.raises(TypeError, match="q is float32 but k is bfloat16; cast one"):
        index_topk(q, k, jnp.ones((1, 1, 2)), 1)
