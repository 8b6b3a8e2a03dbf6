"""Grouped matmul: every backend against a loop in float64 NumPy."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _pallas, _tuned, fp8, grouped_matmul, native, sefp
from pallas_kernels.grouped_matmul import config, mosaic_gpu, mosaic_tpu, xla

TOLERANCE = {
    # Sums of up to 300 products of standard normals: 300 * 2**-24 * a typical partial sum of 20.
    "float32": {"rtol": 1e-5, "atol": 4e-4},
    # The same, then rounded to eight bits.
    "bfloat16": {"rtol": 2**-8, "atol": 4e-4},
}


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


@functools.partial(jax.jit, static_argnames=("implementation", "forward_only"))
def run(x, w, sizes, offset, dy, implementation, forward_only=False):
    """(y, dx, dw), (y, dx) or (y,); sizes and offset are data, so that one compilation serves all of one shape."""

    def forward(x, w):
        return grouped_matmul(x, w, sizes, group_offset=offset, implementation=implementation)

    if forward_only:
        return (forward(x, w),)
    if isinstance(w, jax.Array):
        y, pullback = jax.vjp(forward, x, w)
    else:
        y, pullback = jax.vjp(lambda x: forward(x, w), x)
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
    dtype = "float32"
    isolates = True  # also a group that holds NaN from the others
    products = ("y", "dx", "dw")

    def random(self, rng, *shape):
        """Normal numbers that the dtype has; of three dimensions: that ``stored`` keeps."""
        numbers = jnp.asarray(rng.standard_normal(shape, np.float32), self.dtype)
        return np.array(numbers.astype(jnp.float32))

    def stored(self, w, dtype):
        """``w`` as the op takes it."""
        return jnp.asarray(w, dtype)

    def run(self, x, w, sizes, offset, dy, dtype=None):
        """(y, dx, dw) in float32, of which there are as many as ``products``."""
        dtype = dtype or self.dtype
        x, dy, w = jnp.asarray(x, dtype), jnp.asarray(dy, dtype), self.stored(w, dtype)
        sizes = jnp.asarray(sizes, jnp.int32)
        forward_only = self.products == ("y",)
        got = run(x, w, sizes, jnp.int32(offset), dy, self.implementation, forward_only)
        assert all(a.dtype == dtype for a in got)
        return [np.asarray(a, np.float32) for a in got]

    def compare(self, got, expected, kept=(slice(None),) * 3):
        """Asserts that what is ``kept`` of each product equals what is expected of it."""
        assert len(got) == len(self.products)
        for name, a, b, some in zip(self.products, got, expected, kept, strict=False):
            np.testing.assert_allclose(a[some], b[some], **TOLERANCE[self.dtype], err_msg=name)

    def check(self, x, w, sizes, offset, dy):
        """Asserts that the backend equals the oracle on these arrays; returns its (y, dx, dw)."""
        got = self.run(x, w, sizes, offset, dy)
        self.compare(got, oracle(x, w, sizes, offset, dy))
        return got

    @pytest.mark.parametrize("case", list(CASES))
    def test_result_and_gradients_equal_the_oracle(self, case, rng):
        rows, size_in, size_out, matrices, sizes, offset = CASES[case]
        x = self.random(rng, rows, size_in)
        w = self.random(rng, matrices, size_in, size_out)
        dy = self.random(rng, rows, size_out)
        got = dict(zip(self.products, self.check(x, w, sizes, offset, dy), strict=True))
        if "dw" in got:
            unused = np.setdiff1d(np.arange(matrices), offset + np.arange(len(sizes)))
            assert not got["dw"][unused].any()

    @given(st.lists(st.integers(0, 13), min_size=6, max_size=6), st.integers(0, 3))
    def test_any_group_sizes_equal_the_oracle(self, sizes, offset):
        rng = np.random.default_rng(0)
        rows = 6 * 13
        x, w = self.random(rng, rows, 4), self.random(rng, 9, 4, 3)
        self.check(x, w, sizes, offset, self.random(rng, rows, 3))

    def test_nan_in_rows_past_the_last_group_reaches_nothing(self, rng):
        x, w, dy = self.random(rng, 11, 5), self.random(rng, 4, 5, 3), self.random(rng, 11, 3)
        sizes = [3, 0, 2, 1]
        expected = oracle(x, w, sizes, 0, dy)
        x[6:], dy[6:] = np.nan, np.inf
        self.compare(self.run(x, w, sizes, 0, dy), expected)

    def test_nan_in_a_group_s_rows_or_matrix_stays_in_that_group(self, rng):
        if not self.isolates:
            pytest.skip("multiplies what belongs to no pair by zero")
        x, w, dy = self.random(rng, 11, 5), self.random(rng, 4, 5, 3), self.random(rng, 11, 3)
        expected = oracle(x, w, [3, 4, 3], 0, dy)
        x[3:7], dy[3:7], w[[1, 3]] = np.nan, np.inf, np.nan
        got = self.run(x, w, [3, 4, 3], 0, dy)
        self.compare(got, expected, kept=([0, 1, 2, 7, 8, 9, 10],) * 2 + ([0, 2],))

    def test_a_static_offset_equals_a_traced_one(self, rng):
        x, w = self.random(rng, 11, 5), self.random(rng, 4, 5, 3)
        traced, *_ = self.run(x, w, [6, 2], 1, self.random(rng, 11, 3))
        x, w = jnp.asarray(x, self.dtype), self.stored(w, self.dtype)
        sizes = jnp.asarray([6, 2], jnp.int32)
        static = grouped_matmul(x, w, sizes, group_offset=1, implementation=self.implementation)
        np.testing.assert_array_equal(np.asarray(static, np.float32), traced)

    def test_bfloat16_accumulates_in_float32(self, rng):
        # One, then 32 times 2**-9: each addend is lost when added to 1 in bfloat16, their exact sum is 1.0625.
        x, w, dy = (np.ones_like(self.random(rng, *s)) for s in [(3, 33), (1, 33, 2), (3, 2)])
        x[:, 1:33], x[:, 33:] = 2**-9, 0
        y, *_ = self.run(x, w, [3], 0, dy, "bfloat16")
        np.testing.assert_array_equal(y, np.float32(1.0625))


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
    isolates = False


class TestReference(Cases):
    implementation = "reference"
    isolates = False


class Quantised(Cases):
    """Of constants: no dw. The oracle multiplies by what they decode to, which encodes to itself."""

    products = ("y", "dx")

    def random(self, rng, *shape):
        numbers = super().random(rng, *shape)
        if len(shape) == 2:
            return numbers
        return np.array(self.decode(self.stored(numbers, None)))

    def test_matrices_of_several_blocks_equal_the_oracle(self, rng):
        x, w = self.random(rng, 11, 140), self.random(rng, 3, 140, 130)
        self.check(x, w, [5, 4], 1, self.random(rng, 11, 130))


class Fp8(Quantised):
    def stored(self, w, dtype):
        return fp8.encode(jnp.asarray(w, jnp.float32))

    def decode(self, w):
        return fp8.decode(w, jnp.float32)


class Sefp(Quantised):
    def stored(self, w, dtype):
        return sefp.encode(jnp.nan_to_num(jnp.asarray(w, jnp.float32)), width=5)  # It has no NaN.

    def decode(self, w):
        return sefp.decode(w, dtype=jnp.float32)


class TestFp8Xla(Fp8):
    implementation = "xla"


class TestFp8Reference(Fp8):
    implementation = "reference"
    isolates = False


class TestSefpXla(Sefp):
    implementation = "xla"


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
class TestSefpNative(Sefp):
    implementation = "native"

    def test_bfloat16_accumulates_in_float32(self):
        w = sefp.encode(jnp.ones((1, 64, 2)))
        with pytest.raises(NotImplementedError, match="float32; got bfloat16"):
            self.product(jnp.ones((2, 64), jnp.bfloat16), w, [2])

    def test_a_row_is_the_same_bit_for_bit_whoever_shares_its_matrix(self, rng):
        x = jnp.asarray(rng.standard_normal((60, 130)), jnp.float32)
        w = sefp.encode(jnp.asarray(rng.standard_normal((2, 130, 20)), jnp.float32))
        together = self.product(x, w, [3, 57])
        for r in (0, 2, 3, 30, 59):
            alone = self.product(x[r : r + 1], w, [int(r < 3), int(r >= 3)])
            np.testing.assert_array_equal(together[r], alone[0])

    def product(self, x, w, sizes):
        sizes = jnp.array(sizes, jnp.int32)
        return grouped_matmul(x, w, sizes, implementation=self.implementation)


class TestSefpReference(Sefp):
    implementation = "reference"
    isolates = False


@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="elsewhere matmuls have room of their own"
)
@pytest.mark.parametrize("encode", [fp8.encode, sefp.encode])
def test_quantised_weights_are_decoded_one_matrix_at_a_time(encode):
    w = encode(jnp.ones((32, 128, 256)))
    x, sizes, dy = jnp.ones((8, 128)), jnp.full(32, 1, jnp.int32), jnp.ones((8, 256))
    program = run.lower(x, w, sizes, jnp.int32(0), dy, implementation="xla").compile()
    # One matrix in float32, some codes of it as int32. All in bytes would be eight such.
    assert program.memory_analysis().temp_size_in_bytes < 5 * 4 * 128 * 256


@pytest.mark.parametrize("encode", [fp8.encode, sefp.encode])
def test_who_takes_no_quantised_weights_says_so_and_none_finds_who_does(encode):
    x, w, sizes = jnp.ones((2, 64)), encode(jnp.ones((1, 64, 64))), jnp.array([2], jnp.int32)
    arrays_only = () if encode is sefp.encode else ("native",)
    for name in (*arrays_only, "mosaic_tpu", "ragged_dot"):
        with pytest.raises(NotImplementedError, match=f"it is stored as {type(w).__name__}"):
            grouped_matmul(x, w, sizes, implementation=name)
    with pytest.raises(NotImplementedError, match="bfloat16 or float16; got float32"):
        grouped_matmul(x, w, sizes, implementation="mosaic_gpu")
    np.testing.assert_allclose(grouped_matmul(x, w, sizes), 64, rtol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_no_gradient_goes_to_quantised_weights(implementation):
    x, sizes = jnp.ones((2, 64)), jnp.array([2], jnp.int32)

    def total(w):
        return grouped_matmul(x, w, sizes, implementation=implementation).sum()

    gradient = jax.grad(total)(fp8.encode(jnp.ones((1, 64, 64))))
    assert not any(np.asarray(a, np.float32).any() for a in jax.tree.leaves(gradient))


@pytest.mark.skipif(jax.default_backend() == "tpu", reason="refused there")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # The simulator's, of NaN.
class TestMosaicGpu(Cases):
    """In the simulator, which takes seconds to compile, every case is part of one shape."""

    implementation = "mosaic_gpu"
    dtype = "bfloat16"
    rows, matrices, groups, size = 79, 12, 9, 64  # groups and the largest offset are 12
    # Both gradients multiply transposed operands, of which jax 0.10's simulator knows nothing: its thread that meets
    # one fails, and the others wait for that thread for ever.
    gradients = jax.default_backend() != "cpu" or hasattr(plgpu, "InterpretGPUParams")
    products = ("y", "dx", "dw") if gradients else ("y",)

    def random(self, rng, *shape):
        """As in ``Cases``, with all dimensions but the first rounded up."""
        first, *others = shape
        return super().random(rng, first, *(-(-size // self.size) * self.size for size in others))

    def run(self, x, w, sizes, offset, dy, dtype=None):
        """What is added is NaN: no product may read it."""
        if jax.default_backend() != "cpu":
            return super().run(x, w, sizes, offset, dy, dtype)
        # Groups larger than a block need more rows, and have a shape of their own.
        rows = max(self.rows - len(x), 0)
        matrices = self.matrices - len(w)
        sizes = np.pad(sizes, (0, self.groups - len(sizes)))
        x, dy = (np.pad(a, ((0, rows), (0, 0)), constant_values=np.nan) for a in (x, dy))
        w = np.pad(w, ((0, matrices), (0, 0), (0, 0)), constant_values=np.nan)
        y, *others = super().run(x, w, sizes, offset, dy, dtype)
        kept = [a[: len(a) - rows] for a in (y, *others[:1])]
        if self.gradients:
            first, last = np.split(others[1], [self.matrices - matrices])
            assert not last.any()
            kept.append(first)
        return kept

    test_a_static_offset_equals_a_traced_one = None  # The kernel is given an array in any case.

    @settings(max_examples=3)
    @given(st.lists(st.integers(0, 13), min_size=6, max_size=6), st.integers(0, 3))
    def test_any_group_sizes_equal_the_oracle(self, sizes, offset):
        Cases.test_any_group_sizes_equal_the_oracle.hypothesis.inner_test(self, sizes, offset)

    @pytest.mark.parametrize(
        ("tiling", "columns"),
        [
            (config.Tiling(64, 64, 2, stages=3, panel_columns=64), 64),
            (config.Tiling(128, 128, 1, stages=2, panel_columns=128), 128),
        ],
        ids=str,
    )
    def test_every_way_to_cut_it_gives_the_same_result(self, rng, tiling, columns, monkeypatch):
        monkeypatch.setattr(mosaic_gpu, "_tilings", lambda *_: (tiling,) * 3)
        x, w, dy = (self.random(rng, *s) for s in [(153, 128), (3, 128, columns), (153, columns)])
        jax.clear_caches()  # The function is the same, what it traces to is not.
        sizes = [22, 0, 131]
        self.compare(Cases.run(self, x, w, sizes, 0, dy), oracle(x, w, sizes, 0, dy))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="refused there")
class TestMosaicTpu(Cases):
    implementation = "mosaic_tpu"
    test_a_static_offset_equals_a_traced_one = None  # The kernel is given an array in any case.

    @settings(max_examples=3)
    @given(st.lists(st.integers(0, 13), min_size=6, max_size=6), st.integers(0, 3))
    def test_any_group_sizes_equal_the_oracle(self, sizes, offset):
        Cases.test_any_group_sizes_equal_the_oracle.hypothesis.inner_test(self, sizes, offset)

    def test_several_blocks_along_every_dimension(self, rng, monkeypatch):
        monkeypatch.setattr(mosaic_tpu, "BLOCK", 128)
        x, w, dy = (self.random(rng, *s) for s in [(200, 256), (3, 256, 256), (200, 256)])
        jax.clear_caches()  # The function is the same, what it traces to is not.
        self.check(x, w, [131, 0, 50], 0, dy)


def test_the_tpu_kernel_lowers_at_real_sizes(monkeypatch):
    monkeypatch.setattr(_pallas, "interpret_tpu", lambda: False)
    x, w, dy = bfloat16((131072, 7168)), bfloat16((256, 7168, 2048)), bfloat16((131072, 2048))

    def products(x, w, dy, sizes, offset):
        def forward(x, w):
            return mosaic_tpu.grouped_matmul(x, w, sizes, offset)

        y, pullback = jax.vjp(forward, x, w)
        return y, *pullback(dy)

    exported = jax.export.export(jax.jit(products), platforms=["tpu"])(
        *(x, w, dy, int32((256,)), int32(()))
    )
    assert [a.shape for a in exported.out_avals] == [dy.shape, x.shape, w.shape]


def test_mosaic_tpu_refuses_what_it_does_not_do():
    def call(x, w):
        return grouped_matmul(x, w, jnp.array([2], jnp.int32), implementation="mosaic_tpu")

    with pytest.raises(NotImplementedError, match="float32 or bfloat16; got float16"):
        call(jnp.ones((2, 64), jnp.float16), jnp.ones((1, 64, 64), jnp.float16))
    with pytest.raises(NotImplementedError, match="at most 512 or multiples of 128; got 600"):
        call(jnp.ones((2, 600)), jnp.ones((1, 600, 64)))


def test_mosaic_gpu_refuses_what_it_does_not_do():
    sizes = jnp.array([2], jnp.int32)

    def call(x, w):
        return grouped_matmul(x, w, sizes, implementation="mosaic_gpu")

    with pytest.raises(NotImplementedError, match="bfloat16 or float16; got float32"):
        call(jnp.ones((2, 64)), jnp.ones((1, 64, 64)))
    x, w = jnp.ones((2, 64), jnp.bfloat16), jnp.ones((1, 64, 96), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="multiples of 64; got 64 and 96"):
        call(x, w)


def test_the_blocks_of_the_xla_backend_cover_every_row_of_every_group_once(rng):
    for _ in range(8):
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


def test_the_tiles_of_the_hopper_kernel_cover_every_row_of_every_group(rng):
    for _ in range(20):
        sizes = rng.integers(0, 40, size=7)
        sizes[rng.integers(7)] = 300
        rows = int(sizes.sum()) + int(rng.integers(0, 5))
        table, used = mosaic_gpu.rows_schedule(
            jnp.asarray(sizes, jnp.int32), jnp.int32(3), rows, 128
        )
        assert int(used[0]) <= len(table)
        owner = np.append(np.repeat(np.arange(7), sizes) + 3, np.full(rows - sizes.sum(), -1))
        covered = np.zeros(rows, int)
        for matrix, first, begin, end in np.asarray(table)[: int(used[0])]:
            assert first % mosaic_gpu.ALIGNED == 0 and (owner[begin:end] == matrix).all()
            covered[max(first, begin) : min(first + 128, end)] += 1
        assert (covered == 1).all()


bfloat16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
int32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)


# DeepSeek-V3's experts in training, a step of few tokens, and sizes that no wide block divides.
@pytest.mark.parametrize(
    ("rows", "groups", "inner", "columns"),
    [(131072, 256, 7168, 2048), (192, 64, 1024, 1024), (301, 3, 192, 320)],
)
def test_the_hopper_kernels_lower_at_real_sizes(rows, groups, inner, columns, monkeypatch):
    monkeypatch.setattr(_pallas, "multiprocessors", lambda: 132)
    x, w, dy = (
        bfloat16((rows, inner)),
        bfloat16((groups, inner, columns)),
        bfloat16((rows, columns)),
    )
    tilings = mosaic_gpu._tilings(x, w, groups)

    def products(x, w, dy, sizes, offset):
        def forward(x, w):
            return mosaic_gpu._grouped_matmul(x, w, sizes, offset, tilings, None)

        y, pullback = jax.vjp(forward, x, w)
        return y, *pullback(dy)

    exported = jax.export.export(jax.jit(products), platforms=["cuda"])(
        *(x, w, dy, int32((groups,)), int32(()))
    )
    assert [a.shape for a in exported.out_avals] == [dy.shape, x.shape, w.shape]


def test_a_measured_tiling_is_taken_for_its_class_of_shapes(monkeypatch, tmp_path):
    tiling = config.Tiling(128, 128, 2, 4, 128)
    kind = jax.devices()[0].device_kind
    found = {config.key("rows", 1000, 4, 64, 128): {"settings": vars(tiling)}}
    (tmp_path / "grouped_matmul.json").write_text(json.dumps({kind: found}))
    monkeypatch.setattr(_tuned, "_FOLDER", tmp_path)
    _tuned._settings.cache_clear()
    try:
        assert config.rows_tiling(1024, 4, 64, 128) == tiling
        assert config.rows_tiling(1025, 4, 64, 128) == tiling
        assert config.rows_tiling(2048, 4, 64, 128) != tiling
        assert config.rows_tiling(1024, 4, 64, 128, "rows transposed") != tiling
    finally:
        _tuned._settings.cache_clear()
