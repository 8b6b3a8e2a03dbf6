"""Grouped matmul: every backend against a loop in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import grouped_matmul, native
from pallas_kernels.grouped_matmul import config, xla

# float32 sums of up to 300 products of standard normals: 300 * 2**-24 * a typical partial sum of 20.
TOLERANCE = {"rtol": 1e-5, "atol": 4e-4}


def oracle(x, w, sizes, offset, dy):
    """(y, dx, dw) in float64, one row at a time."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    row = 0
    for group, size in enumerate(sizes):
        for _ in range(size):
            y[row] = x[row] @ w[offset + group]
            dx[row] = w[offset + group] @ dy[row]
            dw[offset + group] += np.outer(x[row], dy[row])
            row += 1
    return y, dx, dw


@functools.partial(jax.jit, static_argnames="implementation")
def run(x, w, sizes, offset, dy, implementation):
    """(y, dx, dw); sizes and offset are data, so that one compilation serves all of one shape."""

    def forward(x, w):
        return grouped_matmul(x, w, sizes, group_offset=offset, implementation=implementation)

    y, pullback = jax.vjp(forward, x, w)
    return y, *pullback(dy)


# name -> (rows, in, out, matrices in w, group sizes, group offset)
CASES = {
    "odd sizes": (11, 5, 3, 4, [2, 4, 1, 4], 0),
    "empty groups": (11, 5, 3, 4, [0, 7, 0, 4], 0),
    "one hot expert": (11, 5, 3, 4, [0, 0, 11, 0], 0),
    "rows past the last group": (11, 5, 3, 4, [3, 0, 2, 1], 0),
    "no rows used": (11, 5, 3, 4, [0, 0, 0, 0], 0),
    "fewer groups than matrices": (11, 5, 3, 4, [6, 2], 0),
    "a slice of the matrices": (11, 5, 3, 4, [6, 2], 1),
    "the last slice": (11, 5, 3, 4, [1, 10], 2),
    "one row": (1, 1, 1, 1, [1], 0),
    "more groups than rows": (2, 3, 4, 9, [0, 0, 1, 0, 0, 0, 0, 1, 0], 0),
    "groups larger than a block": (300, 4, 6, 3, [131, 0, 168], 0),
}


class Cases:
    """What every backend must satisfy; a subclass names the backend and inherits all of it."""

    implementation: str

    def check(self, x, w, sizes, offset, dy):
        """Asserts that the backend equals the oracle on these arrays; returns its (y, dx, dw)."""
        got = run(x, w, jnp.asarray(sizes, jnp.int32), jnp.int32(offset), dy, self.implementation)
        for name, a, b in zip(("y", "dx", "dw"), got, oracle(x, w, sizes, offset, dy), strict=True):
            np.testing.assert_allclose(a, b, **TOLERANCE, err_msg=name)
        return got

    @pytest.mark.parametrize("case", list(CASES))
    def test_result_and_gradients_equal_the_oracle(self, case, rng):
        rows, size_in, size_out, matrices, sizes, offset = CASES[case]
        x = rng.standard_normal((rows, size_in), np.float32)
        w = rng.standard_normal((matrices, size_in, size_out), np.float32)
        dy = rng.standard_normal((rows, size_out), np.float32)
        _, _, dw = self.check(x, w, sizes, offset, dy)
        used = range(offset, offset + len(sizes))
        assert not np.asarray(dw)[[m for m in range(matrices) if m not in used]].any()

    @given(st.lists(st.integers(0, 13), min_size=6, max_size=6), st.integers(0, 3))
    def test_any_group_sizes_equal_the_oracle(self, sizes, offset):
        rng = np.random.default_rng(0)
        rows = 6 * 13
        x = rng.standard_normal((rows, 4), np.float32)
        w = rng.standard_normal((9, 4, 3), np.float32)
        self.check(x, w, sizes, offset, rng.standard_normal((rows, 3), np.float32))

    def test_nan_in_rows_past_the_last_group_reaches_nothing(self, rng):
        x = rng.standard_normal((11, 5), np.float32)
        w = rng.standard_normal((4, 5, 3), np.float32)
        dy = rng.standard_normal((11, 3), np.float32)
        x[6:], dy[6:] = np.nan, np.inf
        sizes = jnp.asarray([3, 0, 2, 1], jnp.int32)
        got = run(x, w, sizes, jnp.int32(0), dy, self.implementation)
        x[6:], dy[6:] = 0, 0
        for name, a, b in zip(("y", "dx", "dw"), got, oracle(x, w, sizes, 0, dy), strict=True):
            np.testing.assert_allclose(a, b, **TOLERANCE, err_msg=name)

    def test_a_static_offset_equals_a_traced_one(self, rng):
        x = jnp.asarray(rng.standard_normal((11, 5), np.float32))
        w = jnp.asarray(rng.standard_normal((4, 5, 3), np.float32))
        sizes = jnp.asarray([6, 2], jnp.int32)
        static = grouped_matmul(x, w, sizes, group_offset=1, implementation=self.implementation)
        traced, _, _ = run(x, w, sizes, jnp.int32(1), jnp.zeros((11, 3)), self.implementation)
        np.testing.assert_allclose(static, traced, **TOLERANCE)

    def test_bfloat16_accumulates_in_float32(self):
        # One, then 128 times 2**-9: each addend is lost when added to 1 in bfloat16, their exact sum is 1.25.
        x = jnp.full((3, 129), 2**-9, jnp.bfloat16).at[:, 0].set(1)
        w = jnp.ones((1, 129, 2), jnp.bfloat16)
        y = grouped_matmul(x, w, jnp.array([3], jnp.int32), implementation=self.implementation)
        assert y.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(y, np.float32), np.float32(1.25))


class TestXla(Cases):
    implementation = "xla"


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
class TestNative(Cases):
    implementation = "native"

    def test_bfloat16_accumulates_in_float32(self):
        x, w = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((1, 3, 2), jnp.bfloat16)
        with pytest.raises(NotImplementedError, match="float32; got bfloat16"):
            grouped_matmul(x, w, jnp.array([2], jnp.int32), implementation="native")


class TestRaggedDot(Cases):
    implementation = "ragged_dot"


class TestReference(Cases):
    implementation = "reference"


def test_the_blocks_of_the_xla_backend_cover_every_row_of_every_group_once(rng):
    for _ in range(20):
        sizes = rng.integers(0, 40, size=7)
        rows = int(sizes.sum()) + int(rng.integers(1, 5))
        blocks = xla._blocks(jnp.asarray(sizes, jnp.int32), rows)
        owner = np.repeat(np.arange(7), sizes)
        covered = np.zeros(rows, int)
        for i in range(int(blocks.used)):
            start = int(blocks.start[i])
            assert 0 <= start <= rows - blocks.size
            mine = start + np.flatnonzero(np.asarray(blocks.inside(jnp.int32(i)))[:, 0])
            assert mine.size and (owner[mine] == int(blocks.group[i])).all()
            covered[mine] += 1
        assert (covered[: sizes.sum()] == 1).all() and (covered[sizes.sum() :] == 0).all()


def test_no_rows_give_no_rows_and_zero_gradients():
    def total(x, w):
        return grouped_matmul(x, w, jnp.zeros(2, jnp.int32)).sum()

    x, w = jnp.ones((0, 3)), jnp.ones((2, 3, 4))
    dx, dw = jax.grad(total, argnums=(0, 1))(x, w)
    assert dx.shape == (0, 3) and (dw == 0).all()


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
