"""Steps over the cache against a pass over the whole sequence."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.clear import clear_case, sharp_params

import jaxmoe
from jaxmoe.cache import Cache, commit, init_cache
from jaxmoe.layers.step_attention import selects_rows
from jaxmoe.steps import step
from pallas_kernels import native, paged

TOLERANCE = 1e-5  # the issue's; measured over 6 seeds: up to 7.1e-6 where logits have standard deviation 0.7 (docs/log.md)
BATCH, LENGTH, CAPACITY = 3, 96, 112

_TINY = jaxmoe.presets["tiny"].replace(num_nextn_predict_layers=0)


@dataclasses.dataclass(frozen=True)
class Case:
    config: jaxmoe.ModelConfig
    chunks: tuple[int, ...] = (1, 16)  # tokens per step
    gathers: bool = False


CASES = {
    "6 x topk, selected by index": Case(_TINY.replace(index_topk=16), (1, 3, 16), gathers=True),
    "1.6 x topk, selected by mask": Case(_TINY.replace(index_topk=60)),
    "context below topk": Case(_TINY.replace(index_topk=128)),
    "selections shared between layers": Case(
        _TINY.replace(
            index_topk=16,
            indexer_rope_interleave=True,
            indexer_types=("full", "shared", "full", "shared"),
            first_k_dense_replace=0,
        ),
        (1, 3, 16),
        gathers=True,
    ),
    "shared masks": Case(
        _TINY.replace(
            index_topk=60,
            indexer_types=("full", "shared", "shared", "full"),
            first_k_dense_replace=0,
        ),
        (1,),
    ),
    "latent attention without indexer": Case(
        _TINY.replace(index_topk=None, index_n_heads=None, index_head_dim=None)
    ),
    "grouped queries": Case(
        jaxmoe.ModelConfig(
            vocab_size=320,
            hidden_size=96,
            intermediate_size=160,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=20,
            rope_interleave=False,
        ),
        (1, 3, 16),
    ),
}
# Those that another test compiles too say all but what 96 steps add up to: three per step says it for every kind of selection.
_CASE_AND_CHUNK = [
    pytest.param(
        name,
        chunk,
        id=f"{name}, {chunk} per step",
        marks=() if chunk == 3 else pytest.mark.slow,
    )
    for name, case in CASES.items()
    for chunk in case.chunks
]
# The C++ kernels have all cases. What else reads a cache is shared by most of them: these differ.
FALLBACK = ("6 x topk, selected by index", "1.6 x topk, selected by mask", "grouped queries")

_step = jax.jit(step, static_argnames=("config",))
_commit = jax.jit(commit)


@pytest.fixture(scope="module", autouse=True, params=["native", "xla"])
def backend(request):
    """Every test on the C++ kernels and on their fallback."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "xla":
            patch.setattr(native, "_refusal", lambda: "switched off by the test")
            patch.setattr(
                paged, "BLOCK_ROWS", 48
            )  # CAPACITY takes three blocks, the last one in part
        elif not native.available():
            pytest.skip("no C++ compiler")
        jax.clear_caches()
        _model.cache_clear()  # the whole pass, too, runs on this backend
        yield request.param
        jax.clear_caches()


@functools.cache
def _model(name: str):
    """(params, config, tokens [B, T], logits of the whole sequences)."""
    config = CASES[name].config
    params = sharp_params(config)
    return params, config, *clear_case(params, config, (BATCH, LENGTH))


@pytest.fixture(autouse=True)
def _fewer_on_the_fallback(request, backend, slow_too):
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name")
    if backend == "xla" and name not in (None, *FALLBACK) and not slow_too:
        pytest.skip("the fallback runs the cases that differ for it; make test-all runs all")


def _empty(config, value: float = 0.0) -> Cache:
    cache = init_cache(config, BATCH, CAPACITY)
    return cache.replace(entries=jax.tree.map(lambda x: jnp.full_like(x, value), cache.entries))


def _counts(*counts: int) -> jax.Array:
    return jnp.asarray(counts, jnp.int32)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="accelerators weigh other costs")
def test_the_cases_select_both_by_index_and_by_mask(backend):
    if backend == "native":
        pytest.skip("it always selects by index")
    for name, case in CASES.items():
        for chunk in case.chunks:
            assert selects_rows(case.config.index_topk, CAPACITY, chunk) == case.gathers, (
                name,
                chunk,
            )


@pytest.mark.parametrize(("name", "chunk"), _CASE_AND_CHUNK)
def test_cached_decode_equals_the_whole_pass_at_every_position(name, chunk):
    params, config, tokens, expected = _model(name)
    cache, parts = _empty(config), []
    for start in range(0, LENGTH, chunk):
        logits, entries = _step(params, config, tokens[:, start : start + chunk], cache)
        cache = _commit(cache, entries, _counts(chunk, chunk, chunk))
        parts.append(np.asarray(logits))
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, rtol=0, atol=TOLERANCE)
    assert expected.std() > 0.6, "the logits are too flat to compare"


