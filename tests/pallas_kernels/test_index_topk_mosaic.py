"""The Mosaic GPU backend of ``index_topk``: lowered for CUDA at real shapes, and run, in JAX's simulator where there is no GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import index_topk, index_topk_step
from pallas_kernels.index_topk import config, mosaic_gpu

HEADS, SIZE = 64, 128


def lower(monkeypatch, f, *shapes):
    """Lowers for CUDA; every error of layouts and copies shows here."""
    monkeypatch.setattr(mosaic_gpu, "interpret_gpu", lambda: None)
    monkeypatch.setattr(mosaic_gpu, "multiprocessors", lambda: 132)
    operands = (jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes)
    jax.export.export(jax.jit(f), platforms=["cuda"])(*operands)


@pytest.mark.parametrize(("tokens", "keys"), [(4096, 65536), (5, 100)])
def test_a_prefill_lowers(monkeypatch, tokens, keys):
    lower(
        monkeypatch,
        lambda q, k, w, v: mosaic_gpu.index_topk(q, k, w, 2048, v),
        ((1, tokens, HEADS, SIZE), jnp.bfloat16),
        ((1, keys, SIZE), jnp.bfloat16),
        ((1, tokens, HEADS), jnp.float32),
        ((1, tokens), jnp.int32),
    )


@pytest.mark.parametrize(("batch", "keys", "tokens"), [(1, 131072, 1), (128, 32768, 2)])
def test_a_paged_decode_lowers(monkeypatch, batch, keys, tokens):
    lower(
        monkeypatch,
        lambda q, c, own, w, n, p: mosaic_gpu.index_topk_step(q, c, 1, own, w, n, 2048, p, None),
        ((batch, tokens, HEADS, SIZE), jnp.bfloat16),
        ((2, batch * keys // 64, 64, SIZE), jnp.bfloat16),
        ((batch, tokens, SIZE), jnp.bfloat16),
        ((batch, tokens, HEADS), jnp.float32),
        ((batch,), jnp.int32),
        ((batch, keys // 64), jnp.int32),
    )


@pytest.mark.parametrize("change", [{"digit": 1}, {"digit": 3, "chunk": 1024}, {"resident": 2**15}])
def test_other_sizes_of_the_selection_lower(monkeypatch, change):
    f = functools.partial(mosaic_gpu.thresholds, k=2048, config=config.Config(**change))
    lower(monkeypatch, f, ((256, 32768), jnp.int32), ((256,), jnp.int32))


def whole(rng, *shape):
    """Exactly representable, also their sums: every backend's scores are the same bits."""
    return jnp.asarray(rng.integers(-2, 3, shape), jnp.bfloat16)


def test_keys_of_a_sequence_are_selected_as_by_the_reference(rng):
    q, k = whole(rng, 1, 2, 64, 64), whole(rng, 1, 70, 64)
    weights = whole(rng, 1, 2, 64).astype(jnp.float32)
    visible = jnp.asarray([[3, 70]], jnp.int32)
    got, expected = (
        index_topk(q, k, weights, 9, visible=visible, implementation=name)
        for name in ("mosaic_gpu", "reference")
    )
    np.testing.assert_array_equal(got, expected)


def test_scattered_pages_and_own_keys_are_selected_as_by_the_reference(rng):
    operands = (whole(rng, 2, 1, 64, 64), whole(rng, 2, 4, 64, 64), 1, whole(rng, 2, 1, 64))
    weights = jnp.zeros((2, 1, 64), jnp.float32)  # sequence 1: every score ties
    weights = weights.at[0].set(whole(rng, 1, 64).astype(jnp.float32))
    pages, lengths = jnp.asarray([[3, 1], [2, -1]], jnp.int32), jnp.asarray([100, 30], jnp.int32)
    got, expected = (
        index_topk_step(*operands, weights, lengths, 20, pages=pages, implementation=name)
        for name in ("mosaic_gpu", "reference")
    )
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("dtype", "size", "page", "reason"),
    [
        (jnp.float32, 64, 64, "bfloat16 queries and keys"),
        (jnp.bfloat16, 32, 64, "K of 64"),
        (jnp.bfloat16, 64, 48, "64 keys of a page"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused_with_the_reason(dtype, size, page, reason):
    with pytest.raises(NotImplementedError, match=reason):
        index_topk_step(
            *(jnp.ones((1, 1, 64, size), dtype), jnp.ones((1, 1, page, size), dtype), 0),
            *(jnp.ones((1, 1, size), dtype), jnp.ones((1, 1, 64), dtype)),
            *(jnp.ones(1, jnp.int32), 1),
            implementation="mosaic_gpu",
        )
