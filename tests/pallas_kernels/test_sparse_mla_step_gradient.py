"""The gradient of a step of sparse attention: that of the gathered form, in memory that doesn't grow with the gathered rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cache_rows, native, sparse_mla_step
from pallas_kernels.sparse_mla import addresses, chunks, reference

SCALE = 0.3
SIZE, VALUES = 12, 8
needs_compiler = pytest.mark.skipif(not native.available(), reason="no C++ compiler")
BACKENDS = ["xla", pytest.param("native", marks=needs_compiler)]


def loss(attend, q, cached, own, cotangents):
    out, lse = attend(q, cached, own)
    lse = jnp.where(jnp.isfinite(lse), lse, 0.0)
    return (out * cotangents[0]).sum() + (lse * cotangents[1]).sum()


def problem(rng, own_sequences, stored):
    """(q, cached [2, 6, 4], own, rows, pages): scattered pages, gaps, and a query without rows."""

    def random(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    def encode(x):
        return cache_rows.encode(x, VALUES, cache_rows.FORMATS[stored])

    order = np.argsort(rng.random((2, 3, 11)), axis=-1)[..., :7]
    rows = np.where(rng.random(order.shape) < 0.2, -1, order).astype(np.int32)
    rows[1, (rows[1] >= 4) & (rows[1] < 8)] = -1  # on the page that is not there
    rows[1, 2] = -1
    pages = jnp.asarray([[5, 0], [2, -1]], jnp.int32)
    own = encode(random(own_sequences, 3, SIZE))
    return random(2, 3, 5, SIZE), encode(random(2, 6, 4, SIZE)), own, jnp.asarray(rows), pages


@pytest.mark.parametrize(
    ("stored", "own_sequences", "chunk_queries"),
    [("float32", 2, 6), ("float32", 1, 4), ("bfloat16", 2, 4)],
)
@pytest.mark.parametrize("implementation", BACKENDS)
def test_equals_that_of_the_gathered_form(
    rng, monkeypatch, implementation, stored, own_sequences, chunk_queries
):
    q, cached, own, rows, pages = problem(rng, own_sequences, stored)
    monkeypatch.setattr(chunks, "CACHED_BYTES", chunk_queries * 4 * rows.shape[2] * SIZE)
    shapes = q.shape[:3] + (VALUES,), q.shape[:3]
    cotangents = [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]

    def gathered(q, cached, own):
        table = addresses.of_step(cached, 1, own, rows, pages)
        return reference._attend_rows(q, table, SCALE, VALUES)

    def ours(q, cached, own):
        how = {"scale": SCALE, "value_dim": VALUES, "implementation": implementation}
        return sparse_mla_step(q, cached, 1, own, rows, pages=pages, **how)

    got, expected = (
        jax.jit(jax.grad(functools.partial(loss, attend), (0, 1, 2)))(q, cached, own, cotangents)
        for attend in (ours, gathered)
    )
    for a, b, operand in zip(got, expected, (q, cached, own), strict=True):
        assert a.dtype == operand.dtype and np.asarray(b).any()
        # Sums over at most 7 rows of numbers of size 1; those of stored rows rounded to their 8 bits, there once per query.
        close = {"rtol": 1e-5, "atol": 1e-5} if a.dtype == jnp.float32 else {"atol": 0.05}
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), **close)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_of_rows_stored_as_bytes_goes_to_the_queries_alone(rng, implementation):
    q, cached, own, rows, pages = problem(rng, 2, "fp8")
    decode = functools.partial(cache_rows.decode, values=VALUES, dtype=jnp.float32)
    how = {"scale": SCALE, "value_dim": VALUES, "implementation": implementation}

    def total(q, cached, own):
        out, lse = sparse_mla_step(q, cached, 1, own, rows, pages=pages, **how)
        return (out**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0.0).sum()

    got = jax.jit(jax.grad(total, (0, 1, 2), allow_int=True))(q, cached, own)
    expected = jax.jit(jax.grad(total))(q, decode(cached), decode(own))
    np.testing.assert_allclose(got[0], expected, rtol=1e-5, atol=1e-5)
    assert got[1].dtype == got[2].dtype == jax.dtypes.float0


@pytest.mark.parametrize("implementation", BACKENDS)
def test_without_rows_of_its_own_and_with_a_traced_layer(rng, implementation):
    q, cached, _, rows, pages = problem(rng, 2, "float32")
    rows, own = jnp.where(rows < 8, rows, -1), jnp.zeros((2, 0, SIZE))
    how = {"scale": SCALE, "value_dim": VALUES, "pages": pages, "implementation": implementation}

    @jax.jit
    def gradients(layer):
        def total(cached, own):
            return (sparse_mla_step(q, cached, layer, own, rows, **how)[0] ** 2).sum()

        return jax.grad(total, (0, 1))(cached, own)

    d_cached, d_own = gradients(jnp.int32(1))
    assert d_own.shape == own.shape
    assert np.asarray(d_cached[1]).any() and not np.asarray(d_cached[0]).any()


@pytest.mark.parametrize("implementation", BACKENDS)
def test_memory_does_not_follow_the_gathered_rows(implementation):
    heads, size, columns = 8, 64, 256

    def temporary_bytes(tokens):
        def total(q, cached, own, rows):
            how = {"scale": SCALE, "value_dim": 48, "implementation": implementation}
            return sparse_mla_step(q, cached, 0, own, rows, **how)[0].sum()

        shapes = (1, tokens, heads, size), (1, 1, 1024, size), (1, tokens, size)
        operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        rows = jax.ShapeDtypeStruct((1, tokens, columns), jnp.int32)
        compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(*operands, rows).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    of_rows = 4 * columns * size  # a query's
    few, many = temporary_bytes(128), temporary_bytes(512)
    # Its own arrays do grow: q, out, the gradients of both, and numbers of rows; those are below a tenth of its rows.
    assert many - few < 0.15 * (512 - 128) * of_rows
