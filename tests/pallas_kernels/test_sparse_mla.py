"""Sparse latent attention: every backend against a loop in float64 NumPy, and its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels import merge_partials, native, sparse_mla, sparse_mla_step
from pallas_kernels.sparse_mla import addresses, chunks

SCALE = 0.3
# Sums over at most 12 rows of 8 float32 numbers of size 1.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
# Softmax weights and results are rounded to 8 bits; up to two of the rows' 192 numbers of size 1 in a result.
BFLOAT16 = {"rtol": 1e-2, "atol": 2e-2}


def oracle(q, kv, indices, value_dim):
    """(out, lse) in float64, one query and head at a time."""
    q, kv = np.asarray(q, np.float64), np.asarray(kv, np.float64)
    out, lse = np.zeros((*q.shape[:3], value_dim)), np.full(q.shape[:3], -np.inf)
    for b, t, h in np.ndindex(*q.shape[:3]):
        rows = kv[b, indices[b, t][indices[b, t] >= 0]]
        if len(rows):
            weight = np.exp(SCALE * rows @ q[b, t, h])
            out[b, t, h] = weight @ rows[:, :value_dim] / weight.sum()
            lse[b, t, h] = np.log(weight.sum())
    return out, lse


def masked_dense(q, kv, indices, value_dim):
    """(out, lse), the latter 0 without rows: a masked softmax over all rows, for gradients; nothing gathered."""
    q, kv = q.astype(jnp.float32), kv.astype(jnp.float32)
    chosen = (indices[..., None] == jnp.arange(kv.shape[1])[None, None, None]).any(2)[:, :, None]
    logits = SCALE * jnp.einsum("bthc,bsc->bths", q, kv, precision="highest")
    weight = jnp.where(chosen, jnp.exp(logits), 0.0)
    total = weight.sum(-1)
    out = jnp.einsum("bths,bsv->bthv", weight, kv[..., :value_dim], precision="highest")
    total = jnp.where(total > 0, total, 1.0)
    return out / total[..., None], jnp.log(total)


@functools.partial(jax.jit, static_argnames=("value_dim", "implementation"))
def run(q, kv, indices, value_dim, implementation):
    return sparse_mla(
        q, kv, indices, scale=SCALE, value_dim=value_dim, implementation=implementation
    )


@functools.partial(jax.jit, static_argnames=("value_dim", "implementation"))
def gradients(q, kv, indices, cotangents, value_dim, implementation):
    """(dq, dkv) of output and log denominator, by the backend or, for None, by the masked dense form."""

    def loss(q, kv):
        if implementation is None:
            results = masked_dense(q, kv, indices, value_dim)
        else:
            results = run(q, kv, indices, value_dim, implementation)
        return weighted(results, cotangents)

    return jax.grad(loss, (0, 1))(q, kv)


def weighted(results, cotangents):
    """Sum of out and of lse where it is finite, each times its cotangent."""
    (out, lse), (d_out, d_lse) = results, cotangents
    lse = jnp.where(jnp.isfinite(lse), lse, 0.0)
    return (out.astype(jnp.float32) * d_out).sum() + (lse * d_lse).sum()


@functools.partial(jax.jit, static_argnames=("value_dim", "implementation"))
def run_step(q, cached, own, rows, pages, value_dim, implementation):
    """A step on the second layer."""
    how = {"scale": SCALE, "value_dim": value_dim, "implementation": implementation}
    return sparse_mla_step(q, cached, 1, own, rows, pages=pages, **how)


def random_cotangents(rng, q, value_dim):
    """Of (out, lse), float32."""
    return tuple(rng.standard_normal((*q.shape[:3], *n), np.float32) for n in ((value_dim,), ()))


@functools.partial(jax.jit, static_argnames=("value_dim", "implementation"))
def step_gradients(q, cached, own, rows, pages, cotangents, value_dim, implementation):
    """Gradients of a step on the second layer in q, cached and own, by the backend or, for None, by the masked dense form."""

    def loss(q, cached, own):
        if implementation is None:
            past = cached[1][jnp.maximum(pages, 0)].reshape(q.shape[0], -1, q.shape[3])
            mine = jnp.broadcast_to(own, (q.shape[0], *own.shape[1:]))
            results = masked_dense(q, jnp.concatenate([past, mine], 1), rows, value_dim)
        else:
            results = run_step(q, cached, own, rows, pages, value_dim, implementation)
        return weighted(results, cotangents)

    return jax.grad(loss, (0, 1, 2))(q, cached, own)


def random_indices(rng, batch, tokens, columns, rows, missing):
    """Distinct rows per query in any order, some replaced by -1."""
    order = np.argsort(rng.random((batch, tokens, rows)), axis=-1)[..., :columns]
    return np.where(rng.random(order.shape) < missing, -1, order).astype(np.int32)


# name -> (batch, tokens, heads, rows, size, value size, columns of indices, share of -1)
CASES = {
    "odd sizes": (2, 3, 5, 11, 7, 5, 4, 0.0),
    "some missing": (2, 3, 5, 11, 7, 5, 6, 0.5),
    "all rows": (1, 2, 1, 6, 8, 8, 6, 0.0),
    "one row each": (2, 3, 2, 11, 7, 5, 1, 0.0),
    "fewer rows than columns": (2, 3, 5, 4, 7, 1, 4, 0.6),
    "one query": (1, 1, 2, 11, 7, 5, 6, 0.3),
}


OWN = pytest.mark.parametrize("sets", [2, 1], ids=["own rows of each", "own rows of all"])


class Cases:
    """What every backend must satisfy; a subclass names the backend and inherits all of it."""

    implementation: str
    dtype = jnp.float32
    tolerance = FLOAT32
    widths: tuple[int, int] | None = None  # (size, value size) instead of a case's
    step_tokens = 3

    def random(self, rng, *shape):
        return rng.standard_normal(shape, np.float32).astype(self.dtype)

    def assert_close(self, got, expected):
        """Up to the tolerance, the absolute one relative to the largest number if that is above 1."""
        got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
        largest = np.abs(expected[np.isfinite(expected)]).max(initial=1.0)
        tolerance = {**self.tolerance, "atol": self.tolerance["atol"] * largest}
        np.testing.assert_allclose(got, expected, **tolerance)

    def arrays(self, rng, case):
        """(q, kv, indices, value_dim) of a case."""
        batch, tokens, heads, rows, size, value_dim, columns, missing = CASES[case]
        size, value_dim = self.widths or (size, value_dim)
        q = self.random(rng, batch, tokens, heads, size)
        kv = self.random(rng, batch, rows, size)
        return q, kv, random_indices(rng, batch, tokens, columns, rows, missing), value_dim

    @pytest.mark.parametrize("case", list(CASES))
    def test_output_and_log_denominator_equal_the_oracle(self, case, rng):
        arrays = self.arrays(rng, case)
        out, lse = run(*arrays, self.implementation)
        expected_out, expected_lse = oracle(*arrays)
        self.assert_close(out, expected_out)
        self.assert_close(lse, expected_lse)
        assert lse.dtype == jnp.float32

    @pytest.mark.parametrize("case", list(CASES))
    def test_gradients_equal_those_of_masked_dense_attention(self, case, rng):
        q, kv, indices, value_dim = self.arrays(rng, case)
        cotangents = random_cotangents(rng, q, value_dim)
        got = gradients(q, kv, indices, cotangents, value_dim, self.implementation)
        for a, b in zip(got, gradients(q, kv, indices, cotangents, value_dim, None), strict=True):
            self.assert_close(a, b)

    def step_arrays(self, rng, sets):
        """(q, cached, own, rows, pages, value_dim): rows on scattered pages and ``sets`` of the step's own, gaps, a query without any."""
        size, value_dim = self.widths or (7, 5)
        q = self.random(rng, 2, self.step_tokens, 5, size)
        own = self.random(rng, sets, 3, size)
        cached, pages = self.random(rng, 2, 6, 4, size), np.array([[5, 0], [2, -1]], np.int32)
        rows = random_indices(rng, 2, self.step_tokens, 6, 11, 0.2)
        rows[1, (rows[1] >= 4) & (rows[1] < 8)] = -1  # on the page that is not there
        rows[1, 2:] = -1
        return q, cached, own, rows, pages, value_dim

    @OWN
    def test_a_step_equals_the_oracle(self, sets, rng):
        q, cached, own, rows, pages, value_dim = arrays = self.step_arrays(rng, sets)
        past = cached[1][np.maximum(pages, 0)].reshape(2, -1, cached.shape[3])
        every = np.concatenate([past, np.broadcast_to(own, (2, *own.shape[1:]))], 1)
        got = run_step(*arrays, self.implementation)
        for a, b in zip(got, oracle(q, every, rows, value_dim), strict=True):
            self.assert_close(a, b)

    @OWN
    def test_gradients_of_a_step_equal_those_of_masked_dense_attention(self, sets, rng):
        *arrays, value_dim = self.step_arrays(rng, sets)
        arrays = (*arrays, random_cotangents(rng, arrays[0], value_dim), value_dim)
        got = step_gradients(*arrays, self.implementation)
        for a, b in zip(got, step_gradients(*arrays, None), strict=True):
            assert np.asarray(b).any()
            self.assert_close(a, b)

    def test_a_query_without_rows_gives_zeros_and_minus_infinity_and_no_gradient(self, rng):
        q, kv, indices, value_dim = self.arrays(rng, "odd sizes")
        indices[0, 1] = -1
        out, lse = run(q, kv, indices, value_dim, self.implementation)
        assert not np.asarray(out[0, 1]).any() and np.isneginf(lse[0, 1]).all()
        ones = np.ones(out.shape, np.float32), np.ones(lse.shape, np.float32)
        dq, dkv = gradients(q, kv, indices, ones, value_dim, self.implementation)
        assert not np.asarray(dq[0, 1]).any() and np.isfinite(np.asarray(dkv, np.float32)).all()

    def test_the_order_of_the_indices_and_where_the_gaps_are_do_not_matter(self, rng):
        q, kv, indices, value_dim = self.arrays(rng, "some missing")
        shuffled = rng.permuted(indices, axis=-1)
        for a, b in zip(
            run(q, kv, indices, value_dim, self.implementation),
            run(q, kv, shuffled, value_dim, self.implementation),
            strict=True,
        ):
            self.assert_close(a, b)

    def test_nan_in_rows_not_chosen_reaches_nothing(self, rng):
        q, kv, indices, value_dim = self.arrays(rng, "some missing")
        indices[indices == 0] = -1  # row 0 too: gaps must not read it
        unused = [[r for r in range(11) if r not in indices[b]] for b in range(2)]
        assert (indices == -1).any() and all(0 in rows for rows in unused)
        cotangents = random_cotangents(rng, q, value_dim)
        clean = run(q, kv, indices, value_dim, self.implementation)
        clean_gradients = gradients(q, kv, indices, cotangents, value_dim, self.implementation)
        for b, rows in enumerate(unused):
            kv[b, rows] = np.nan
        dirty = run(q, kv, indices, value_dim, self.implementation)
        dirty_gradients = gradients(q, kv, indices, cotangents, value_dim, self.implementation)
        for a, b in zip((*clean, *clean_gradients), (*dirty, *dirty_gradients), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_large_logits_do_not_overflow(self, rng):
        q, kv, indices, value_dim = self.arrays(rng, "odd sizes")
        q = (1000 * q.astype(np.float32)).astype(q.dtype)
        out, lse = run(q, kv, indices, value_dim, self.implementation)
        assert (
            np.isfinite(np.asarray(out, np.float32)).all()
            and np.isfinite(lse).all()
            and np.abs(lse).max() > 100
        )

    @given(hnp.arrays(np.int8, (8,), elements=st.integers(0, 2)))
    def test_parts_over_disjoint_rows_merge_into_the_joint_softmax(self, owner):
        rng = np.random.default_rng(1)
        size, value_dim = self.widths or (4, 3)
        q = self.random(rng, 1, 2, 3, size)
        kv = self.random(rng, 1, 8, size)
        every = np.broadcast_to(np.arange(8, dtype=np.int32), (1, 2, 8))
        joint = run(q, kv, every, value_dim, self.implementation)
        parts = [
            run(q, kv, np.where(owner == part, every, -1), value_dim, self.implementation)
            for part in range(3)
        ]
        for a, b in zip(merge_partials(parts), joint, strict=True):
            self.assert_close(a, b)


class TestXla(Cases):
    implementation = "xla"


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
class TestNative(Cases):
    implementation = "native"


@pytest.mark.skipif(jax.default_backend() == "tpu", reason="a Hopper kernel")
class TestMosaicGpu(Cases):
    """In the simulator, whose time goes by blocks of threads (a query each), most of it is slow: ``slow_cases.txt``."""

    implementation = "mosaic_gpu"
    dtype = jnp.bfloat16
    tolerance = BFLOAT16
    widths = 192, 128
    step_tokens = 1 if jax.default_backend() == "cpu" else 3


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a TPU kernel")
class TestMosaicTpu(Cases):
    implementation = "mosaic_tpu"


@pytest.mark.parametrize("implementation", [None, "xla", "native"])
def test_no_columns_of_indices_give_zeros_and_minus_infinity_and_no_gradient(implementation, rng):
    if implementation == "native" and not native.available():
        pytest.skip("no C++ compiler")
    q, kv, _, value_dim = Cases().arrays(rng, "odd sizes")
    attend = functools.partial(
        run,
        indices=np.zeros((2, 3, 0), np.int32),
        value_dim=value_dim,
        implementation=implementation,
    )
    (out, lse), pullback = jax.vjp(attend, q, kv)
    assert out.shape == (2, 3, 5, value_dim) and not np.asarray(out).any()
    assert lse.shape == (2, 3, 5) and np.isneginf(lse).all()
    for gradient in pullback((jnp.ones_like(out), jnp.ones_like(lse))):
        assert not np.asarray(gradient).any()


def test_merging_only_empty_parts_gives_zeros_and_minus_infinity():
    empty = jnp.zeros((2, 3)), jnp.full(2, -jnp.inf)
    out, lse = merge_partials([empty, empty])
    assert not np.asarray(out).any() and np.isneginf(lse).all()


def test_merging_one_part_changes_nothing(rng):
    part = jnp.asarray(rng.standard_normal((2, 3), np.float32)), jnp.asarray([-1.5, 200.0])
    for a, b in zip(merge_partials([part]), part, strict=True):
        np.testing.assert_allclose(a, b, **FLOAT32)


def test_gradients_do_not_depend_on_how_many_queries_are_taken_at_a_time(rng, monkeypatch):
    q, kv, indices, value_dim = Cases().arrays(rng, "some missing")
    cotangents = random_cotangents(rng, q, value_dim)
    whole = gradients(q, kv, indices, cotangents, value_dim, "xla")
    monkeypatch.setattr(chunks, "CACHED_BYTES", 4 * 4 * indices.shape[2] * q.shape[3])
    jax.clear_caches()
    pieces = gradients(q, kv, indices, cotangents, value_dim, "xla")
    jax.clear_caches()
    for a, b in zip(pieces, whole, strict=True):
        np.testing.assert_allclose(a, b, **FLOAT32)


def test_memory_of_a_gradient_follows_the_chunk_and_not_the_queries(monkeypatch):
    monkeypatch.setattr(chunks, "CACHED_BYTES", chunks.GATHERED_BYTES)

    def temporary_bytes(tokens):
        shapes = [(1, tokens, 4, 64), (1, 4096, 64), (1, tokens, 1024)]
        arrays = [
            jax.ShapeDtypeStruct(shape, kind)
            for shape, kind in zip(shapes, (jnp.float32, jnp.float32, jnp.int32), strict=True)
        ]

        def loss(q, kv, indices):
            return sparse_mla(q, kv, indices, scale=SCALE, value_dim=32, implementation="xla")[
                0
            ].sum()

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    gathered = 8192 * 1024 * 64 * 4
    assert gathered > 6 * chunks.GATHERED_BYTES
    assert temporary_bytes(8192) < min(1.2 * temporary_bytes(4096), gathered)


@pytest.mark.misuse
@pytest.mark.parametrize(
    ("q", "kv", "indices", "value_dim", "message"),
    [
        ((2, 3, 4), (2, 5, 4), (2, 3, 1), 2, r"q must be \[B, T, H, C\].*\(2, 3, 4\)"),
        ((2, 3, 1, 4), (2, 5, 6), (2, 3, 1), 2, r"B, T and C must agree; got q .*\(2, 5, 6\)"),
        ((2, 3, 1, 4), (2, 5, 4), (2, 7, 1), 2, r"B, T and C must agree; .*\(2, 7, 1\)"),
        ((2, 3, 1, 4), (2, 5, 4), (2, 3, 1), 5, r"value_dim must be from 1 to 4; got 5"),
        ((2, 3, 1, 4), (2, 5, 4), (2, 3, 1), 0, r"value_dim must be from 1 to 4; got 0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(q, kv, indices, value_dim, message):
    with pytest.raises(ValueError, match=message):
        sparse_mla(
            jnp.ones(q), jnp.ones(kv), jnp.zeros(indices, jnp.int32), scale=1.0, value_dim=value_dim
        )


@pytest.mark.misuse
@pytest.mark.parametrize(
    ("q", "kv"), [(jnp.float32, jnp.bfloat16), (jnp.float32, jnp.uint8), (jnp.uint8, jnp.uint8)]
)
def test_types_that_do_not_fit_are_named_with_a_way_out(q, kv):
    indices = jnp.zeros((2, 3, 1), jnp.int32)
    message = f"one floating dtype; got {q.__name__} and {kv.__name__}. Cast one, and decode"
    with pytest.raises(TypeError, match=message):
        sparse_mla(
            jnp.ones((2, 3, 1, 4), q), jnp.ones((2, 5, 4), kv), indices, scale=1.0, value_dim=2
        )


def test_more_rows_than_32_bits_number_are_refused():
    shape = jax.ShapeDtypeStruct
    indices = shape((2, 1, 3), jnp.int32)
    with pytest.raises(NotImplementedError, match=f"32 bits; got {2**31}"):
        jax.eval_shape(addresses.of_sequences, shape((2, 2**30, 4), jnp.float32), indices)
    cached, own = shape((1, 2, 2**30 - 1, 4), jnp.float32), shape((2, 1, 4), jnp.float32)
    with pytest.raises(NotImplementedError, match=f"32 bits; got {2**31}"):
        jax.eval_shape(lambda *x: addresses.of_step(x[0], 0, *x[1:], None), cached, own, indices)
