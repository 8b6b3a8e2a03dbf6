"""The kernels of sparse latent attention: what their compilers accept, and a step over a paged cache in their simulators."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cache_rows, sparse_mla, sparse_mla_step
from pallas_kernels.sparse_mla import addresses, config, mosaic_gpu

SCALE = 0.05


def lowered(queries, heads, columns, stored, settings=None, pages=2**18):
    """What the Hopper kernel becomes for CUDA, exported; needs no GPU."""
    size = cache_rows.stored_size(576, 512, stored)
    shapes = [
        ((queries, heads, 576), jnp.bfloat16),
        ((1, pages, 64, size), stored),
        ((), jnp.int32),
        ((queries, 1, size), stored),
        ((queries, 1, columns), jnp.int32),
        ((queries, pages // queries), jnp.int32),
    ]

    def attend(q, *step):
        chosen = addresses.chosen_of_step(*step)
        return mosaic_gpu.attend(q, chosen, SCALE, 512, config=settings, interpret=None)

    arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    return jax.export.export(jax.jit(attend), platforms=["cuda"])(*arrays)


@pytest.mark.parametrize(
    ("queries", "heads", "columns", "stored", "settings"),
    [
        (128, 128, 2048, jnp.bfloat16, None),
        (1, 128, 2048, jnp.bfloat16, config.Config(splits=16)),
        (128, 128, 2048, jnp.uint8, None),
        (8192, 64, 1000, jnp.bfloat16, config.Config(prefetch=True)),
        (2, 5, 32768, jnp.bfloat16, None),
    ],
)
def test_the_hopper_kernel_lowers_at_real_sizes(queries, heads, columns, stored, settings):
    out, lse = lowered(queries, heads, columns, stored, settings).out_avals
    assert out.shape == (queries, heads, 512) and lse.shape == (queries, heads)


def test_splits_fill_the_gpu_and_never_exceed_shared_memory():
    assert config.of_call(256, 2048, 132, eight_bit=False).splits == 1
    assert config.of_call(32, 2048, 132, eight_bit=False).splits == 4
    assert config.of_call(2, 2048, 132, eight_bit=False).splits == 16
    assert config.of_call(256, 32768, 132, eight_bit=False).splits == 16
    assert config.of_call(2, 64, 132, eight_bit=False).splits == 1


@pytest.mark.parametrize(
    ("q", "rows", "stored", "value_dim", "reason"),
    [
        ((1, 2, 576), 576, jnp.float32, 512, "queries must be bfloat16"),
        ((1, 2, 96), 96, jnp.bfloat16, 64, "multiple of 64"),
        ((1, 2, 1088), 1088, jnp.bfloat16, 1024, "at most 512 values"),
        ((1, 2, 192), 260, jnp.uint8, 128, "8-bit rows must have 512"),
        ((0, 2, 576), 576, jnp.bfloat16, 512, "nothing to do"),
    ],
)
def test_what_the_hopper_kernel_cannot_do_is_refused(q, rows, stored, value_dim, reason):
    cached, own = jnp.zeros((1, 1, 4, rows), stored), jnp.zeros((1, 0, rows), stored)
    chosen = jnp.zeros((q[0], 1, 3), jnp.int32)
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_gpu.check(
            jnp.zeros(q, jnp.float32 if stored == jnp.float32 else jnp.bfloat16),
            addresses.chosen_of_step(cached, 0, own, chosen, jnp.zeros((q[0], 1), jnp.int32)),
            value_dim,
        )


def step_case(rng, stored, q_dtype, value_dim, size, batch=2, tokens=1):
    """Sequences on scattered pages of the second of two layers: their rows in no order, gaps, a row of the step's own.

    Three blocks of rows for the Hopper kernel, so that both places in its shared memory are used again.
    """
    pages = jnp.asarray([[5, 0, 3], [1, 4, -1]], jnp.int32)[:batch]
    cached = rng.standard_normal((2, 6, 64, size)).astype(np.float32)
    own = rng.standard_normal((batch, tokens, size)).astype(np.float32)
    rows = np.full((batch, tokens, 150), -1, np.int32)
    for b, length in enumerate((140, 90)[:batch]):
        rows[b, :, :length] = rng.permuted(np.tile(np.arange(length), (tokens, 1)), axis=-1)
        rows[b, :, 3:80:7] = -1
        rows[b, :, 145] = 3 * 64 + b % tokens
    q = rng.standard_normal((batch, tokens, 3, size)).astype(q_dtype)
    encode = lambda x: cache_rows.encode(jnp.asarray(x), value_dim, stored)  # noqa: E731
    return jnp.asarray(q), encode(cached), 1, encode(own), jnp.asarray(rows), pages


def assert_equals_xla(case, value_dim, implementation, tolerance):
    *operands, pages = case
    got, expected = (
        sparse_mla_step(
            *operands, scale=SCALE, value_dim=value_dim, pages=pages, implementation=name
        )
        for name in (implementation, "xla")
    )
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=tolerance, atol=tolerance
        )


# Weights and results rounded to bfloat16.
@pytest.mark.skipif(jax.default_backend() == "tpu", reason="a Hopper kernel")
def test_a_step_over_8_bit_pages_equals_xla_s_in_the_hopper_kernel(rng):
    case = step_case(rng, jnp.uint8, jnp.bfloat16, 512, 576, batch=1)
    assert_equals_xla(case, 512, "mosaic_gpu", 2e-2)


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() == "tpu", reason="a Hopper kernel")
@pytest.mark.parametrize("stored", [jnp.bfloat16, jnp.uint8])
@pytest.mark.parametrize("tokens", [1, 3])
def test_steps_equal_xla_s_in_the_hopper_kernel(rng, stored, tokens):
    assert_equals_xla(
        step_case(rng, stored, jnp.bfloat16, 512, 576, tokens=tokens), 512, "mosaic_gpu", 2e-2
    )


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a TPU kernel")
def test_a_step_equals_xla_s_in_the_tpu_kernel(rng):
    assert_equals_xla(step_case(rng, jnp.float32, np.float32, 10, 13), 10, "mosaic_tpu", 1e-5)


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() == "tpu", reason="a Hopper kernel")
@pytest.mark.parametrize("splits", [1, 2, 3])
def test_the_hopper_kernel_merges_its_splits(rng, splits):
    q = jnp.asarray(rng.standard_normal((1, 1, 4, 192)), jnp.bfloat16)
    kv = jnp.asarray(rng.standard_normal((1, 300, 192)), jnp.bfloat16)
    indices = rng.permutation(300)[None, None, :150].astype(np.int32)
    indices[0, 0, ::7] = -1
    interpret = None if jax.default_backend() == "gpu" else mosaic_gpu._pallas.interpret_gpu()
    got = mosaic_gpu.attend(
        q[0],
        addresses.chosen_of_sequences(kv, jnp.asarray(indices)),
        SCALE,
        128,
        config=config.Config(splits=splits),
        interpret=interpret,
    )
    expected = sparse_mla(
        q, kv, jnp.asarray(indices), scale=SCALE, value_dim=128, implementation="xla"
    )
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b[0], np.float32), rtol=1e-2, atol=2e-2
        )
