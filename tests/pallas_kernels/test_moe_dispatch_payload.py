"""Rows encoded on their way, and what the Hopper kernels refuse and lower to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from pallas_kernels import cache_rows, dispatch, sefp
from pallas_kernels.moe_dispatch import (
    Encoded,
    Payload,
    api,
    config,
    decode_rows,
    mosaic_gpu,
    payload,
    sefp_payload,
)

# At most half a unit in the last place of 3 bits of mantissa, or of the smallest step of float8_e4m3fn (2^-9) times the scale.
FP8_RELATIVE, FP8_STEP = 2**-4, 2**-10


def int8_with_scales(tiles):
    """A payload as another package would write it: 7 bits and a float32 scale for 64 numbers."""
    largest = jnp.maximum(jnp.abs(tiles).max(-1), 1e-6)
    factor = lax.broadcast_in_dim(127 / largest, tiles.shape, tuple(range(largest.ndim)))
    return jnp.round(tiles * factor).astype(jnp.int8), largest / 127


def halves_packed(tiles):
    """A payload that no warpgroup encodes in place: two numbers in one byte."""
    low, high = (tiles[..., i::2] > 0 for i in (0, 1))
    return (low.astype(jnp.uint8) | high.astype(jnp.uint8) << 4,)


INT8, PACKED = Payload(64, int8_with_scales, fuses=True), Payload(64, halves_packed)


@functools.partial(jax.jit, static_argnames=("experts", "dtype", "implementation"))
def run(x, ids, experts, dtype, implementation):
    return dispatch(x, ids, experts, dtype=dtype, implementation=implementation)


class Cases:
    """What every backend must satisfy."""

    implementation: str

    @pytest.fixture
    def inputs(self, rng):
        """(x, ids, the rows that dispatch must encode)."""
        x = rng.standard_normal((5, 512), np.float32) * 2.0 ** rng.integers(-9, 9, (5, 1))
        x[0, :128] = 0
        x[1, 7] = 3e4
        ids = np.asarray([[0, 1], [2, -1], [1, 0], [-1, -1], [2, 0]], np.int32)
        x = x.astype(jnp.bfloat16)
        return x, ids, np.asarray(run(x, ids, 3, None, "xla").rows, np.float64)

    def test_fp8_rows_are_within_the_formats_error_and_scaled_as_in_a_cache(self, inputs):
        x, ids, rows = inputs
        encoded = run(x, ids, 3, jnp.float8_e4m3fn, self.implementation).rows
        assert isinstance(encoded, Encoded) and encoded.values.dtype == jnp.float8_e4m3fn
        assert encoded.scales.dtype == jnp.float32 and encoded.scales.shape == (10, 4)
        scales = np.repeat(np.asarray(encoded.scales, np.float64), 128, axis=1)
        error = np.abs(np.asarray(encoded.values, np.float64) * scales - rows)
        assert (error <= np.maximum(FP8_RELATIVE * np.abs(rows), FP8_STEP * scales)).all()
        stored = cache_rows.encode(jnp.asarray(rows[:7], jnp.bfloat16), 512, jnp.uint8)
        np.testing.assert_array_equal(
            lax.bitcast_convert_type(encoded.values[:7], jnp.uint8), stored[:, :512]
        )
        assert not scales[7:].any() and not np.asarray(encoded.values[7:], np.float32).any()

    def test_rows_are_cast(self, inputs):
        x, ids, rows = inputs
        wide = x.astype(np.float32) * np.float32(1.001)
        cast = run(wide, ids, 3, jnp.bfloat16, self.implementation).rows
        expected = run(wide.astype(jnp.bfloat16), ids, 3, None, "xla").rows
        assert cast.dtype == jnp.bfloat16
        np.testing.assert_array_equal(
            np.asarray(cast, np.float32), np.asarray(expected, np.float32)
        )

    @pytest.mark.parametrize("dtype", [INT8, PACKED], ids=["int8", "packed"])
    def test_another_payload_arrives_as_it_was_encoded(self, inputs, dtype):
        x, ids, rows = inputs
        moved = run(x, ids, 3, dtype, self.implementation).rows
        expected = dtype.encode(jnp.asarray(rows[:7], jnp.float32).reshape(7, -1, 64))
        got = moved if isinstance(moved, Encoded) else (moved,)
        for part, other in zip(got, expected, strict=True):
            np.testing.assert_array_equal(part[:7], other.reshape(7, -1))
            assert not np.asarray(part[7:]).any()

    @pytest.mark.parametrize("width", [3, 5, 8])
    def test_sefp_rows_equal_the_truncated_rows(self, inputs, width):
        x, ids, _ = inputs
        moved = run(np.tile(x, 2), ids, 3, sefp_payload(width), self.implementation).rows
        assert (
            moved.values.shape == (10, 1024 // 8 * (width + 1)) and moved.scales.dtype == jnp.int8
        )
        wide = jnp.asarray(np.tile(x, 2), jnp.float32)
        truncated = sefp.sefp_truncate(wide, width, axis=-1, implementation="xla")
        expected = run(truncated, ids, 3, None, "xla").rows
        np.testing.assert_array_equal(decode_rows(moved, sefp_payload(width)), expected)


class TestXla(Cases):
    implementation = "xla"


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="refused there")
class TestMosaicTpu(Cases):
    implementation = "mosaic_tpu"


@pytest.mark.skipif(jax.default_backend() == "tpu", reason="refused there")
class TestMosaicGpu(Cases):
    implementation = "mosaic_gpu"


def test_a_short_last_tile_has_a_scale_of_its_own():
    x = jnp.concatenate([jnp.full((1, 128), 448.0), jnp.full((1, 8), 1.75)], axis=1)
    rows = run(x, jnp.zeros((1, 1), jnp.int32), 1, jnp.float8_e4m3fn, "xla").rows
    np.testing.assert_array_equal(rows.scales, [[1.0, 2.0**-8]])
    np.testing.assert_array_equal(np.asarray(rows.values, np.float32), np.full((1, 136), 448.0))
    np.testing.assert_array_equal(decode_rows(rows, payload.FP8), x)


def test_a_cast_has_the_gradient_of_a_copy():
    ids = jnp.asarray([[0, 1], [1, -1]], jnp.int32)

    def total(x):
        return dispatch(x, ids, 2, dtype=jnp.bfloat16).rows.astype(jnp.float32).sum()

    dx = jax.jit(jax.grad(total))(jnp.ones((2, 3), jnp.float32))
    assert dx.dtype == jnp.float32
    np.testing.assert_array_equal(dx, [[2] * 3, [1] * 3])


@pytest.mark.misuse
def test_rows_with_scales_have_no_gradient():
    def total(x):
        return dispatch(
            x, jnp.zeros((2, 1), jnp.int32), 1, dtype=jnp.float8_e4m3fn
        ).rows.scales.sum()

    with pytest.raises(NotImplementedError, match="rows with scales are forward only"):
        jax.jit(jax.grad(total))(jnp.ones((2, 128), jnp.float32))


@pytest.mark.misuse
def test_dispatch_names_a_dtype_that_is_none():
    with pytest.raises(ValueError, match="dispatch: dtype must be None, .* got int32"):
        dispatch(jnp.ones((2, 4)), jnp.zeros((2, 1), jnp.int32), 1, dtype=jnp.int32)


@pytest.mark.parametrize("highest", [3, 2**30])
def test_keys_are_sorted_stably_whether_or_not_they_fit_a_word_with_their_index(highest, rng):
    keys = rng.integers(0, 4, 300).astype(np.int32)
    ordered, order = api._sorted(jnp.asarray(keys), highest)
    expected = np.argsort(keys, kind="stable")
    np.testing.assert_array_equal(order, expected)
    np.testing.assert_array_equal(ordered, keys[expected])


@pytest.mark.misuse
@pytest.mark.skipif(jax.default_backend() == "tpu", reason="refused there, of any size")
@pytest.mark.parametrize("size", [4, 200, 128 * 257])
def test_rows_that_tma_cannot_move_are_refused(size):
    ids = jnp.zeros((2, 1), jnp.int32)
    with pytest.raises(NotImplementedError, match=f"TMA moves rows of whole 128.* D is {size}"):
        dispatch(jnp.ones((2, size)), ids, 1, implementation="mosaic_gpu")


@pytest.mark.skipif(jax.default_backend() == "tpu", reason="refused there, of any size")
def test_rows_that_shared_memory_does_not_hold_are_refused():
    x, ids = jnp.ones((2, 32768)), jnp.zeros((2, 1), jnp.int32)
    with pytest.raises(
        NotImplementedError, match=r"229376 bytes of shared memory for rows.* 393216"
    ):
        dispatch(x, ids, 1, implementation="mosaic_gpu")
    # The heuristic's pipeline fits for the longest rows that registers hold; a deeper one does not.
    deep = config.Config(blocks=1, depth=12, stores=2)
    with pytest.raises(
        NotImplementedError, match=r"229376 bytes of shared memory for rows.* 491520"
    ):
        mosaic_gpu.weighted_sum(x[:, :8192], ids, jnp.ones((2, 1)), config=deep)


def test_the_default_on_a_gpu_moves_little_by_xla():
    assert api._PREFERENCE["gpu"] == ("mosaic_gpu", "xla")
    assert api._choose(None, config.SMALL - 1) == "xla"
    assert api._choose(None, config.SMALL) is None
    assert api._choose("mosaic_gpu", 1) == "mosaic_gpu"


@pytest.fixture
def for_cuda(monkeypatch):
    """Kernels are compiled, not simulated."""
    monkeypatch.setattr(mosaic_gpu._pallas, "interpret_gpu", lambda: None)


def lowered(run, *shapes):
    """The CUDA module's bytes; needs no GPU."""
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    return len(export.export(jax.jit(run), platforms=["cuda"])(*arguments).mlir_module_serialized)


