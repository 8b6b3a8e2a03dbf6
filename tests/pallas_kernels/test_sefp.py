"""sefp_truncate and sefp_matmul: every backend against NumPy in float64 on the exactly decoded weights."""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels import native, sefp_matmul, sefp_truncate
from pallas_kernels.sefp import Sefp, config, decode, encode, mosaic_gpu, operand, reference
from pallas_kernels.sefp.format import unpack

WIDTHS = range(3, 9)
# float32 sums of K products: up to K * 2**-24 of the sum of magnitudes. bfloat16 outputs: half a unit in the last of 8 bits.
ROUNDING = {jnp.float32: 2.0**-15, jnp.bfloat16: 2.0**-8}


def assert_equals_product(got, x, w):
    """``got`` is x @ w of float32, up to the rounding of its sums."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    bound = ROUNDING[jnp.float32] * (np.abs(x) @ np.abs(w))
    assert (np.abs(np.asarray(got, np.float64) - x @ w) <= bound).all()


def weights(rng, inner, columns):
    """Groups of every size: normal, tiny, huge, all zero, and one with a single large member."""
    w = rng.standard_normal((inner, columns)) * np.exp2(rng.integers(-20, 12, columns))
    w[:, 0] = 0
    w[:64, -1] *= np.where(np.arange(min(64, inner)) == 5, 1e3, 1e-3)
    return jnp.asarray(w, jnp.float32)


@functools.partial(jax.jit, static_argnames=("width", "implementation"))
def multiply(x, s, width, implementation):
    return sefp_matmul(x, s, width=width, implementation=implementation)


# name -> (rows, inner, columns)
MATMUL_CASES = {
    "one row": (1, 192, 256),
    "five rows": (5, 128, 64),
    "an inner size with a ragged tail": (2, 200, 128),
    "less than a group": (3, 40, 128),
    "odd columns": (2, 64, 13),
    "more rows than a tile": (70, 64, 64),
}


class MatmulCases:
    """What every backend must satisfy; a subclass names the backend and inherits all of it."""

    implementation: str
    dtype = jnp.float32
    cases = tuple(MATMUL_CASES)
    widths = WIDTHS

    def check(self, x, s, width):
        got = np.asarray(multiply(x, s, width, self.implementation), np.float64)
        w = np.asarray(decode(s, width=width, dtype=jnp.float32), np.float64)
        exact = np.asarray(x, np.float64) @ w
        bound = np.abs(np.asarray(x, np.float64)) @ np.abs(w)
        assert (np.abs(got - exact) <= ROUNDING[self.dtype] * bound).all()

    @pytest.mark.parametrize("case", list(MATMUL_CASES))
    def test_equals_the_product_with_the_decoded_weights(self, case, rng):
        if case not in self.cases:
            pytest.skip("refused by this backend, as its own tests show")
        rows, inner, columns = MATMUL_CASES[case]
        s = encode(weights(rng, inner, columns))
        x = jnp.asarray(rng.standard_normal((rows, inner)), self.dtype)
        for width in self.widths if case == self.cases[0] else self.widths[-1:]:
            self.check(x, s, width)


class TestReferenceMatmul(MatmulCases):
    implementation = "reference"


class TestXlaMatmul(MatmulCases):
    implementation = "xla"


@pytest.mark.skipif(not native.available(), reason="needs a CPU and a C++ compiler")
class TestNativeMatmul(MatmulCases):
    implementation = "native"

    # 3 rows are few; 5 make the weights be decoded once; 100 are two blocks.
    @pytest.mark.parametrize("rows", [3, 5, 100])
    def test_a_row_has_the_same_bits_whatever_its_company(self, rng, rows):
        s = encode(weights(rng, 150, 29))
        x = jnp.asarray(rng.standard_normal((rows, 150)), jnp.float32)
        for width in (3, 6, 8):
            together = multiply(x, s, width, "native")
            for i in range(0, rows, max(1, rows // 3)):
                alone = multiply(x[i : i + 1], s, width, "native")
                np.testing.assert_array_equal(together[i], alone[0])

    def test_refuses_other_types(self, rng):
        s = encode(weights(rng, 64, 8))
        with pytest.raises(NotImplementedError, match="float32"):
            sefp_matmul(jnp.ones((1, 64), jnp.bfloat16), s, implementation="native")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a TPU kernel")
class TestMosaicTpuMatmul(MatmulCases):
    implementation = "mosaic_tpu"
    cases = ("one row", "an inner size with a ragged tail")

    def test_refuses_columns_that_do_not_fill_a_register(self, rng):
        with pytest.raises(NotImplementedError, match="N must be"):
            sefp_matmul(jnp.ones((1, 64)), encode(jnp.ones((64, 64))), implementation="mosaic_tpu")


@pytest.mark.skipif(jax.default_backend() == "tpu", reason="a GPU kernel")
class TestMosaicGpuMatmul(MatmulCases):
    implementation = "mosaic_gpu"
    dtype = jnp.bfloat16
    cases = ("five rows",)

    def test_refuses_what_it_cannot_do(self):
        s = encode(jnp.ones((64, 64)))
        for x, columns, reason in (
            (jnp.ones((1, 64)), 64, "bfloat16"),
            (jnp.ones((65, 64), jnp.bfloat16), 64, "rows"),
            (jnp.ones((1, 64), jnp.bfloat16), 63, "N must be"),
        ):
            some = jax.tree.map(lambda a, n=columns: a[:, :n], s)
            with pytest.raises(NotImplementedError, match=reason):
                sefp_matmul(x, some, implementation="mosaic_gpu")


def abstract(inner, columns, width):
    """Weights without numbers."""
    shape, groups = jax.ShapeDtypeStruct, -(-inner // 64)
    words = (groups, columns, 8)
    planes = tuple(shape((groups, columns, 4), jnp.uint16) for _ in range(width - 3))
    return Sefp(shape((groups, columns), jnp.int8), shape(words, jnp.uint32), planes, inner)


@pytest.mark.parametrize(
    ("rows", "inner", "columns", "width"),
    [(1, 4096, 4096, 3), (8, 4096, 14336, 8), (64, 14336, 4096, 5)],
)
def test_the_gpu_product_lowers_at_the_sizes_of_real_layers(
    monkeypatch, rows, inner, columns, width
):
    monkeypatch.setattr(mosaic_gpu._pallas, "interpret_gpu", lambda: None)
    tiling = config.tiling(inner // 64, columns, -(-rows // 8) * 8, width - 3, 132)
    run = functools.partial(mosaic_gpu.sefp_matmul, tiling=tiling)
    x = jax.ShapeDtypeStruct((rows, inner), jnp.bfloat16)
    jax.export.export(jax.jit(run), platforms=["cuda"])(x, abstract(inner, columns, width))


def owners(layout, shape):
    """[warp, lane, register, place in it]: which element of an array of this shape, counted row by row, a thread has there."""
    a = np.arange(np.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        first = a.ndim - len(tile)
        split = [n for size, t in zip(a.shape[first:], tile, strict=True) for n in (size // t, t)]
        a = a.reshape(*a.shape[:first], *split)
        outer, inner = range(first, a.ndim, 2), range(first + 1, a.ndim, 2)
        a = a.transpose(*range(first), *outer, *inner)
    chosen = (*layout.warp_dims, *layout.lane_dims, layout.vector_dim)
    vector = a.shape[layout.vector_dim]
    a = np.moveaxis(a, chosen, (*range(len(chosen) - 1), a.ndim - 1))
    return a.reshape(4, 32, -1, vector)


def test_every_thread_holds_the_bits_of_the_operands_it_owes():
    """Words and halfwords of a tile against what WGMMA wants: the simulator knows no registers."""
    words, halfwords = (
        owners(layout.to_mgpu(), shape)
        for layout, shape in ((operand.WORDS, (32, 16)), (operand.HALFWORDS, (32, 8)))
    )
    wanted = owners(mosaic_gpu.plgpu.Layout.WGMMA.to_mgpu(), (64, 64)).reshape(4, 32, 4, 2, 2, 2)
    order = np.asarray(operand.ordered(jnp.arange(64, dtype=jnp.float32)[None])[0])
    for i, h, row, b in np.ndindex(4, 2, 2, 2):
        output, column = np.divmod(wanted[:, :, i, h, row, b], 64)
        stored_output, word = np.divmod(words[:, :, row, h], 8)
        assert (output == stored_output).all()
        assert (order[column] == 8 * word + 4 * b + i).all()
        stored_output, halfword = np.divmod(halfwords[:, :, row, 0], 4)
        assert (output == stored_output).all() and (halfword == word // 2).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_operands_of_a_warpgroup_are_the_stored_codes(width, rng):
    """One group, and two whose planes share words; random bits are weights too. Of the layouts the simulator knows nothing."""
    base = jnp.asarray(rng.integers(0, 2**32, (2, 64, 8), np.uint32))
    planes = tuple(
        jnp.asarray(rng.integers(0, 2**16, (2, 64, 4), np.uint16)) for _ in range(width - 3)
    )
    q = unpack(base, planes)
    expected = jax.vmap(operand.ordered)(q.astype(jnp.float32)) * 2.0 ** (1 - width)
    for groups in (1, 2):
        words, *bits = ([a.reshape(2, 32, -1)[g] for g in range(groups)] for a in (base, *planes))
        got = operand.operands(words, bits, interpret=True)
        assert len(got) == groups
        for one, group in zip(got, expected, strict=False):
            assert one.dtype == jnp.bfloat16
            np.testing.assert_array_equal(one.astype(jnp.float32), group)


def test_the_factors_of_the_tensor_cores_operand_are_exact():
    """Subnormal bfloat16 numbers times the two factors, in fractions: PTX's fma rounds once."""

    def number(bits):
        exponent, mantissa = (bits >> 7) & 255, Fraction(bits & 127, 128)
        magnitude = (mantissa + (exponent > 0)) * Fraction(2) ** (max(exponent, 1) - 127)
        return -magnitude if bits >> 15 else magnitude

    for bits in range(128):
        for sign in (0, 0x8000):
            unit = Fraction(-1 if sign else 1, 128)
            assert number(sign | bits) * number(operand.ALONE) == 2 * bits * unit
            for last in (0, 1):
                seven, eight = sign | bits, sign | bits | last << 7
                sum_ = number(seven) * number(operand.SEVEN) + number(eight) * number(operand.EIGHT)
                assert sum_ == (2 * bits + last) * unit


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gpu_truncation_lowers_at_the_sizes_of_real_layers(monkeypatch, dtype):
    monkeypatch.setattr(mosaic_gpu._pallas, "interpret_gpu", lambda: None)
    run = functools.partial(mosaic_gpu.sefp_truncate, axis=0, rounding="truncate")
    w, width = jax.ShapeDtypeStruct((4096, 14336), dtype), jax.ShapeDtypeStruct((), jnp.int32)
    jax.export.export(jax.jit(run), platforms=["cuda"])(w, width)


