"""The engine: the tokens of ``generate`` whoever shares the steps."""

import collections
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine.support import (
    ACTIVE,
    MOE_LAYERS,
    MOST_NEW,
    OPTIONS,
    ROWS,
    WAIT_S,
    assert_empty,
    exactly,
    generated,
    in_threads,
    logits_of,
    new_engine,
    random_prompts,
    rows_of,
)
from parity.clear import sharp_params

import jaxmoe
from jaxmoe.engine import Engine, EngineOptions, Result, SamplingParams
from jaxmoe.sharding import make_mesh

# Compiled before any deadline runs.
pytestmark = pytest.mark.usefixtures("warm_engine")


# -- the same tokens as generate ---------------------------------------------------------------------


def _mixed_load(engine: Engine, count: int, seed: int) -> list[Result]:
    """``count`` greedy requests from four threads at random times, against ``generate``."""
    prompts = random_prompts(count, seed)
    rng = np.random.default_rng(seed)
    new = rng.integers(1, 40, count)
    priorities = rng.integers(0, 3, count)
    pauses = rng.exponential(0.004, count)
    expected = generated(prompts)
    results: list[Result | None] = [None] * count

    def client(number: int) -> None:
        streams = {}
        for i in range(number, count, 4):
            time.sleep(pauses[i])
            priority = int(priorities[i])
            streams[i] = engine.submit(prompts[i], exactly(int(new[i])), priority=priority)
        for i, stream in streams.items():
            results[i] = stream.result(WAIT_S)

    in_threads(client, 4)
    for i, result in enumerate(results):
        assert result.token_ids == tuple(expected[i, : new[i]].tolist()), f"request {i}"
        assert result.finish_reason == "length" and result.prompt_tokens == len(prompts[i])
    return results


def test_mixed_greedy_requests_get_the_tokens_of_generate_although_some_give_way():
    with new_engine() as engine:
        results = _mixed_load(engine, 60, seed=1)
        assert engine.stats().preemptions > 5
        assert sum(result.cached_tokens for result in results) > 50
        assert_empty(engine)


