"""Numbers of index heads that don't fill up the Hopper kernel's products: padded with heads of no weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import index_topk, index_topk_step
from pallas_kernels.index_topk import config, mosaic_gpu


def lower(monkeypatch, f, *shapes):
    monkeypatch.setattr(mosaic_gpu, "interpret_gpu", lambda: None)
    monkeypatch.setattr(mosaic_gpu, "multiprocessors", lambda: 132)
    operands = (jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes)
    jax.export.export(jax.jit(f), platforms=["cuda"])(*operands)


@pytest.mark.parametrize(("batch", "keys", "tokens"), [(1, 131072, 1), (128, 32768, 2)])
def test_a_paged_decode_of_32_heads_lowers(monkeypatch, batch, keys, tokens):
    lower(
        monkeypatch,
        lambda q, c, own, w, n, p: mosaic_gpu.index_topk_step(q, c, 1, own, w, n, 2048, p, None),
        ((batch, tokens, 32, 128), jnp.bfloat16),
        ((2, batch * keys // 64, 64, 128), jnp.bfloat16),
        ((batch, tokens, 128), jnp.bfloat16),
        ((batch, tokens, 32), jnp.float32),
        ((batch,), jnp.int32),
        ((batch, keys // 64), jnp.int32),
    )


@pytest.mark.parametrize("tokens", [1, 4096])
def test_a_prefill_of_32_heads_lowers(monkeypatch, tokens):
    lower(
        monkeypatch,
        lambda q, k, w, v: mosaic_gpu.index_topk(q, k, w, 2048, v),
        ((1, tokens, 32, 128), jnp.bfloat16),
        ((1, 65536, 128), jnp.bfloat16),
        ((1, tokens, 32), jnp.float32),
        ((1, tokens), jnp.int32),
    )


@pytest.mark.parametrize(("heads", "tokens", "padded"), [(32, 1, 64), (32, 2, 32), (40, 2, 64)])
def test_heads_are_padded_as_far_as_a_product_needs(heads, tokens, padded):
    chosen = config.chosen((1, tokens, heads, 128), 4096, 132)
    assert chosen.padded(heads) == padded
    columns, keys = chosen.queries * padded, chosen.warpgroups * chosen.depth * config.ROWS
    weights = -(-4 * columns // 1024) * 1024
    assert chosen.shared_bytes(heads, 128) == 2 * 128 * (columns + keys) + weights + 3 * 1024


def whole(rng, *shape):
    """Exactly representable, also their sums: every backend's scores are the same bits."""
    return jnp.asarray(rng.integers(-2, 3, shape), jnp.bfloat16)


def test_a_decode_of_32_heads_selects_as_the_reference(rng):
    operands = (whole(rng, 2, 1, 32, 64), whole(rng, 2, 4, 64, 64), 1, whole(rng, 2, 1, 64))
    weights = whole(rng, 2, 1, 32).astype(jnp.float32)
    pages, lengths = jnp.asarray([[3, 1], [2, -1]], jnp.int32), jnp.asarray([100, 30], jnp.int32)
    got, expected = (
        index_topk_step(*operands, weights, lengths, 20, pages=pages, implementation=name)
        for name in ("mosaic_gpu", "reference")
    )
    np.testing.assert_array_equal(got, expected)


def test_keys_for_two_queries_of_40_heads_are_selected_as_by_the_reference(rng):
    q, k = whole(rng, 1, 2, 40, 64), whole(rng, 1, 70, 64)
    weights = whole(rng, 1, 2, 40).astype(jnp.float32)
    visible = jnp.asarray([[30, 70]], jnp.int32)
    got, expected = (
        index_topk(q, k, weights, 9, visible=visible, implementation=name)
        for name in ("mosaic_gpu", "reference")
    )
    np.testing.assert_array_equal(got, expected)


def test_so_few_heads_that_most_of_the_work_would_be_padding_are_refused():
    q, k, weights = (jnp.ones(s, jnp.bfloat16) for s in ((1, 1, 16, 64), (1, 64, 64), (1, 1, 16)))
    with pytest.raises(NotImplementedError, match=r"half of them real; got 64 \(16 heads, padded"):
        index_topk(q, k, weights, 1, implementation="mosaic_gpu")
