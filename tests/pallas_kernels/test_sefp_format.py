"""SEFP's format: the specification's vectors and properties, storage, and what lies outside of its range."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import sefp
from pallas_kernels.sefp import reference
from pallas_kernels.sefp.format import NARROWEST, pack, unpack

WIDTHS = range(3, 9)

# name -> (values, E, {width: q}); the specification's section 6.
VECTORS = {
    "A": (
        [0.8125, -0.40625, 0.1015625, -0.0234375, 0.7197265625, -0.0048828125, 0.3330078125, 0],
        0,
        {
            8: [208, -104, 26, -6, 184, -1, 85, 0],
            7: [104, -52, 13, -3, 92, 0, 42, 0],
            6: [52, -26, 6, -1, 46, 0, 21, 0],
            5: [26, -13, 3, 0, 23, 0, 10, 0],
            4: [13, -6, 1, 0, 11, 0, 5, 0],
            3: [6, -3, 0, 0, 5, 0, 2, 0],
        },
    ),
    "B": (
        [0x27FD, 0xA4CA, 0x1F45, 0x8E8E, 0x2666, 0xA7A8, 0x224C, 0x135F],
        -5,
        {
            8: [255, -153, 58, -3, 204, -245, 100, 7],
            7: [127, -76, 29, -1, 102, -122, 50, 3],
            6: [63, -38, 14, 0, 51, -61, 25, 1],
            5: [31, -19, 7, 0, 25, -30, 12, 0],
            4: [15, -9, 3, 0, 12, -15, 6, 0],
            3: [7, -4, 1, 0, 6, -7, 3, 0],
        },
    ),
    "C, a huge range": (
        [1024, -3, 0.125, 4, -1023.5, 7.98828125, 8, -16],
        11,
        {
            8: [128, 0, 0, 0, -127, 0, 1, -2],
            7: [64, 0, 0, 0, -63, 0, 0, -1],
            6: [32, 0, 0, 0, -31, 0, 0, 0],
            5: [16, 0, 0, 0, -15, 0, 0, 0],
            4: [8, 0, 0, 0, -7, 0, 0, 0],
            3: [4, 0, 0, 0, -3, 0, 0, 0],
        },
    ),
    "D, saturation": (
        [0.99951171875, -0.5, 0.9375, -0.96875, 0.53125, 0.46875, -0.0625, 0.03125],
        0,
        {
            8: [255, -128, 240, -248, 136, 120, -16, 8],
            7: [127, -64, 120, -124, 68, 60, -8, 4],
            6: [63, -32, 60, -62, 34, 30, -4, 2],
            5: [31, -16, 30, -31, 17, 15, -2, 1],
            4: [15, -8, 15, -15, 8, 7, -1, 0],
            3: [7, -4, 7, -7, 4, 3, 0, 0],
        },
    ),
    "S, float16 subnormals": (
        [0x0001, 0x8002, 0x01F7, 0x83EF, 0x0000, 0x0011, 0x8022, 0x0063],
        -14,
        {
            8: [0, 0, 125, -251, 0, 4, -8, 24],
            7: [0, 0, 62, -125, 0, 2, -4, 12],
            6: [0, 0, 31, -62, 0, 1, -2, 6],
            5: [0, 0, 15, -31, 0, 0, -1, 3],
            4: [0, 0, 7, -15, 0, 0, 0, 1],
            3: [0, 0, 3, -7, 0, 0, 0, 0],
        },
    ),
    "F, the largest float16": (
        [65504, -32768, 1, -0.5, 256, 511.75, -255, 128],
        16,
        {
            8: [255, -128, 0, 0, 1, 1, 0, 0],
            7: [127, -64, 0, 0, 0, 0, 0, 0],
            6: [63, -32, 0, 0, 0, 0, 0, 0],
            5: [31, -16, 0, 0, 0, 0, 0, 0],
            4: [15, -8, 0, 0, 0, 0, 0, 0],
            3: [7, -4, 0, 0, 0, 0, 0, 0],
        },
    ),
    "Z, zeros": ([0] * 8, -14, {m: [0] * 8 for m in WIDTHS}),
}
NEAREST_A = {3: [6, -3, 1, 0, 6, 0, 3, 0], 7: [104, -52, 13, -3, 92, -1, 43, 0]}


def values_of(name):
    values = VECTORS[name][0]
    if name[0] in "BS":  # given as the bits of float16
        return np.array(values, np.uint16).view(np.float16).astype(np.float32)
    return np.array(values, np.float32)


@jax.jit
def unpacked(s):
    return unpack(s.base, s.planes)


def codes(s):
    """[G, N, 64] int32."""
    return np.asarray(unpacked(s))


def encode_one(values, width=8, **options):
    """(E, q) of one column of at most 64 values."""
    s = sefp.encode(jnp.asarray(np.asarray(values, np.float32)[:, None]), width=width, **options)
    return int(s.exponent[0, 0]), codes(s)[0, 0, : len(values)].tolist()


@pytest.mark.parametrize("name", list(VECTORS))
def test_the_specifications_vectors_at_every_width(name):
    values, (_, exponent, of_width) = values_of(name), VECTORS[name]
    for width in WIDTHS:
        assert encode_one(values, width) == (exponent, of_width[width])
        assert reference.exact_group(values.tolist(), width) == (exponent, of_width[width])
        s = sefp.encode(jnp.asarray(values[:, None])).truncate(width)
        assert codes(s)[0, 0, :8].tolist() == of_width[width]
        expected = np.ldexp(np.array(of_width[width], np.float64), exponent - width)
        for dtype in (jnp.bfloat16, jnp.float32, jnp.float16):
            np.testing.assert_array_equal(
                np.asarray(sefp.decode(s, dtype=dtype), np.float64)[:, 0], expected
            )


@pytest.mark.parametrize("width", NEAREST_A)
def test_rounding_to_nearest_where_it_is_asked_for(width):
    assert encode_one(values_of("A"), width, rounding="nearest")[1] == NEAREST_A[width]


def closed_form():
    i = np.arange(64)
    w = (((7919 * i + 104729) % 4096) - 2048) / 2048 / 32
    x = (((104729 * i + 7) % 512) - 256) / 256
    return w.astype(np.float32), x


def test_the_closed_form_group_its_planes_and_its_dot_products():
    w, x = closed_form()
    s = sefp.encode(jnp.asarray(w[:, None]))
    q = codes(s)[0, 0]
    assert int(s.exponent[0, 0]) == -5
    assert q[:8].tolist() == [35, 1, -33, -67, -101, -135, -169, -203]
    sums = {8: (11, 7761), 7: (6, 3856), 6: (2, 1914), 5: (0, 944), 4: (0, 460), 3: (-2, 228)}
    dots = {8: 37121, 7: 18741, 6: 9615, 5: 4764, 4: 2294, 3: 1094}
    for width in WIDTHS:
        q = codes(s.truncate(width))[0, 0].astype(np.int64)
        assert (q.sum(), np.abs(q).sum()) == sums[width]
        assert int((q * (256 * x).astype(np.int64)).sum()) == dots[width]
    stored = [int.from_bytes(np.asarray(p)[0, 0].tobytes(), "little") for p in s.planes]
    assert stored == [
        0x0040008001000200,
        0x03B807700EE01DC0,
        0x0DA61B4C32986530,
        0x9695292A5654A8A9,
        0x3C3E7C7EFCFFFDFF,
    ]
    nibbles = [(int(word) >> 4 * n) & 15 for word in s.base[0, 0, :2] for n in range(8)]
    expected = [int(digit, 16) for digit in "109abcdef7654321"]
    assert [n & 7 for n in nibbles] == [n & 7 for n in expected]
    turned = [nibbles[i // 8 * 8 + (i + 2) % 8] >> 3 for i in range(16)]
    assert turned == [n >> 3 for n in expected]


groups_of_floats = st.lists(
    st.floats(-60000, 60000, width=16, allow_subnormal=True), min_size=1, max_size=64
)


@given(groups_of_floats, st.integers(3, 8), st.sampled_from(["truncate", "nearest"]))
def test_any_group_equals_exact_arithmetic(values, width, rounding):
    padded = values + [0.0] * (64 - len(values))  # one shape, one program
    assert encode_one(padded, width, rounding=rounding) == reference.exact_group(
        padded, width, rounding=rounding
    )


@given(groups_of_floats)
def test_properties_of_a_group(values):
    w = np.array(values + [0.0] * (64 - len(values)), np.float32)
    s = sefp.encode(jnp.asarray(w[:, None]))
    exponent, before, at = int(s.exponent[0, 0]), np.zeros(64), {}
    for width in WIDTHS:
        narrow = s.truncate(width)
        value = np.asarray(sefp.decode(narrow, dtype=jnp.float32), np.float64)[:, 0]
        at[width] = value
        q = codes(narrow)[0, 0]
        # Cutting off: less than one quantum, never past zero or the value, never changing sign.
        lost = np.abs(w) - np.abs(value)
        assert (lost >= 0).all() and (lost < math.ldexp(1, exponent - width)).all()
        assert (np.sign(value) * np.sign(w) >= 0).all()
        assert (np.abs(before) <= np.abs(value)).all()
        # The next plane adds nothing, or one of its quanta.
        step = np.abs(value - before) / math.ldexp(1, exponent - width)
        assert width == 3 or np.isin(step, (0, 1)).all()
        # Encoding at the width equals dropping planes; doing it again changes nothing.
        again = sefp.encode(jnp.asarray(value.astype(np.float32)[:, None]), width=width)
        assert (codes(again)[0, 0] == q).all() and int(again.exponent[0, 0]) == exponent
        assert (np.diff(q[np.argsort(w, kind="stable")]) >= 0).all()
        # Odd, and a permutation moves codes only.
        assert (codes(sefp.encode(jnp.asarray(-w[:, None]), width=width))[0, 0] == -q).all()
        turned = sefp.encode(jnp.asarray(w[::-1, None]), width=width)
        assert (codes(turned)[0, 0] == q[::-1]).all()
        before = value
    if -14 < exponent < 17:
        double = sefp.encode(jnp.asarray(2 * w[:, None]))
        assert int(double.exponent[0, 0]) == exponent + 1 or not w.any()


def test_rounding_to_nearest_does_not_nest():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((64, 64)), jnp.float32)
    nested = sefp.encode(w, rounding="nearest").truncate(4)
    assert (codes(nested) != codes(sefp.encode(w, width=4, rounding="nearest"))).any()


@pytest.mark.parametrize(("width", "bits"), [(7, 8), (3, 4), (1, 2)])
def test_equals_the_mx_emulators_integers_in_blocks_of_64(width, bits):
    """MX int(bits), floor: quantum 2^(e - bits + 2), at most 2^(bits - 1) - 1 of them; written from its formula."""
    w = np.random.default_rng(1).standard_normal((64, 50)).astype(np.float32)
    quantum = np.exp2(np.floor(np.log2(np.abs(w).max(0))) - bits + 2)
    whole = np.minimum(np.floor(np.abs(w) / quantum), 2 ** (bits - 1) - 1)
    ours = sefp.sefp_truncate(jnp.asarray(w), width, implementation="xla")
    np.testing.assert_array_equal(ours, np.sign(w) * whole * quantum)


def test_signal_to_noise_of_normal_weights_is_the_specifications():
    w = (
        (np.random.default_rng(0).standard_normal(2**17) * 0.02)
        .astype(np.float16)
        .astype(np.float32)
    )
    s = sefp.encode(jnp.asarray(w.reshape(-1, 64).T))
    expected = {8: 42.06, 7: 35.93, 6: 29.88, 5: 23.88, 4: 17.97, 3: 12.19}
    for width, db in expected.items():
        error = np.asarray(sefp.decode(s, width=width, dtype=jnp.float32)).T.reshape(-1) - w
        assert abs(10 * np.log10((w**2).sum() / (error**2).sum()) - db) < 0.1


def test_bytes_are_counted_exactly():
    s = sefp.encode(jnp.ones((2, 128, 10)))
    for width in WIDTHS:
        narrow = s.truncate(width)
        stored = sum(a.nbytes for a in jax.tree.leaves(narrow))
        assert narrow.nbytes() == s.nbytes(width) == stored
        assert 8 * stored / (2 * 128 * 10) == sefp.bits_per_weight(width)
    assert [sefp.bits_per_weight(m) for m in (8, 3)] == [9.125, 4.125]
    assert s.nbytes(3) / s.nbytes(8) < 0.46


def test_dropping_planes_shares_the_arrays():
    s = sefp.encode(jnp.ones((64, 3)))
    narrow = s.truncate(4)
    assert narrow.base is s.base and narrow.planes[0] is s.planes[0] and narrow.width == 4


def test_an_inner_size_that_64_does_not_divide_is_padded_inside(rng):
    w = jnp.asarray(rng.standard_normal((100, 3)), jnp.float32)
    s = sefp.encode(w)
    assert s.shape == (100, 3) and s.exponent.shape == (2, 3)
    assert sefp.decode(s).shape == (100, 3)
    whole = sefp.encode(jnp.pad(w, ((0, 28), (0, 0))))
    np.testing.assert_array_equal(sefp.decode(s), sefp.decode(whole)[:100])


def test_is_a_pytree_that_is_stacked_scanned_and_mapped(rng):
    w = jnp.asarray(rng.standard_normal((3, 64, 4)), jnp.float32)
    s = jax.jit(sefp.encode)(w)
    assert s.shape == (3, 64, 4) and jax.tree.map(lambda a: a[1], s).shape == (64, 4)
    _, scanned = jax.lax.scan(lambda _, one: (None, sefp.decode(one)), None, s)
    np.testing.assert_array_equal(scanned, sefp.decode(s))
    np.testing.assert_array_equal(jax.vmap(sefp.decode)(s), sefp.decode(s))


def test_packing_is_the_inverse_of_unpacking(rng):
    sign, magnitude = rng.integers(0, 2, (2, 3, 64)), rng.integers(0, 256, (2, 3, 64))
    s = pack(jnp.zeros((2, 3), jnp.int8), jnp.asarray(sign), jnp.asarray(magnitude), 8, 128)
    np.testing.assert_array_equal(codes(s), np.where(sign, -magnitude, magnitude))


def test_nan_and_infinity_are_refused_and_in_traced_code_counted():
    w = jnp.array([jnp.nan, jnp.inf, 1.0, 3e38])[:, None]
    with pytest.raises(ValueError, match="NaN or infinity"):
        sefp.encode(w)
    s = jax.jit(sefp.encode)(w)
    assert int(s.exponent[0, 0]) == 17  # of 3e38, as far as it goes
    assert codes(s)[0, 0, :4].tolist() == [0, 65504 // 512, 0, 255]
    counts = {k: int(v) for k, v in sefp.unrepresentable(w).items()}
    assert counts == {"nan": 1, "inf": 1, "saturated": 1}


@pytest.mark.parametrize("width", [2, 9])
def test_widths_that_cannot_be_stored_are_refused(width):
    with pytest.raises(ValueError, match="width must be"):
        sefp.encode(jnp.ones((64, 1)), width=width)
    with pytest.raises(ValueError, match="width must be"):
        sefp.encode(jnp.ones((64, 1))).truncate(width)


@given(groups_of_floats)
def test_nested_rounding_takes_the_best_of_all_codes_and_nests(values):
    w = np.array(values + [0.0] * (64 - len(values)), np.float32)
    s = sefp.encode(jnp.asarray(w[:, None]), rounding="nested")
    q = codes(s)[0, 0].astype(np.int64)
    x = np.abs(w.astype(np.float64)) * 2.0 ** (8 - int(s.exponent[0, 0]))

    def error(code):
        each = [np.square((code >> n << n) - x) for n in range(6)]
        return sum(each[:-1], NARROWEST * each[-1])

    least = error(np.arange(256)[:, None]).min(0)
    assert (error(np.abs(q)) <= least * (1 + 1e-5) + 1e-9).all()
    assert ((q == 0) | ((q < 0) == (w < 0))).all()
    for width in WIDTHS:
        narrow = sefp.encode(jnp.asarray(w[:, None]), width=width, rounding="nested")
        assert (codes(narrow) == codes(s.truncate(width))).all()


def test_nested_rounding_is_closer_than_cutting_off_wherever_that_hurts():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((64, 256)), jnp.float32)

    def decibels(rounding, width):
        lost = sefp.decode(sefp.encode(w, rounding=rounding), width=width, dtype=jnp.float32) - w
        return 10 * np.log10(np.mean(np.square(w)) / np.mean(np.square(lost)))

    assert (
        decibels("nested", 3) > decibels("truncate", 3) + 4.5
    )  # most of what the nearest has: 5.5
    assert decibels("nested", 4) > decibels("truncate", 4) + 1.5
    assert min(decibels("nested", width) for width in (8, 7, 6, 5)) > 20  # E5M4 cut off: 17.1
