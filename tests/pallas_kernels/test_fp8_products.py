"""Grouped products of 8 bits: their rounding by the definition, and each product's operands."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import grouped_matmul, grouped_matmul_fp8
from pallas_kernels.grouped_matmul.fp8 import rounded


def by_definition(x: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Tile by tile, in float64."""
    out = np.zeros(x.shape)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            tile = x[i : i + rows, j : j + columns].astype(np.float64)
            largest = max(np.abs(tile).max(), 1e-30)
            scale = 2.0 ** np.ceil(np.log2(largest / 448))
            out[i : i + rows, j : j + columns] = (tile / scale).astype(
                ml_dtypes.float8_e4m3fn
            ).astype(np.float64) * scale
    return out


@pytest.mark.parametrize("tile", [(1, 128), (128, 1), (128, 128), (2, 3)])
def test_numbers_are_rounded_as_defined(rng, tile):
    x = rng.standard_normal((130, 257)) * np.exp2(rng.integers(-6, 6, (130, 1)))
    x = x.astype(np.float32)
    got = np.asarray(rounded(jnp.asarray(x), *tile))
    np.testing.assert_array_equal(got, by_definition(x, *tile))
    # Whatever was rounded is a number of bfloat16, whose products XLA's and our kernels make exactly.
    np.testing.assert_array_equal(got, got.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_each_product_rounds_its_operands_along_its_sum(rng):
    m, k, n, sizes = 150, 200, 140, np.array([70, 0, 80], np.int32)
    x, dy = rng.standard_normal((m, k)), rng.standard_normal((m, n))
    w = rng.standard_normal((3, k, n))
    x, w, dy = (jnp.asarray(a, jnp.float32) for a in (x, w, dy))
    y, back = jax.vjp(lambda x, w: grouped_matmul_fp8(x, w, jnp.asarray(sizes)), x, w)
    dx, dw = back(dy)
    of_w = [by_definition(np.asarray(a), 128, 128) for a in w]
    along_k, along_n = by_definition(np.asarray(x), 1, 128), by_definition(np.asarray(dy), 1, 128)
    x_along_m, dy_along_m = (by_definition(np.asarray(a), 128, 1) for a in (x, dy))
    start = 0
    for g, size in enumerate(sizes):
        of_group = slice(start, start + size)
        np.testing.assert_allclose(y[of_group], along_k[of_group] @ of_w[g], rtol=1e-4, atol=1e-4)
        expected = along_n[of_group] @ of_w[g].T
        np.testing.assert_allclose(dx[of_group], expected, rtol=1e-4, atol=1e-4)
        expected = x_along_m[of_group].T @ dy_along_m[of_group]
        np.testing.assert_allclose(dw[g], expected, rtol=1e-4, atol=1e-4)
        start += size


def test_products_are_near_those_of_float32(rng):
    """Two operands rounded to 4 significant bits: about 2.6 % each, 3.7 % together, of a product's deviation."""
    sizes = jnp.array([64, 64], jnp.int32)
    x = jnp.asarray(rng.standard_normal((128, 256)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((2, 256, 128)), jnp.float32)
    exact = grouped_matmul(x, w, sizes)
    error = jnp.std(grouped_matmul_fp8(x, w, sizes) - exact) / jnp.std(exact)
    assert 0.03 < error < 0.045


def test_a_tile_with_nan_is_nan_and_others_are_not():
    x = jnp.ones((2, 256)).at[0, 3].set(jnp.nan)
    got = np.asarray(rounded(x, 1, 128))
    assert (
        np.isnan(got[0, :128]).any()
        and np.isfinite(got[0, 128:]).all()
        and np.isfinite(got[1]).all()
    )
