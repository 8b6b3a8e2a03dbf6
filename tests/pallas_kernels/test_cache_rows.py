"""Stored rows: byte for byte against NumPy, and how far what is read back may be from what was written."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels import cache_rows

# (values, rest): V3.2's latent and index key, those of ``tiny``, a short last tile, and nothing in 8 bits but one value.
SIZES = [(512, 64), (128, 0), (64, 16), (32, 0), (200, 10), (1, 3)]

encode = jax.jit(cache_rows.encode, static_argnums=(1, 2))
decode = jax.jit(cache_rows.decode, static_argnums=(1, 2))


def round_trip(rows, values, dtype=jnp.uint8):
    return np.asarray(decode(encode(rows, values, dtype), values, jnp.float32))


def packed(row: np.ndarray, values: int) -> bytes:
    """The row as the format is described, one tile at a time."""
    codes, scales = b"", b""
    for first in range(0, values, 128):
        tile = row[first : min(first + 128, values)].astype(np.float64)
        least = max(np.abs(tile).max() / 448, 1e-4)
        scale = 2.0 ** math.ceil(math.log2(least))
        codes += (tile / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).tobytes()
        scales += np.float32(scale).tobytes()
    return codes + scales + row[values:].astype(ml_dtypes.bfloat16).tobytes()


@pytest.mark.parametrize(("values", "rest"), SIZES)
def test_rows_are_stored_as_described(values, rest, rng):
    rows = rng.standard_normal((2, 5, values + rest)).astype(np.float32)
    rows *= np.float32(10) ** rng.integers(-6, 6, (2, 5, 1)).astype(np.float32)
    stored = encode(rows, values, jnp.uint8)
    assert stored.shape[-1] == cache_rows.stored_size(values + rest, values, jnp.uint8)
    for place in np.ndindex(2, 5):
        assert np.asarray(stored)[place].tobytes() == packed(rows[place], values)


def test_the_rows_of_deepseek_v32_have_their_sizes():
    assert cache_rows.stored_size(576, 512, jnp.uint8) == 656
    assert cache_rows.stored_size(128, 128, jnp.uint8) == 132
    assert cache_rows.stored_size(576, 512, jnp.bfloat16) == 576


finite = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


@given(
    hnp.arrays(
        np.float32, (40,), elements=finite | st.sampled_from([448.0, -449.0, 0.0, -0.0, 7.0])
    )
)
def test_a_value_is_off_by_a_sixteenth_or_a_thousandth_of_the_scale(row):
    scale = 2.0 ** math.ceil(math.log2(max(np.abs(row).max() / 448, 1e-4)))
    off = np.abs(round_trip(row, 40).astype(np.float64) - row)
    # Half of the last of three mantissa bits; half of the smallest number, 2^-9.
    assert (off <= np.maximum(np.abs(row) / 16, scale / 1024)).all()


@given(hnp.arrays(np.float32, (3, 150), elements=finite))
def test_what_was_read_back_is_stored_and_read_back_unchanged(rows):
    once = round_trip(rows, 140)
    np.testing.assert_array_equal(round_trip(once, 140), once)


@pytest.mark.parametrize("exponent", [-12, 0, 5, 100])
def test_the_largest_value_of_a_tile_may_be_exactly_448_scales(exponent):
    row = np.float32(2.0**exponent) * np.array([448, -448, 1, 0], np.float32)
    np.testing.assert_array_equal(round_trip(row, 4), row)
    (scale,) = np.asarray(encode(row, 4, jnp.uint8))[4:].view(np.float32)
    assert scale == 2.0**exponent
    row[1] = np.nextafter(row[1], np.float32(-np.inf))
    (scale,) = np.asarray(encode(row, 4, jnp.uint8))[4:].view(np.float32)
    assert scale == 2.0 ** (exponent + 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 130, 149])
def test_what_is_not_finite_stays_so(bad, place, rng):
    row = rng.standard_normal(150).astype(np.float32)
    row[place] = bad
    assert not np.isfinite(round_trip(row, 140)[place])


def test_every_byte_is_read_as_float8(rng):
    codes = np.arange(256, dtype=np.uint8)
    scales = np.array([0.5, 8.0], np.float32)
    row = np.concatenate([codes, scales.view(np.uint8)])
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.repeat(scales, 128)
    np.testing.assert_array_equal(decode(row, 256, jnp.float32), expected)


def test_bfloat16_rows_are_rounded_even_if_nothing_but_xla_reads_them(rng):
    """XLA may otherwise drop a conversion there and back."""
    rows = rng.standard_normal((4, 33)).astype(np.float32)
    both = jax.jit(functools.partial(cache_rows.decode, values=30, dtype=jnp.float32))
    got = jax.jit(lambda x: both(cache_rows.encode(x, 30, jnp.bfloat16)))(rows)
    np.testing.assert_array_equal(got, rows.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_float_rows_are_themselves(dtype, rng):
    rows = jnp.asarray(rng.standard_normal((4, 33)), dtype)
    stored = encode(rows, 30, dtype)
    np.testing.assert_array_equal(stored, rows)
    np.testing.assert_array_equal(decode(stored, 30, dtype), rows)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.uint8])
def test_a_row_is_the_same_bytes_in_any_company(dtype, rng):
    rows = rng.standard_normal((70, 90)).astype(np.float32)
    together = np.asarray(encode(rows, 80, dtype))
    for r in range(0, 70, 23):
        np.testing.assert_array_equal(together[r], encode(rows[r : r + 1], 80, dtype)[0])