@pytest.mark.parametrize("dtype", ["fp8", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_over_rounded_rows_requests_get_the_tokens_that_generate_has_over_such_rows(dtype):
    prompts = random_prompts(ROWS, seed=11)
    with new_engine(cache_dtype=dtype) as engine:
        results = engine.generate(prompts, exactly(MOST_NEW))
        assert engine.stats().preemptions > 0
        assert_empty(engine)
    expected = generated(prompts, dtype)
    assert [result.token_ids for result in results] == rows_of(expected, MOST_NEW)
    assert (expected != generated(prompts)).any(), "the format changes nothing"


@pytest.mark.slow
def test_two_hundred_mixed_requests_on_a_tiny_cache_get_the_tokens_of_generate():
    with new_engine(pages=24) as engine:
        _mixed_load(engine, 200, seed=2)
        assert engine.stats().preemptions > 50
        assert_empty(engine)


def test_drawn_tokens_are_those_of_generate_with_the_seeds_key(shared):
    prompts = random_prompts(6, seed=3, longest=20)
    temperatures = np.array([0.7, 1.0, 0.0, 1.5, 1.0, 0.4], np.float32)
    top_ps = np.array([1.0, 0.9, 1.0, 0.5, 1.0, 0.8], np.float32)
    seeds = [0, 7, 3, 2**32 - 1, 12345, 99]
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    expected = generated(prompts, temperature=temperatures, top_p=top_ps, key=keys)
    settings = [
        exactly(20, temperature=float(t), top_p=float(p), seed=s)
        for t, p, s in zip(temperatures, top_ps, seeds, strict=True)
    ]
    together = shared.generate(prompts, settings)
    assert [result.token_ids for result in together] == rows_of(expected, 20)
    for i in (1, 4):
        (alone,) = shared.generate(prompts[i : i + 1], settings[i])
        assert alone.token_ids == together[i].token_ids


def test_without_a_seed_draws_differ_from_request_to_request(shared):
    prompt = random_prompts(1, seed=4)[0]
    results = shared.generate([prompt] * 4, exactly(12, temperature=1.5))
    assert len({result.token_ids for result in results}) == 4


def test_company_of_every_kind_changes_no_tokens(shared):
    """Rows that draw, cut, penalise, report or follow a grammar share steps with rows that do not."""
    prompts = random_prompts(6, seed=5, longest=20)
    kinds = [
        exactly(16),
        exactly(16, temperature=1.2, seed=1),
        exactly(16, temperature=1.2, top_k=4, min_p=0.05, seed=2),
        exactly(16, frequency_penalty=1.0, repetition_penalty=1.3),
        exactly(16, logit_bias=((70, 3.0), (71, -100.0)), logprobs=2),
        SamplingParams(16, temperature=1.0, seed=3, json_schema='{"enum": ["one", "two"]}'),
    ]
    together = shared.generate(prompts, kinds)
    alone = [shared.generate([p], kind)[0] for p, kind in zip(prompts, kinds, strict=True)]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]


def test_four_ranks_give_the_tokens_of_one_device(shared, devices):
    mesh = make_mesh(expert=4, devices=devices[:4])
    prompts = random_prompts(16, seed=6)
    settings = [
        exactly(4 + i, temperature=0.9, seed=i) if i % 4 == 3 else exactly(4 + i) for i in range(16)
    ]
    expected = shared.generate(prompts, settings)
    with new_engine(max_running=2, max_step_tokens=4, pages=24, mesh=mesh) as four:
        results = four.generate(prompts, settings)
        stats = four.stats()
        assert_empty(four)
    assert [r.token_ids for r in results] == [r.token_ids for r in expected]
    assert (stats.ranks, stats.pages) == (4, 4 * 24)
    assert stats.rank_experts == [[0, 1], [2, 3], [4, 5], [6, 7]]
    computed = stats.prompt_tokens - stats.cached_tokens + stats.generated_tokens - 16
    if not stats.preemptions:
        assert stats.expert_load.sum(-1).tolist() == [computed * ACTIVE] * MOE_LAYERS


LLAMA = jaxmoe.ModelConfig(
    vocab_size=320,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_interleave=False,
    max_position_embeddings=128,
)


def test_a_dense_model_without_latent_attention_gets_the_tokens_of_generate():
    params, prompts = sharp_params(LLAMA), random_prompts(3, seed=20, longest=20)
    options = EngineOptions(max_running=3, max_step_tokens=8, page_size=4, pages=30, max_length=64)
    with Engine(params, LLAMA, options=options) as engine:
        results = engine.generate(prompts, exactly(12))
        assert engine.stats().expert_load.shape == (0, 0)
        assert engine.stats().rank_experts == [[]]
        assert_empty(engine)
    for prompt, result in zip(prompts, results, strict=True):
        expected = np.asarray(jaxmoe.generate(params, LLAMA, np.array([prompt]), 12))[0]
        assert result.token_ids == tuple(expected.tolist())


# -- sampling parameters through the engine ----------------------------------------------------------


def test_penalties_and_bias_choose_what_numpy_chooses_from_a_whole_pass(shared):
    prompt = list(b"to be or not to be")
    p = exactly(
        24,
        repetition_penalty=1.4,
        presence_penalty=0.6,
        frequency_penalty=0.3,
        logit_bias=((101, -50.0), (32, 1.0), (32, 0.5)),
    )
    (result,) = shared.generate([prompt], p)
    (free,) = shared.generate([prompt], exactly(24))
    assert result.token_ids != free.token_ids
    raw = logits_of([*prompt, *result.token_ids])
    for i, token in enumerate(result.token_ids):
        logits, output = raw[len(prompt) + i - 1].astype(np.float64), result.token_ids[:i]
        seen = list({*prompt, *output})
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.4, logits[seen] * 1.4)
        for other, count in collections.Counter(output).items():
            logits[other] -= 0.6 + 0.3 * count
        logits[101] -= 50
        logits[32] += 1.5
        # A whole pass differs from steps by 1e-5 (test_decode.py).
        assert logits[token] >= logits.max() - 1e-4, f"token {i}"


