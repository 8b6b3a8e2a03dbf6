"""The Hopper backend of the grouped matmul on quantised weights: in the simulator, and lowered at real sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _pallas, fp8, grouped_matmul, sefp
from pallas_kernels.grouped_matmul import mosaic_gpu

ENCODE = {"fp8": fp8.encode, "sefp": functools.partial(sefp.encode, width=5)}
needs_simulator = pytest.mark.skipif(
    jax.default_backend() == "cpu" and not hasattr(plgpu, "InterpretGPUParams"),
    reason="this JAX's simulator of a GPU has no transposed operands",
)


def problem(rng, encode, rows=60, dtype="bfloat16"):
    """(x, w of five matrices, sizes of three groups, dy); rows past the last group are NaN."""
    x, dy = (jnp.asarray(rng.standard_normal((rows, n)), dtype) for n in (128, 64))
    x, dy = (a.at[-7:].set(np.nan) for a in (x, dy))
    w = encode(jnp.asarray(rng.standard_normal((5, 128, 64)), jnp.float32))
    return x, w, jnp.asarray([rows - 27, 0, 20], jnp.int32), dy


def same(got, expected):
    # Sums of 128 float32 products of size 1 in another order, then rounded to 8 bits.
    got, expected = (np.asarray(a, np.float32) for a in (got, expected))
    np.testing.assert_allclose(got, expected, rtol=2**-7, atol=1e-3)


def multiply(x, w, sizes, implementation):
    return grouped_matmul(x, w, sizes, group_offset=1, implementation=implementation)


@pytest.mark.parametrize("stored", list(ENCODE))
def test_the_product_equals_xla_s(rng, stored):
    x, w, sizes, _ = problem(rng, ENCODE[stored])
    same(*(multiply(x, w, sizes, name) for name in ("mosaic_gpu", "xla")))


@needs_simulator
@pytest.mark.parametrize("stored", list(ENCODE))
def test_the_gradient_of_the_rows_equals_xla_s_and_the_weights_have_none(rng, stored):
    x, w, sizes, dy = problem(rng, ENCODE[stored])

    def gradients(name):
        _, pullback = jax.vjp(lambda x, w: multiply(x, w, sizes, name), x, w)
        return pullback(dy)

    (got, of_w), (expected, _) = gradients("mosaic_gpu"), gradients("xla")
    same(got, expected)
    floating = [a for a in jax.tree.leaves(of_w) if a.dtype != jax.dtypes.float0]
    assert not any(np.asarray(a, np.float32).any() for a in floating)


@pytest.mark.parametrize("rows", [32768, 64])
@pytest.mark.parametrize("stored", list(ENCODE))
def test_product_and_gradient_lower_at_real_sizes(monkeypatch, stored, rows):
    monkeypatch.setattr(_pallas, "interpret_gpu", lambda: None)
    monkeypatch.setattr(_pallas, "multiprocessors", lambda: 132)
    shape = jax.ShapeDtypeStruct
    w = jax.eval_shape(ENCODE[stored], shape((64, 7168, 2048), jnp.float32))
    x, dy = (shape((rows, n), jnp.bfloat16) for n in (7168, 2048))

    def products(x, w, dy, sizes, offset):
        y, pullback = jax.vjp(lambda x: mosaic_gpu.grouped_matmul(x, w, sizes, offset), x)
        return y, *pullback(dy)

    sizes, offset = shape((32,), jnp.int32), shape((), jnp.int32)
    exported = jax.export.export(jax.jit(products), platforms=["cuda"])(x, w, dy, sizes, offset)
    assert [a.shape for a in exported.out_avals] == [dy.shape, x.shape]


@pytest.mark.parametrize("stored", list(ENCODE))
def test_nothing_decoded_is_kept_for_the_gradient(stored):
    x, sizes = jax.ShapeDtypeStruct((64, 128), jnp.bfloat16), jnp.asarray([40, 24], jnp.int32)
    w = ENCODE[stored](jnp.ones((4, 128, 64)))
    call = functools.partial(grouped_matmul, w=w, group_sizes=sizes, implementation="mosaic_gpu")
    kept = jax.eval_shape(lambda x: jax.vjp(call, x)[1], x)
    assert not any(a.shape[-2:] == (128, 64) and a.dtype == x.dtype for a in jax.tree.leaves(kept))


@pytest.mark.parametrize("stored", list(ENCODE))
def test_what_decoding_ahead_would_not_pay_for_is_refused_with_the_reason(stored):
    def call(rows, dtype, shape):
        w = jax.eval_shape(ENCODE[stored], jax.ShapeDtypeStruct(shape, jnp.float32))
        x = jax.ShapeDtypeStruct((rows, shape[1]), dtype)
        sizes = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
        jax.eval_shape(functools.partial(grouped_matmul, implementation="mosaic_gpu"), x, w, sizes)

    with pytest.raises(NotImplementedError, match="multiplies bfloat16 or float16; got float32"):
        call(8, jnp.float32, (4, 128, 64))
    with pytest.raises(NotImplementedError, match="which 3 rows for 4 groups are too few for"):
        call(3, jnp.bfloat16, (4, 128, 64))
    with pytest.raises(NotImplementedError, match=r"256 of \(7168, 2048\) need 7516192768"):
        call(4096, jnp.bfloat16, (256, 7168, 2048))