@pytest.mark.parametrize("groups", [1, 3, 64, 224])
@pytest.mark.parametrize("columns", [64, 4096, 14336, 129280])
@pytest.mark.parametrize("rows", [8, 64])
def test_a_tiling_covers_every_group_and_fits_shared_memory(groups, columns, rows):
    for planes in (0, 5):
        t = config.tiling(groups, columns, rows, planes, 132)
        assert columns % (64 * t.warpgroups) == 0
        assert groups % (t.splits * t.groups) == 0
        assert 1 <= t.stages <= groups // (t.splits * t.groups)
        slot = t.groups * (64 * t.warpgroups * (33 + 8 * planes) + 128 * rows)
        assert t.stages * slot <= 200 * 1024


def test_the_default_takes_what_fits_and_names_never_fall_back(rng):
    s = encode(weights(rng, 64, 8))
    for rows in (1, 40):
        x = jnp.asarray(rng.standard_normal((rows, 64)), jnp.float32)
        assert_equals_product(sefp_matmul(x, s), x, decode(s, dtype=jnp.float32))
    with pytest.raises(ExceptionGroup, match="every implementation refused"):
        half = x.astype(jnp.bfloat16)
        sefp_matmul(half, s, implementation=("native", "mosaic_gpu"))


def test_leading_axes_and_stacked_weights(rng):
    w = jnp.asarray(rng.standard_normal((3, 64, 8)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((3, 2, 5, 64)), jnp.float32)
    s = encode(w)
    with pytest.raises(ValueError, match="leading axes"):
        sefp_matmul(x, s)
    run = functools.partial(sefp_matmul, width=5, implementation="xla")
    w = decode(s, width=5, dtype=jnp.float32)[:, None]
    assert_equals_product(jax.vmap(run)(x, s), x, w)


def test_the_gradient_in_x_is_that_of_the_decoded_product(rng):
    s = encode(weights(rng, 100, 12))
    x = jnp.asarray(rng.standard_normal((2, 100)), jnp.float32)
    dy = jnp.asarray(rng.standard_normal((2, 12)), jnp.float32)
    _, pullback = jax.vjp(lambda x: sefp_matmul(x, s, width=4), x)
    assert_equals_product(pullback(dy)[0], dy, decode(s, width=4, dtype=jnp.float32).T)


@pytest.mark.misuse
def test_shapes_widths_and_types_are_checked():
    s = encode(jnp.ones((64, 8)), width=5)
    with pytest.raises(ValueError, match="last axis"):
        sefp_matmul(jnp.ones((1, 63)), s)
    with pytest.raises(ValueError, match="width must be"):
        sefp_matmul(jnp.ones((1, 64)), s, width=6)
    for dtype in (jnp.int32, jnp.float16, jnp.float8_e4m3fn):
        with pytest.raises(TypeError, match=f"float32 or bfloat16; got {dtype.__name__}. Cast it"):
            sefp_matmul(jnp.ones((1, 64), dtype), s)
    for width in (0, 9):
        with pytest.raises(ValueError, match="width must be"):
            sefp_truncate(jnp.ones((64, 8)), width)
    with pytest.raises(ValueError, match="axis"):
        sefp_truncate(jnp.ones((64, 8)), 3, axis=2)
    with pytest.raises(ValueError, match="rounding"):
        sefp_truncate(jnp.ones((64, 8)), 3, rounding="up")
    with pytest.raises(TypeError, match="floating"):
        sefp_truncate(jnp.ones((64, 8), jnp.int32), 3)
    with pytest.raises(TypeError, match="Python int"):
        sefp_truncate(s, jnp.int32(3))


@functools.partial(jax.jit, static_argnames=("axis", "rounding", "implementation"))
def truncated(w, width, axis=-2, rounding="truncate", implementation=None):
    return sefp_truncate(w, width, axis=axis, rounding=rounding, implementation=implementation)


# Zeros of both signs, subnormals, what saturates, NaN and infinity among them.
drawn_columns = hnp.arrays(
    np.float32,
    (64, 2),
    elements=st.one_of(
        st.floats(-65504, 65504, width=32),
        st.sampled_from([np.nan, -np.nan, np.inf, -np.inf, 3e38, -0.0, 2.0**-14, -(2.0**-30)]),
    ),
)
finite_columns = hnp.arrays(np.float32, (64, 2), elements=st.floats(-60000, 60000, width=16))


encoded = jax.jit(encode)  # Traced, so that it counts NaN as zero instead of refusing it.
decode_at = jax.jit(functools.partial(decode, dtype=jnp.float32))


class TruncateCases:
    """What every backend must satisfy."""

    implementation: str
    dtypes = (jnp.float32, jnp.bfloat16, jnp.float16)
    shape = (128, 256)
    widths = (1, 3, 8)

    def cut(self, columns, width):
        """The truncated columns; the shape is that of the other tests, which one program serves."""
        w = np.zeros(self.shape, np.float32)
        w[: columns.shape[0], : columns.shape[1]] = columns
        got = np.asarray(truncated(jnp.asarray(w), width, implementation=self.implementation))
        assert not got[columns.shape[0] :].any() and not got[:, columns.shape[1] :].any()
        return got[: columns.shape[0], : columns.shape[1]]

    @given(finite_columns, st.tuples(st.integers(1, 8), st.integers(1, 8)), st.integers(-6, 6))
    def test_truncation_nests_is_odd_and_scales_by_powers_of_two(self, columns, widths, shift):
        narrow, wide = (self.cut(columns, width) for width in sorted(widths))
        # Toward zero, never across it, and the narrower goes further.
        assert (np.abs(narrow) <= np.abs(wide)).all() and (np.abs(wide) <= np.abs(columns)).all()
        assert (np.sign(narrow) * np.sign(columns) >= 0).all()
        # After a truncation that was as wide, or wider, it is the same.
        for first in (narrow, wide):
            np.testing.assert_array_equal(self.cut(first, min(widths)), narrow)
        np.testing.assert_array_equal(self.cut(-columns, max(widths)), -wide)  # -0 == 0
        # A power of two moves the exponent, where the format has both.
        largest = np.abs(columns).max(0)
        inside = (largest >= 2.0**-8) & (largest < 2.0**9)
        scaled = self.cut(np.ldexp(columns, shift), max(widths))
        np.testing.assert_array_equal(scaled[:, inside], np.ldexp(wide, shift)[:, inside])

    @given(drawn_columns, st.integers(3, 8))
    def test_any_numbers_equal_the_stored_code_and_only_nan_gives_nan(self, columns, width):
        got = self.cut(columns, width)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(columns))
        stored = encoded(jnp.asarray(columns))
        expected = np.asarray(decode_at(sefp_truncate(stored, width)))
        np.testing.assert_array_equal(got, np.where(np.isnan(columns), np.nan, expected))

    def test_equals_encoding_and_decoding_bit_for_bit_with_one_program_for_all_widths(self, rng):
        for dtype in self.dtypes:
            w = jnp.clip(weights(rng, *self.shape), -65504, 65504).astype(dtype)
            before = truncated._cache_size()
            for width in self.widths:
                got = np.asarray(truncated(w, width, implementation=self.implementation))
                if width < 3:
                    expected = np.asarray(
                        reference.sefp_truncate(w, width, axis=0, rounding="truncate")
                    )
                else:
                    expected = np.asarray(decode(encode(w), width=width, dtype=dtype))
                assert got.dtype == dtype
                np.testing.assert_array_equal(got, expected)
                assert not np.signbit(got[got == 0]).any()
            assert truncated._cache_size() - before <= 1

    def test_nan_stays_and_touches_nothing_else(self, rng):
        w = weights(rng, *self.shape)
        broken = w.at[5, 7].set(jnp.nan).at[70, 9].set(jnp.inf).at[3, 11].set(3e38)
        got = np.asarray(truncated(broken, 4, implementation=self.implementation))
        clean = np.asarray(truncated(w.at[5, 7].set(0), 4, implementation=self.implementation))
        assert np.isnan(got[5, 7]) and np.isnan(got).sum() == 1
        same = np.ones(w.shape, bool)
        same[5, 7] = same[64:, 9] = same[:64, 11] = False
        np.testing.assert_array_equal(got[same], clean[same])
        assert (
            got[70, 9] == 61440 and got[3, 11] == 15 * 2**13
        )  # 65504 and saturation, at four bits


