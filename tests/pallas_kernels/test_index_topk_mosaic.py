"""The Mosaic GPU backend of ``index_topk``: lowered for CUDA at real shapes, and run, in JAX's simulator where there is no GPU."""

import functools
import math
import re

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


@pytest.mark.parametrize(
    ("tokens", "keys", "heads"),
    [(4096, 65536, HEADS), (5, 100, HEADS), (1, 65536, 32), (4096, 65536, 32)],
)
def test_a_prefill_lowers(monkeypatch, tokens, keys, heads):
    lower(
        monkeypatch,
        lambda q, k, w, v: mosaic_gpu.index_topk(q, k, w, 2048, v),
        ((1, tokens, heads, SIZE), jnp.bfloat16),
        ((1, keys, SIZE), jnp.bfloat16),
        ((1, tokens, heads), jnp.float32),
        ((1, tokens), jnp.int32),
    )


@pytest.mark.parametrize("heads", [HEADS, 32])
@pytest.mark.parametrize(("batch", "keys", "tokens"), [(1, 131072, 1), (128, 32768, 2)])
def test_a_paged_decode_lowers(monkeypatch, batch, keys, tokens, heads):
    lower(
        monkeypatch,
        lambda q, c, own, w, n, p: mosaic_gpu.index_topk_step(q, c, 1, own, w, n, 2048, p, None),
        ((batch, tokens, heads, SIZE), jnp.bfloat16),
        ((2, batch * keys // 64, 64, SIZE), jnp.bfloat16),
        ((batch, tokens, SIZE), jnp.bfloat16),
        ((batch, tokens, heads), jnp.float32),
        ((batch,), jnp.int32),
        ((batch, keys // 64), jnp.int32),
    )


@pytest.mark.parametrize("tokens", [1, 4096])
@pytest.mark.parametrize(("heads", "size"), [(64, 192), (64, 256), (128, 128)])
def test_wide_keys_and_many_heads_lower_within_shared_memory(monkeypatch, heads, size, tokens):
    lower(
        monkeypatch,
        lambda q, k, w, v: mosaic_gpu.index_topk(q, k, w, 2048, v),
        ((1, tokens, heads, size), jnp.bfloat16),
        ((1, 65536, size), jnp.bfloat16),
        ((1, tokens, heads), jnp.float32),
        ((1, tokens), jnp.int32),
    )


@pytest.mark.parametrize(
    ("heads", "size", "change"),
    [
        (64, 128, {}),
        (64, 192, {"depth": 1}),
        (64, 256, {"depth": 1, "queries": 2}),
        (128, 256, {"depth": 1, "queries": 1, "together": 1}),
    ],
)
def test_the_heuristic_asks_for_no_more_than_shared_memory(heads, size, change):
    expected = config.Config(**({"queries": 4, "together": 2, "depth": 2} | change))
    chosen = config.chosen((1, 4096, heads, size), 65536, 132)
    assert chosen == expected
    assert chosen.shared_bytes(heads, size) <= config.SHARED_MEMORY


def test_scores_of_a_large_batch_do_not_exist_at_once(monkeypatch):
    batch, pages = 1024, 2048
    monkeypatch.setattr(mosaic_gpu, "interpret_gpu", lambda: None)
    monkeypatch.setattr(mosaic_gpu, "multiprocessors", lambda: 132)
    operands = (
        ((batch, 1, HEADS, SIZE), jnp.bfloat16),
        ((1, 4096, 64, SIZE), jnp.bfloat16),
        ((batch, 1, SIZE), jnp.bfloat16),
        ((batch, 1, HEADS), jnp.float32),
        ((batch,), jnp.int32),
        ((batch, pages), jnp.int32),
    )
    program = str(
        jax.make_jaxpr(
            lambda q, c, own, w, n, p: mosaic_gpu.index_topk_step(
                *(q, c, 0, own, w, n, 2048), p, None
            )
        )(*(jax.ShapeDtypeStruct(*x) for x in operands))
    )
    sizes = [
        math.prod(map(int, s.split(","))) for s in re.findall(r"\b[ifu]32\[([\d,]+)\]", program)
    ]
    assert 2**23 < max(sizes) <= config.Config().scores


@pytest.mark.parametrize("change", [{"digit": 1}, {"digit": 4, "chunk": 1024}, {"resident": 2**15}])
def test_other_sizes_of_the_selection_lower(monkeypatch, change):
    f = functools.partial(mosaic_gpu.thresholds, k=2048, config=config.Config(**change))
    lower(monkeypatch, f, ((256, 32768), jnp.int32), ((256,), jnp.int32))


@pytest.mark.misuse
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digit": 3}, "digit must divide 32; got 3"),
        ({"together": 3}, "together must divide queries and be at most 8; got 3 and 4"),
        (
            {"queries": 16, "together": 16},
            "together must divide queries and be at most 8; got 16 and 16",
        ),
    ],
)
def test_sizes_that_would_select_wrongly_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config.Config(**change)


def whole(rng, *shape):
    """Exactly representable, also their sums: every backend's scores are the same bits."""
    return jnp.asarray(rng.integers(-2, 3, shape), jnp.bfloat16)


@pytest.mark.parametrize(("heads", "seen"), [(64, 3), (40, 30)])
def test_keys_of_a_sequence_are_selected_as_by_the_reference(rng, heads, seen):
    q, k = whole(rng, 1, 2, heads, 64), whole(rng, 1, 70, 64)
    weights = whole(rng, 1, 2, heads).astype(jnp.float32)
    visible = jnp.asarray([[seen, 70]], jnp.int32)
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


@pytest.mark.parametrize(("batch", "tokens", "keys"), [(0, 1, 64), (1, 0, 64), (1, 1, 0)])
def test_nothing_to_select_is_refused(batch, tokens, keys):
    shapes = ((batch, tokens, 64, 64), (batch, keys, 64), (batch, tokens, 64))
    q, k, weights = (jnp.ones(shape, jnp.bfloat16) for shape in shapes)
    visible = jnp.zeros((batch, tokens), jnp.int32)
    with pytest.raises(NotImplementedError, match="nothing to do"):
        index_topk(q, k, weights, 1, visible=visible, implementation="mosaic_gpu")


def test_sizes_that_shared_memory_does_not_hold_are_refused():
    q, k, weights = (jnp.ones(s, jnp.bfloat16) for s in ((1, 4, 64, 256), (1, 64, 256), (1, 4, 64)))
    visible = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(NotImplementedError, match="232448 bytes of shared memory; 64 heads of 256"):
        mosaic_gpu.index_topk(q, k, weights, 1, visible, config.Config())


@pytest.mark.parametrize(("heads", "tokens", "padded"), [(32, 1, 64), (32, 2, 32), (40, 2, 64)])
def test_heads_are_padded_as_far_as_a_product_needs(heads, tokens, padded):
    chosen = config.chosen((1, tokens, heads, 128), 4096, 132)
    assert chosen.padded(heads) == padded
    columns, keys = chosen.queries * padded, chosen.warpgroups * chosen.depth * config.ROWS
    weights = -(-4 * columns // 1024) * 1024
    assert chosen.shared_bytes(heads, 128) == 2 * 128 * (columns + keys) + weights + 3 * 1024


def test_a_decode_of_32_heads_selects_as_the_reference(rng):
    operands = (whole(rng, 2, 1, 32, 64), whole(rng, 2, 4, 64, 64), 1, whole(rng, 2, 1, 64))
    weights = whole(rng, 2, 1, 32).astype(jnp.float32)
    pages, lengths = jnp.asarray([[3, 1], [2, -1]], jnp.int32), jnp.asarray([100, 30], jnp.int32)
    got, expected = (
        index_topk_step(*operands, weights, lengths, 20, pages=pages, implementation=name)
        for name in ("mosaic_gpu", "reference")
    )
    np.testing.assert_array_equal(got, expected)


def test_so_few_heads_that_most_of_the_work_would_be_padding_are_refused():
    q, k, weights = (jnp.ones(s, jnp.bfloat16) for s in ((1, 1, 16, 64), (1, 64, 64), (1, 1, 16)))
    with pytest.raises(NotImplementedError, match=r"half of them real; got 64 \(16 heads, padded"):
        index_topk(q, k, weights, 1, implementation="mosaic_gpu")