# Rows kept of each step of 16: sequences advance unevenly, stand still, and drop rows that they had computed.
_RAGGED = [(16, 0, 5), (3, 16, 0), (16, 9, 16), (0, 16, 1), (16, 16, 16), (16, 2, 11), (13, 16, 16)]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if 16 in case.chunks])
def test_ragged_commits_over_a_cache_full_of_nan_change_nothing(name):
    """NaN in every row not yet committed shows any read of one; rows dropped by a commit are read by nobody either."""
    params, config, tokens, expected = _model(name)
    cache = _empty(config, np.nan)
    for kept in _RAGGED:
        start = np.asarray(cache.lengths)
        columns = np.minimum(start[:, None] + np.arange(16), LENGTH - 1)
        logits, entries = _step(params, config, np.take_along_axis(tokens, columns, 1), cache)
        cache = _commit(cache, entries, _counts(*kept))
        for b in range(BATCH):
            real = min(16, LENGTH - start[b])
            np.testing.assert_allclose(
                logits[b, :real],
                expected[b, start[b] : start[b] + real],
                rtol=0,
                atol=TOLERANCE,
                err_msg=f"sequence {b} from position {start[b]}",
            )
    np.testing.assert_array_equal(cache.lengths, np.sum(_RAGGED, axis=0))


@pytest.mark.parametrize("name", CASES)
def test_single_tokens_over_a_cache_full_of_nan_change_nothing(name):
    params, config, tokens, expected = _model(name)
    cache = _empty(config, np.nan)
    for t in range(4):
        logits, entries = _step(params, config, tokens[:, t : t + 1], cache)
        cache = _commit(cache, entries, _counts(1, 1, 1))
        np.testing.assert_allclose(logits[:, 0], expected[:, t], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_a_step_repeated_without_commit_is_the_same_bit_for_bit(name):
    params, config, tokens, _ = _model(name)
    chunk = CASES[name].chunks[-1]
    cache = _empty(config)
    logits, entries = _step(params, config, tokens[:, :chunk], cache)
    cache = _commit(cache, entries, _counts(chunk, chunk, chunk))
    before = [np.array(x) for x in jax.tree.leaves(cache)]
    first = _step(params, config, tokens[:, chunk : 2 * chunk], cache)
    second = _step(params, config, tokens[:, chunk : 2 * chunk], cache)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    for old, new in zip(before, jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize("name", ["6 x topk, selected by index", "grouped queries"])
def test_a_bfloat16_model_decodes_from_a_bfloat16_cache(name):
    params, config, tokens, expected = _model(name)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    cache = init_cache(config, BATCH, CAPACITY, jnp.bfloat16)
    for t in range(3):
        logits, entries = _step(params, config, tokens[:, t : t + 1], cache)
        cache = _commit(cache, entries, _counts(1, 1, 1))
        assert logits.dtype == jnp.float32
        # bfloat16 keeps 8 bits: a few rounding errors of 1/256 of logits up to 3.
        np.testing.assert_allclose(logits[:, 0], expected[:, t], rtol=0, atol=0.15)


def test_commit_keeps_exactly_counts_rows_and_touches_none_before_or_far_behind(rng):
    config = CASES["6 x topk, selected by index"].config
    lengths, counts, tokens = np.array([0, 7, 50]), np.array([4, 0, 2]), 5
    cache = _empty(config, -1.0).replace(lengths=jnp.asarray(lengths, jnp.int32))
    entries = {
        name: jnp.asarray(rng.standard_normal((*x.shape[:2], tokens, x.shape[3])), x.dtype)
        for name, x in cache.entries.items()
    }
    after = _commit(cache, entries, _counts(*counts))
    np.testing.assert_array_equal(after.lengths, lengths + counts)
    for name, rows in after.entries.items():
        rows = np.asarray(rows)
        for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            np.testing.assert_array_equal(
                rows[:, b, length : length + count], entries[name][:, b, :count]
            )
            assert (rows[:, b, :length] == -1).all()
            assert (rows[:, b, length + tokens :] == -1).all()


def test_commit_at_the_end_of_the_cache_drops_what_does_not_fit(rng):
    config = CASES["grouped queries"].config
    cache = _empty(config).replace(lengths=_counts(CAPACITY - 1, 0, CAPACITY))
    entries = {
        name: jnp.ones((*x.shape[:2], 2, x.shape[3]), x.dtype) for name, x in cache.entries.items()
    }
    after = _commit(cache, entries, _counts(1, 2, 0))
    for rows in after.entries.values():
        np.testing.assert_array_equal(np.asarray(rows[0, :, :, 0]).sum(-1), [1, 2, 0])