class TestReferenceTruncate(TruncateCases):
    implementation = "reference"


class TestXlaTruncate(TruncateCases):
    implementation = "xla"


class Simulated(TruncateCases):
    """Fewer examples: a call takes a tenth of a second."""

    @settings(max_examples=4)
    @given(finite_columns, st.tuples(st.integers(1, 8), st.integers(1, 8)), st.integers(-6, 6))
    def test_truncation_nests_is_odd_and_scales_by_powers_of_two(self, columns, widths, shift):
        inherited = TruncateCases.test_truncation_nests_is_odd_and_scales_by_powers_of_two
        inherited.hypothesis.inner_test(self, columns, widths, shift)

    @settings(max_examples=6)
    @given(drawn_columns, st.integers(3, 8))
    def test_any_numbers_equal_the_stored_code_and_only_nan_gives_nan(self, columns, width):
        inherited = TruncateCases.test_any_numbers_equal_the_stored_code_and_only_nan_gives_nan
        inherited.hypothesis.inner_test(self, columns, width)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a TPU kernel")
class TestMosaicTpuTruncate(Simulated):
    implementation = "mosaic_tpu"
    dtypes = (jnp.float32, jnp.bfloat16)


@pytest.mark.skipif(jax.default_backend() == "tpu", reason="a GPU kernel")
class TestMosaicGpuTruncate(Simulated):
    implementation = "mosaic_gpu"
    dtypes = (jnp.float32, jnp.bfloat16)

    def test_refuses_what_it_cannot_do(self):
        run = functools.partial(sefp_truncate, width=3, implementation="mosaic_gpu")
        for w, options, reason in (
            (jnp.ones((64, 128)), {"axis": 1}, "last axis but one"),
            (jnp.ones((64, 128)), {"rounding": "nearest"}, "cuts off"),
            (jnp.ones((64, 100)), {}, "multiple of"),
            (jnp.ones((64, 256), jnp.float16), {}, "float32 or bfloat16"),
        ):
            with pytest.raises(NotImplementedError, match=reason):
                run(w, **options)