def test_logprobs_are_those_of_a_whole_pass_and_come_with_their_tokens(shared):
    prompt = random_prompts(1, seed=7, longest=20)[0]
    chunks = list(shared.stream(prompt, exactly(12, logprobs=3, temperature=1.0, seed=4)))
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    logprobs = [entry for chunk in chunks for entry in chunk.logprobs]
    assert [entry.token for entry in logprobs] == tokens and len(tokens) == 12
    logits = logits_of([*prompt, *tokens])[len(prompt) - 1 : -1].astype(np.float64)
    exact = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for entry, row in zip(logprobs, exact, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token], abs=5e-5)
        assert [token for token, _ in entry.top] == np.argsort(-row)[:3].tolist()
        np.testing.assert_allclose([v for _, v in entry.top], np.sort(row)[:-4:-1], atol=5e-5)


def test_zero_logprobs_are_only_those_of_the_tokens_and_none_are_none(shared):
    prompt = random_prompts(1, seed=8)[0]
    some, none = shared.generate([prompt] * 2, [exactly(3, logprobs=0), exactly(3)])
    assert [entry.top for entry in some.logprobs] == [()] * 3
    assert none.logprobs == () and none.token_ids == some.token_ids


@pytest.mark.parametrize("cut", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}])
def test_the_narrowest_cuts_are_greedy(shared, cut):
    prompt = random_prompts(1, seed=9)[0]
    greedy, drawn = shared.generate(
        [prompt] * 2, [exactly(10), exactly(10, temperature=3.0, seed=1, **cut)]
    )
    assert drawn.token_ids == greedy.token_ids


def test_top_k_and_min_p_draw_nothing_but_what_they_leave(shared):
    prompt = random_prompts(1, seed=10, longest=20)[0]
    for cut in ({"top_k": 3}, {"min_p": 0.3}):
        (result,) = shared.generate([prompt], exactly(30, temperature=2.0, seed=3, **cut))
        logits = logits_of([*prompt, *result.token_ids])[len(prompt) - 1 : -1]
        ranks = []
        for token, row in zip(result.token_ids, logits, strict=True):
            ranks.append(int((row > row[token]).sum()))
            if "top_k" in cut:
                assert ranks[-1] < 3
            else:
                assert row[token] >= row.max() + 2 * np.log(0.3) - 1e-4
        assert max(ranks) > 0, "always the best: nothing was drawn"


# -- prefix reuse --------------------------------------------------------------------------------------


def test_a_repeated_beginning_is_reused_and_changes_no_token():
    prompt = random_prompts(2, seed=14)[1]
    longer = [*prompt, *b" and more"]
    with new_engine(prefix_reuse=False) as without:
        expected = without.generate([prompt, longer], exactly(10))
        assert all(
            result.cached_tokens == 0 for result in without.generate([prompt] * 2, exactly(4))
        )
        assert without.stats().pages_idle == 0
    with new_engine() as engine:
        (first,) = engine.generate([prompt], exactly(10))
        again, more = engine.generate([prompt, longer], exactly(10))
        assert_empty(engine)
    assert first.cached_tokens == 0
    whole_pages = OPTIONS.page_size * ((len(prompt) - 1) // OPTIONS.page_size)
    assert again.cached_tokens == whole_pages > 0
    assert more.cached_tokens >= whole_pages
    assert first.token_ids == again.token_ids == expected[0].token_ids
    assert more.token_ids == expected[1].token_ids
