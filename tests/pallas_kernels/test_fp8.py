"""Weights in 8 bits with a scale per block: the format, and that checkpoints mean the same by it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.checkpoint import hf
from pallas_kernels import fp8

RELATIVE, STEP = 2**-4, 2**-10  # half of the last of three bits; half of the smallest number


def blocks_of(w):
    """(slice of rows, slice of columns, index) of each block."""
    for i in range(-(-w.shape[0] // fp8.BLOCK)):
        for j in range(-(-w.shape[1] // fp8.BLOCK)):
            rows, columns = (slice(n * fp8.BLOCK, (n + 1) * fp8.BLOCK) for n in (i, j))
            yield rows, columns, (i, j)


@given(st.sampled_from([(1, 1), (128, 256), (140, 130)]), st.integers(-30, 30), st.integers(0, 99))
def test_each_block_has_its_scale_and_no_weight_is_further_off_than_the_format(
    shape, exponent, seed
):
    rng = np.random.default_rng(seed)
    w = np.ldexp(rng.standard_normal(shape, np.float32), exponent)
    coded = fp8.encode(jnp.asarray(w))
    assert coded.values.dtype == jnp.float8_e4m3fn and coded.scales.dtype == jnp.float32
    got, scales = np.asarray(fp8.decode(coded, jnp.float32)), np.asarray(coded.scales)
    for rows, cols, index in blocks_of(w):
        block, scale = w[rows, cols], scales[index]
        # A division by a constant may be a multiplication by its inverse: two roundings of 24 bits.
        np.testing.assert_allclose(scale, np.abs(block).max() / np.float32(448), rtol=2**-22)
        allowed = np.maximum(RELATIVE * np.abs(block), STEP * scale) * (1 + 2**-20)
        assert (np.abs(got[rows, cols] - block) <= allowed).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_s_loader_reads_the_same_weights(dtype, rng):
    w = rng.standard_normal((2, 150, 300), np.float32)
    coded = fp8.encode(jnp.asarray(w))
    values, scales = (np.asarray(a).swapaxes(-1, -2) for a in (coded.values, coded.scales))
    loaded = hf._dequantise(values, scales, (fp8.BLOCK, fp8.BLOCK), jnp.dtype(dtype))
    np.testing.assert_array_equal(fp8.decode(coded, dtype), loaded.swapaxes(-1, -2))


@pytest.mark.parametrize("value", [0.0, 1e-44, 1e-38, 1e-36, 1.0, 3e38])
def test_blocks_of_one_number_stay_numbers(value):
    w = jnp.full((130, 3), value, jnp.float32).at[128:].set(0)
    coded = fp8.encode(w)
    got = np.asarray(fp8.decode(coded, jnp.float32))
    # Below 448 times the smallest normal number there are no scales, and the weights count as zeros.
    expected = np.asarray(w) if value > 1e-35 else np.zeros_like(w)
    np.testing.assert_allclose(got, expected, rtol=2**-22)
    assert coded.scales[1, 0] == 1


def test_nan_and_infinity_fill_their_block_and_no_other():
    w = np.ones((256, 256), np.float32)
    w[3, 5], w[200, 7] = np.nan, np.inf
    nan = np.isnan(fp8.decode(fp8.encode(jnp.asarray(w)), jnp.float32))
    assert nan[:, :128].all() and not nan[:, 128:].any()


def test_a_stack_is_coded_matrix_by_matrix_and_sliced_like_an_array(rng):
    w = jnp.asarray(rng.standard_normal((3, 140, 20), np.float32))
    coded = fp8.encode(w)
    assert coded.shape == w.shape
    assert repr(coded) == f"Fp8Block(shape=(3, 140, 20), {3 * 140 * 20 + 3 * 2 * 4} bytes)"
    one = jax.tree.map(lambda a: a[1], coded)
    np.testing.assert_array_equal(fp8.decode(one), fp8.decode(fp8.encode(w[1])))


@pytest.mark.misuse
def test_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"w must be \[..., K, N\]; got shape \(3,\)"):
        fp8.encode(jnp.ones(3))
