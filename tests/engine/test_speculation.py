"""Speculation with the multi-token-prediction module: fewer steps, the same tokens."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine import support
from engine.support import compiled, every_kind
from parity.clear import sharp_params

from jaxmoe.cache import Cache, init_cache, write
from jaxmoe.engine import Engine, EngineOptions, SamplingParams, sampling
from jaxmoe.model import mtp_hidden, run
from jaxmoe.params import path_name
from jaxmoe.sharding import make_mesh
from jaxmoe.steps import run_mtp_step

CONFIG = support.CONFIG.replace(num_hidden_layers=2, num_nextn_predict_layers=1)
OPTIONS = {"max_running": 6, "max_step_tokens": 16, "page_size": 4, "pages": 24, "max_length": 96}
DRAFTS = 2  # the second is made from the first
SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 2]}, "on": {"type": "boolean"}}}


@functools.cache
def _params(share: float) -> dict:
    """A model whose next token depends on the last one and, by ``share``, on those before; its module foresees the former.

    With a share of 0 all drafts are right, with 1 none but by chance.
    """
    params = sharp_params(CONFIG)

    def calm(path, leaf):
        name = path_name(path)
        if name.endswith(("attention/o/weight", "experts/down", "down/weight")):
            return leaf * share
        if name == "mtp/0/proj/weight":  # passes the embedding of the next token on
            identity = jnp.concatenate(
                [jnp.eye(CONFIG.hidden_size), jnp.zeros((CONFIG.hidden_size,) * 2)]
            )
            return share * leaf + (1 - share) * identity
        return jnp.ones_like(leaf) if share < 1 and name.endswith("norm/weight") else leaf

    return jax.tree_util.tree_map_with_path(calm, params)


def _engine(share: float, drafts: int, mesh=None, **options) -> Engine:
    options = EngineOptions(**{**OPTIONS, **options}, speculative_tokens=drafts)
    return Engine(_params(share), CONFIG, options=options, mesh=mesh)


def _prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, 256, int(rng.integers(1, 50))).tolist() for _ in range(count)]


def _samplings() -> list[SamplingParams]:
    """Every way of choosing tokens."""
    free = functools.partial(SamplingParams, ignore_eos=True)
    return [
        free(max_new_tokens=33),
        free(max_new_tokens=1),
        free(max_new_tokens=2),
        free(max_new_tokens=29, temperature=0.8, seed=3),
        free(max_new_tokens=24, temperature=1.5, top_p=0.8, top_k=30, seed=2**40),
        free(max_new_tokens=21, logprobs=3),
        free(max_new_tokens=27, frequency_penalty=2.0, presence_penalty=0.5),
        free(max_new_tokens=25, repetition_penalty=1.3, temperature=0.7, seed=9, logprobs=0),
        free(max_new_tokens=30, logit_bias=((65, 3.0), (66, -3.0))),
        free(max_new_tokens=30, json_schema=json.dumps(SCHEMA)),
        free(max_new_tokens=30, json_schema=json.dumps(SCHEMA), temperature=1.0, seed=1),
        free(max_new_tokens=20, stop=("a", "e")),
        SamplingParams(max_new_tokens=30, stop_token_ids=tuple(range(0, 256, 16))),
    ]


@functools.cache
def _without(share: float) -> list:
    with _engine(share, 0) as engine:
        return engine.generate(_prompts(13), _samplings())


def _same(results, expected) -> None:
    for got, want in zip(results, expected, strict=True):
        assert (got.token_ids, got.text, got.finish_reason) == (
            want.token_ids,
            want.text,
            want.finish_reason,
        )
        assert [item.token for item in got.logprobs] == [item.token for item in want.logprobs]
        np.testing.assert_allclose(
            [item.logprob for item in got.logprobs],
            [item.logprob for item in want.logprobs],
            atol=1e-5,
        )


def _assert_empty(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_held) == (0, 0, 0)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_every_kind_of_request_gets_the_tokens_that_it_gets_without(share):
    with _engine(share, DRAFTS) as engine:
        results = engine.generate(_prompts(13), _samplings())
        stats = engine.stats()
        _assert_empty(engine)
    _same(results, _without(share))
    assert stats.preemptions > 0  # drafts and recomputation meet
    assert 0 < stats.drafted_tokens
    if share == 0.1:
        assert 0 < stats.accepted_tokens < stats.drafted_tokens


def test_right_drafts_save_steps():
    settings = SamplingParams(max_new_tokens=40, ignore_eos=True)
    for drafts in (0, DRAFTS):
        with _engine(0.0, drafts) as engine:
            engine.generate([[7]], settings)
            stats = engine.stats()
        assert stats.steps == 1 + -(-39 // (drafts + 1))  # the first has no drafts yet
        # As many as are needed, and all of them right.
        assert stats.accepted_tokens == stats.drafted_tokens == 40 - stats.steps
        assert stats.generated_tokens == 40


def test_a_full_context_and_a_stop_text_inside_right_drafts_end_as_they_do_without():
    """Wherever the end falls among the tokens of a step."""
    letters = tuple(
        (token, 100.0) for token in range(97, 105)
    )  # text that a stop text can be cut from
    settings = SamplingParams(
        1000, ignore_eos=True, logit_bias=letters, temperature=2.0, seed=11, logprobs=1
    )
    requests = [([7] * length, settings) for length in (40, 41, 42)]
    with _engine(0.0, 0) as plain:
        full = [plain.generate([prompt], own)[0] for prompt, own in requests]
        stops = [full[0].text[at : at + 3] for at in (9, 10, 11)]
        stopped = [(requests[0][0], dataclasses.replace(settings, stop=(stop,))) for stop in stops]
        full += [plain.generate([prompt], own)[0] for prompt, own in stopped]
    assert [len(result.token_ids) for result in full[:3]] == [56, 55, 54]
    assert [result.finish_reason for result in full] == ["length"] * 3 + ["stop"] * 3
    with _engine(0.0, DRAFTS) as engine:
        results = [engine.generate([prompt], own)[0] for prompt, own in requests + stopped]
        stats = engine.stats()
        _assert_empty(engine)
    _same(results, full)
    assert stats.accepted_tokens > stats.generated_tokens / 2  # steps of several tokens


def test_nobody_gives_way_to_drafts_and_a_full_step_has_none():
    prompts, settings = _prompts(6), SamplingParams(max_new_tokens=30, ignore_eos=True)
    with _engine(0.0, DRAFTS, max_step_tokens=6, pages=200) as engine:
        engine.generate(prompts, settings)
        stats = engine.stats()
        assert stats.preemptions == 0 and stats.generated_tokens == 180
        _assert_empty(engine)
    with _engine(0.0, 0, max_step_tokens=6, pages=200) as plain:
        plain.generate(prompts, settings)
        assert stats.steps <= plain.stats().steps


@pytest.mark.slow
def test_four_ranks_speculate_like_one_device(devices):
    mesh = make_mesh(expert=4, devices=devices[:4])
    with _engine(0.1, DRAFTS, mesh) as engine:
        results = engine.generate(_prompts(13), _samplings())
        assert engine.stats().accepted_tokens > 0
        _assert_empty(engine)
    _same(results, _without(0.1))


def test_requests_cancelled_at_random_leave_nothing_behind():
    rng = np.random.default_rng(0)
    with _engine(0.1, DRAFTS) as engine:
        for _ in range(100):  # five at a time
            settings = SamplingParams(max_new_tokens=int(rng.integers(1, 40)), ignore_eos=True)
            streams = [engine.submit(prompt, settings) for prompt in _prompts(5)]
            for stream in streams:
                if rng.random() < 0.7:
                    for _, _ in zip(range(int(rng.integers(0, 5))), stream, strict=False):
                        pass
                    stream.cancel()
            for stream in streams:
                stream.result(60)
        _assert_empty(engine)


@pytest.mark.slow
def test_warming_up_compiles_what_drafts_need_too():
    sampling.choose.clear_cache()  # of what other tests have compiled
    with _engine(0.1, DRAFTS, max_step_tokens=8) as engine:
        report = engine.warmup()
        warm = compiled(engine)
        for settings in every_kind(20):
            for count in (1, 2, 3, 6):
                engine.generate(_prompts(count), settings)
        engine.generate(_prompts(13), _samplings())
        assert compiled(engine) == warm
    assert report["sizes"] == [1, 2, 4, 8] and report["executables"] > 4 * 4


def test_the_modules_step_is_its_whole_pass():
    """In pieces over its paged cache, as the engine runs it."""
    params, page, length = sharp_params(CONFIG), 4, 23
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(0, 256, (2, length + 1), dtype=np.int32))
    hidden = jax.jit(lambda tokens: run(params, CONFIG, tokens).hidden)(tokens[:, :-1])
    module = params["mtp"][0]
    whole, _ = jax.jit(lambda *given: mtp_hidden(module, params, CONFIG, *given))(
        hidden, tokens[:, 1:]
    )
    step = jax.jit(lambda *given: run_mtp_step(module, params, CONFIG, *given))
    cache = init_cache(CONFIG, 12, page, mtp=True)
    tables = jnp.asarray(rng.permutation(12).reshape(2, 6).astype(np.int32))
    cache = cache.replace(lengths=jnp.zeros(2, jnp.int32), pages=tables)
    parts = []
    for start, stop in ((0, 5), (5, 6), (6, 17), (17, length)):
        part = slice(start, stop)
        out = step(hidden[:, part], tokens[:, start + 1 : stop + 1], cache)
        positions = jnp.broadcast_to(jnp.arange(start, stop, dtype=jnp.int32), (2, stop - start))
        entries = write(cache.entries, out.entries, cache.pages, positions)
        cache = Cache(entries, cache.lengths + (stop - start), cache.pages)
        parts.append(out.hidden)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=2e-5)


@pytest.mark.misuse
def test_speculation_needs_a_module_and_a_number():
    plain = {name: value for name, value in _params(1.0).items() if name != "mtp"}
    with pytest.raises(
        ValueError, match=r"speculative_tokens=1 needs a multi-token-prediction module"
    ):
        Engine(plain, CONFIG, options=EngineOptions(speculative_tokens=1))
    with pytest.raises(ValueError, match=r"speculative_tokens must be >= 0; got -1"):
        EngineOptions(speculative_tokens=-1)