def test_truncation_works_along_any_axis_with_ragged_groups_and_batches(rng):
    w = jnp.asarray(rng.standard_normal((2, 70, 5)), jnp.float32)
    expected = decode(encode(w), width=4, dtype=jnp.float32)
    np.testing.assert_array_equal(truncated(w, 4), expected)
    turned = truncated(jnp.swapaxes(w, 1, 2), 4, axis=-1)
    np.testing.assert_array_equal(jnp.swapaxes(turned, 1, 2), expected)
    for rounding in ("nearest", "nested"):
        stored = decode(encode(w, width=4, rounding=rounding), dtype=jnp.float32)
        np.testing.assert_array_equal(truncated(w, 4, rounding=rounding), stored)


def test_truncating_stored_weights_drops_planes():
    s = encode(jnp.ones((64, 2)))
    assert sefp_truncate(s, 4).width == 4


def test_the_gradient_of_truncation_passes_straight_through(rng):
    w, c = (jnp.asarray(rng.standard_normal((64, 3)), jnp.float32) for _ in range(2))
    for width in (3, 8):
        gradient = jax.grad(lambda w, m=width: (c * sefp_truncate(w, m)).sum())(w)
        np.testing.assert_array_equal(gradient, c)


def test_the_error_of_a_product_is_within_the_specifications_bound(rng):
    w = jnp.asarray(rng.standard_normal((128, 6)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((1, 128)), jnp.float32)
    s, exact = encode(w), np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    across = np.abs(np.asarray(x)).reshape(2, 64).sum(1)
    for width in WIDTHS:
        bound = (np.exp2(np.asarray(s.exponent, np.float64) - width) * across[:, None]).sum(0)
        assert (np.abs(np.asarray(sefp_matmul(x, s, width=width)) - exact) <= bound).all()
