"""The C++ kernels: built once, refused with a reason, equal to XLA's results, and independent of the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    Sefp,
    cache_rows,
    grouped_matmul,
    index_topk,
    index_topk_step,
    native,
    sefp_matmul,
    sparse_mla_step,
)

needs_compiler = pytest.mark.skipif(not native.available(), reason="no C++ compiler")


refusal = native._register  # as asked in a new process


@needs_compiler
def test_the_library_is_built_once_and_then_found(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled = []
    compile_ = native._compile
    monkeypatch.setattr(native, "_compile", lambda *a: (compiled.append(a), compile_(*a)))
    compiler = [native.shutil.which("c++")]
    path = native._built(compiler)
    assert native._built(compiler) == path and len(compiled) == 1
    assert list((tmp_path / "jaxmoe" / "native").iterdir()) == [path]


@pytest.mark.parametrize("compiler", ["false", "/does/not/exist"])
def test_a_compiler_that_fails_is_a_refusal_with_a_reason(monkeypatch, tmp_path, compiler):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    assert compiler in refusal()


@needs_compiler
def test_what_the_compiler_says_is_in_the_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_FLAGS", [*native._FLAGS, "-no-such-flag"])
    assert "no-such-flag" in refusal()
    assert not list((tmp_path / "jaxmoe" / "native").iterdir())


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="refused for another reason there")
def test_without_a_compiler_the_default_is_xla_and_the_name_refuses(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    monkeypatch.setattr(native, "_refusal", refusal)
    x, w, sizes = jnp.ones((2, 3)), jnp.ones((1, 3, 2)), jnp.array([2], jnp.int32)
    np.testing.assert_array_equal(grouped_matmul(x, w, sizes), 3.0)
    with pytest.raises(NotImplementedError, match="no C\\+\\+ compiler"):
        grouped_matmul(x, w, sizes, implementation="native")


# 5 and 8 rows are few; 13 and 300 are packed, in one block of rows or several; 1100 is more than one inner block.
@needs_compiler
@pytest.mark.parametrize("columns", [5, 256, 700])
@pytest.mark.parametrize(("rows", "inner"), [(5, 37), (8, 1100), (13, 37), (300, 37), (13, 1100)])
def test_a_row_is_the_same_bit_for_bit_whoever_shares_its_group(rng, rows, inner, columns):
    x = jnp.asarray(rng.standard_normal((rows, inner)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((3, inner, columns)), jnp.float32)
    together = grouped_matmul(x, w, jnp.array([0, rows, 0], jnp.int32), implementation="native")
    for r in range(0, rows, max(1, rows // 13)):
        alone = grouped_matmul(
            x[r : r + 1], w[1:2], jnp.ones(1, jnp.int32), implementation="native"
        )
        np.testing.assert_array_equal(together[r], alone[0])


@functools.partial(jax.jit, static_argnames="implementation")
def _attend(q, keys, own_keys, weights, queries, cached, own, lengths, layer, implementation):
    rows = index_topk_step(
        q, keys, layer, own_keys, weights, lengths, 9, implementation=implementation
    )
    out, lse = sparse_mla_step(
        *(queries, cached, layer, own, rows),
        scale=0.3,
        value_dim=10,
        implementation=implementation,
    )
    return rows, out, lse


@needs_compiler
@pytest.mark.parametrize("heads", [1, 16, 19])
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("dtype", cache_rows.FORMATS)
def test_a_step_equals_xla_s_over_ragged_caches_with_nan_beyond_them(rng, tokens, heads, dtype):
    def random(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    lengths = np.array([0, 3, 11, 40], np.int32)
    keys, cached = random(3, 4, 40, 24), random(3, 4, 40, 13)
    for b, length in enumerate(lengths):
        keys[:, b, length:], cached[:, b, length:] = np.nan, np.nan

    def stored(rows, values):
        return cache_rows.encode(jnp.asarray(rows), values, cache_rows.FORMATS[dtype])

    keys, own_keys = stored(keys, 24), stored(random(4, tokens, 24), 24)
    cached, own = stored(cached, 10), stored(random(4, tokens, 13), 10)
    operands = (
        *(random(4, tokens, heads, 24), keys, own_keys, random(4, tokens, heads)),
        *(random(4, tokens, 6, 13), cached, own, lengths, np.int32(2)),
    )
    native_, xla = (_attend(*operands, name) for name in ("native", "xla"))
    np.testing.assert_array_equal(native_[0], xla[0])
    # Sums of 13 products and of 9 weighted rows of size 1, in another order.
    np.testing.assert_allclose(native_[1], xla[1], rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(native_[2], xla[2], rtol=1e-5, atol=2e-6)


@needs_compiler
def test_an_offset_outside_the_matrices_is_an_error_and_no_read(rng):
    x, w, sizes = jnp.ones((2, 3)), jnp.ones((2, 3, 2)), jnp.array([1, 1], jnp.int32)
    for offset in (-1, 1):
        with pytest.raises(ValueError, match=f"group_offset must be from 0 to 0.*got {offset}"):
            grouped_matmul(x, w, sizes, group_offset=offset, implementation="native")
        with pytest.raises(jax.errors.JaxRuntimeError, match="group_offset"):  # known when it runs
            jax.jit(
                lambda offset: grouped_matmul(
                    x, w, sizes, group_offset=offset, implementation="native"
                )
            )(offset).block_until_ready()


@needs_compiler
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inner": 65}, "one group for each 64 columns"),
        ({"inner": 300}, "one group for each 64 columns"),
        ({"base": (1, 5, 8)}, "base must have 8 words"),
        ({"planes": ((1, 4, 4), (1, 5, 4))}, "a plane must have 4 halfwords"),
    ],
)
def test_weights_in_sefp_whose_parts_do_not_agree_are_an_error_and_no_read(changes, message):
    """One group of columns 6 by inputs 64 has one exponent, 8 words and 4 halfwords per plane."""
    sizes = {"inner": 64, "base": (1, 6, 8), "planes": ((1, 6, 4),) * 2} | changes
    base = jnp.zeros(sizes["base"], jnp.uint32)
    planes = tuple(jnp.zeros(shape, jnp.uint16) for shape in sizes["planes"])
    stored = Sefp(jnp.zeros((1, 6), jnp.int8), base, planes, sizes["inner"])
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        sefp_matmul(
            jnp.ones((2, sizes["inner"])), stored, implementation="native"
        ).block_until_ready()


@needs_compiler
def test_scores_of_minus_infinity_or_nan_are_never_chosen():
    keys = jnp.array([1.0, np.nan, 2.0, 3e38, 0.5])[None, :, None]
    for weight in (1.0, -1.0):
        q, weights = jnp.full((1, 1, 1, 1), 4.0), jnp.full((1, 1, 1), weight)
        chosen = index_topk(q, keys, weights, 5, implementation="native")
        expected = [3, 2, 0, 4, -1] if weight > 0 else [4, 0, 2, -1, -1]
        np.testing.assert_array_equal(chosen[0, 0], expected)


@needs_compiler
def test_gradients_of_a_step_equal_xla_s_and_the_selection_has_none(rng):
    def random(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    q, cached, own, keys = random(2, 1, 3, 6), random(2, 2, 9, 6), random(2, 1, 6), random(2, 1, 4)
    index_q, index_keys, weights = random(2, 1, 16, 4), random(2, 2, 9, 4), random(2, 1, 16)
    lengths = jnp.array([9, 5], jnp.int32)

    def loss(implementation, q, cached, own, index_q):
        rows = index_topk_step(
            index_q, index_keys, 1, keys, weights, lengths, 4, implementation=implementation
        )
        step = functools.partial(sparse_mla_step, scale=0.3, value_dim=5)
        out, lse = step(q, cached, 1, own, rows, implementation=implementation)
        return (out**2).sum() + lse.sum()

    got, expected = (
        jax.grad(loss, (1, 2, 3, 4))(name, q, cached, own, index_q) for name in ("native", "xla")
    )
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert not got[3].any()


@needs_compiler
@pytest.mark.parametrize("dtype", cache_rows.FORMATS)
@pytest.mark.parametrize(("size", "values"), [(576, 512), (230, 200)])
def test_rows_are_read_as_xla_reads_them_whatever_their_bytes(rng, dtype, size, values):
    """A single chosen row comes out as it is: attention to it alone is its values."""
    format_ = cache_rows.FORMATS[dtype]
    rows = jnp.asarray(rng.standard_normal((1, 1, 20, size)), jnp.float32)
    stored = cache_rows.encode(rows, values, format_)
    if dtype == "fp8":  # every code that is a number
        codes = rng.permutation(np.setdiff1d(np.arange(256), [0x7F, 0xFF])).astype(np.uint8)
        stored = stored.at[..., :values].set(np.resize(codes, (1, 1, 20, values)))
    none = jnp.zeros((1, 0, stored.shape[-1]), format_)
    each = jnp.arange(20, dtype=jnp.int32)[None, :, None]
    q = jnp.zeros((1, 20, 1, size))
    step = functools.partial(sparse_mla_step, scale=1.0, value_dim=values)
    out, _ = step(q, stored, 0, none, each, implementation="native")
    expected = cache_rows.decode(stored, values, jnp.float32)
    np.testing.assert_array_equal(out[0, :, 0], expected[0, 0, :, :values])


@needs_compiler
@pytest.mark.misuse
def test_rows_in_another_format_are_refused_with_both(rng):
    q, none = jnp.ones((1, 1, 2, 13)), jnp.zeros((1, 0, 13))
    step = functools.partial(sparse_mla_step, scale=1.0, value_dim=10)
    rows = jnp.zeros((1, 1, 1), jnp.int32)
    with pytest.raises(ValueError, match=r"must be \[L, P, S, 20\].*uint8\(1, 1, 4, 13\)"):
        step(q, jnp.zeros((1, 1, 4, 13), jnp.uint8), 0, none.astype(jnp.uint8), rows)
    with pytest.raises(ValueError, match="stored like the cached ones; got .*bfloat16"):
        step(q, jnp.zeros((1, 1, 4, 13), jnp.bfloat16), 0, none, rows)
    with pytest.raises(NotImplementedError, match="read rows in .*fp8; got float16"):
        half = jnp.zeros((1, 1, 4, 13), jnp.float16)
        step(q, half, 0, none.astype(jnp.float16), rows, implementation="native")


@needs_compiler
def test_the_logistic_function_is_the_same_bits_whoever_stands_beside(rng):
    x = jnp.asarray(np.append(rng.standard_normal(60) * 20, [0, -0.0, np.inf, -np.inf, np.nan, 90]))
    x = x.astype(jnp.float32)

    def sigmoid(x):
        return native.call("jaxmoe_sigmoid", jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    together = sigmoid(x)
    exact = 1 / (1 + np.exp(-np.asarray(x, np.float64)))
    np.testing.assert_allclose(together, exact, rtol=5e-7, atol=1e-37)
    for i in range(x.size):
        np.testing.assert_array_equal(sigmoid(x[i : i + 1])[0], together[i])