@pytest.mark.parametrize("size", [8192, 16384])
def test_the_longest_float32_rows_lower(for_cuda, size):
    x, indices = ((512, size), jnp.float32), (((1024,), jnp.int32), ((512, 2), jnp.int32))
    gather = mosaic_gpu.gather_rows
    assert lowered(gather, x, *indices)
    if size == 8192:
        add = mosaic_gpu.weighted_sum
        assert lowered(add, x, indices[1], ((512, 2), jnp.float32))


@pytest.mark.parametrize("size", [1024, 1408, 7168, 8192])
def test_kernels_lower_at_the_sizes_they_are_for(for_cuda, size):
    tokens, active = 16384, 8
    indices = ((tokens * active,), jnp.int32), ((tokens, active), jnp.int32)
    x = (tokens, size), jnp.bfloat16
    gather = mosaic_gpu.gather_rows
    assert lowered(gather, x, *indices)
    assert lowered(functools.partial(gather, payload=payload.FP8), x, *indices)
    if size % 1024 == 0:
        assert lowered(functools.partial(gather, payload=sefp_payload(3)), x, *indices)
    add = mosaic_gpu.weighted_sum
    rows = (tokens * active, size), jnp.bfloat16
    assert lowered(add, rows, indices[1], ((tokens, active), jnp.float32))
