"""Grouped matmul of nothing, and what it refuses."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import fp8, grouped_matmul
from pallas_kernels.grouped_matmul import config


def test_no_rows_give_no_rows_and_zero_gradients():
    def total(x, w):
        return grouped_matmul(x, w, jnp.zeros(2, jnp.int32)).sum()

    x, w = jnp.ones((0, 3)), jnp.ones((2, 3, 4))
    dx, dw = jax.grad(total, argnums=(0, 1))(x, w)
    assert dx.shape == (0, 3) and (dw == 0).all()


@pytest.mark.parametrize("implementation", [None, "xla", "reference"])
@pytest.mark.parametrize("rows, inner, groups", [(5, 3, 0), (5, 0, 2), (0, 3, 0)])
def test_nothing_to_multiply_gives_zeros(implementation, rows, inner, groups):
    def total(x, w):
        sizes = jnp.zeros(groups, jnp.int32)
        return grouped_matmul(x, w, sizes, implementation=implementation).sum()

    x, w = jnp.ones((rows, inner)), jnp.ones((2, inner, 4))
    assert total(x, w) == 0
    dx, dw = jax.grad(total, argnums=(0, 1))(x, w)
    assert dx.shape == x.shape and dw.shape == w.shape and not dx.any() and not dw.any()


@pytest.mark.parametrize("offset", [-1, 3])
def test_a_group_offset_beyond_the_matrices_is_refused(offset):
    x, w = jnp.ones((4, 3)), jnp.ones((4, 3, 2))
    with pytest.raises(ValueError, match=f"group_offset must be from 0 to 2.*got {offset}"):
        grouped_matmul(x, w, jnp.array([2, 2]), group_offset=offset)


@pytest.mark.parametrize("rows", [0, 1, 3, 64, 1000, 100_000])
@pytest.mark.parametrize("groups", [1, 8, 256])
def test_block_rows_is_a_power_of_two_within_bounds(rows, groups):
    block = config.block_rows(rows, groups)
    assert 2 <= block <= 128 and block & (block - 1) == 0


@pytest.mark.misuse
@pytest.mark.parametrize(
    ("x", "w", "sizes", "error", "message"),
    [
        ((2, 3, 4), (1, 4, 5), (1,), ValueError, r"x must be \[M, K\].*\(2, 3, 4\).*Flatten"),
        ((2, 3), (3, 4), (1,), ValueError, r"w \[G, K, N\].*\(3, 4\)"),
        ((2, 3), (1, 4, 5), (1,), ValueError, r"x's K \(3\) must equal w's K \(4\).*\[group, in"),
        ((2, 3), (1, 3, 5), (2,), ValueError, r"2 groups but w holds 1 matrices; pass one size"),
    ],
)
def test_shapes_that_do_not_fit_are_named(x, w, sizes, error, message):
    with pytest.raises(error, match=message):
        grouped_matmul(jnp.ones(x), jnp.ones(w), jnp.ones(sizes, jnp.int32))


@pytest.mark.misuse
def test_dtypes_that_do_not_fit_are_named():
    x, w, sizes = jnp.ones((2, 3)), jnp.ones((1, 3, 4)), jnp.array([2], jnp.int32)
    with pytest.raises(TypeError, match="group_sizes must be integers; got float32. Cast to int32"):
        grouped_matmul(x, w, sizes.astype(jnp.float32))
    with pytest.raises(TypeError, match="x is bfloat16 but w is float32; cast one"):
        grouped_matmul(x.astype(jnp.bfloat16), w, sizes)
    with pytest.raises(TypeError, match="x must be of a floating type; got int32. Cast it"):
        grouped_matmul(x.astype(jnp.int32), fp8.encode(w), sizes)
