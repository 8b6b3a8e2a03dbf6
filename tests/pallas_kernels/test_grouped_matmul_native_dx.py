"""The gradient of the rows in C++, whose matrices are turned a square of vectors at a time: the same sums as the product's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul, native

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler")


def dx_of(dy, w, sizes):
    def product(x):
        return grouped_matmul(x, w, jnp.asarray(sizes, jnp.int32), implementation="native")

    return jax.vjp(product, jnp.zeros((dy.shape[0], w.shape[1])))[1](dy)[0]


# Whole squares, squares and a rest along either axis, less than one square; few rows, one block of them, several.
@pytest.mark.parametrize(("inner", "columns"), [(256, 64), (37, 700), (1100, 5), (129, 47)])
@pytest.mark.parametrize("rows", [3, 13, 700])
def test_a_row_has_the_bits_of_the_product_with_turned_matrices_and_of_the_row_alone(
    rng, rows, inner, columns
):
    dy = jnp.asarray(rng.standard_normal((rows, inner)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((3, columns, inner)), jnp.float32)
    sizes = [0, rows - 2, 2]
    together = dx_of(dy, w, sizes)
    turned = grouped_matmul(
        dy, w.swapaxes(1, 2), jnp.asarray(sizes, jnp.int32), implementation="native"
    )
    np.testing.assert_array_equal(together, turned)
    for r in {0, (rows - 3) // 2, rows - 3}:
        np.testing.assert_array_equal(together[r], dx_of(dy[r : r + 1], w[1:2], [1])[0])
