"""The engine: the tokens of ``generate`` whoever shares the steps, and every request ends, whatever happens."""

import collections
import functools
import json
import threading
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.clear import sharp_params

import jaxmoe
from jaxmoe.engine import (
    Chunk,
    Engine,
    EngineClosed,
    EngineOptions,
    QueueFull,
    Result,
    SamplingParams,
)
from jaxmoe.sharding import make_mesh
from jaxmoe.tokenizer import ByteTokenizer

CONFIG = jaxmoe.presets["tiny"].replace(
    num_nextn_predict_layers=0,
    num_hidden_layers=3,
    hidden_size=64,
    intermediate_size=64,
    moe_intermediate_size=32,
    num_attention_heads=2,
    index_n_heads=4,
    index_topk=16,
    max_position_embeddings=128,
)
MOE_LAYERS, ACTIVE = 2, CONFIG.num_experts_per_tok
# Room for three or four requests: six run, and so some give way.
OPTIONS = EngineOptions(max_running=6, max_step_tokens=16, page_size=4, pages=40, max_length=96)
WAIT_S = 60  # a hang is a failure


@functools.cache
def _params() -> dict:
    return sharp_params(CONFIG)


def _engine(options: EngineOptions = OPTIONS, **changes) -> Engine:
    """An engine of its own; it shares compiled functions with the others."""
    fields = {name: changes.pop(name) for name in list(changes) if hasattr(options, name)}
    return Engine(_params(), CONFIG, options=_replace(options, **fields), **changes)


def _replace(options: EngineOptions, **fields) -> EngineOptions:
    return EngineOptions(**{**vars(options), **fields})


@pytest.fixture(scope="module")
def shared() -> Iterator[Engine]:
    """One engine for the tests that leave it as it was."""
    with _engine() as engine:
        yield engine


@pytest.fixture(scope="module", autouse=True)
def _compiled(shared):
    """Nobody's deadline passes while something is compiled."""
    shared.warmup()


@pytest.fixture(autouse=True)
def _no_page_is_lost(request):
    """After every test of the shared engine nothing is left in it."""
    yield
    if "shared" in request.fixturenames:
        stats = request.getfixturevalue("shared").stats()
        assert (stats.running, stats.waiting, stats.pages_held) == (0, 0, 0)


def _assert_empty(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_held) == (0, 0, 0)
    for pool, slots in zip(engine._scheduler.pools, engine._scheduler._slots, strict=True):
        assert pool.available == pool.pages
        assert sorted(slots) == list(range(engine.options.max_running))
    assert not engine._requests


def _free(new: int, **settings) -> SamplingParams:
    """For exactly ``new`` tokens."""
    return SamplingParams(max_new_tokens=new, ignore_eos=True, **settings)


LONGEST, MOST_NEW, ROWS = (
    50,
    40,
    8,
)  # of what goes through ``generate``: few shapes, few compilations


def _prompts(count: int, seed: int = 0, longest: int = LONGEST) -> list[list[int]]:
    """Random bytes; half of the prompts begin with one of two long texts."""
    rng = np.random.default_rng(seed)
    beginnings = [rng.integers(0, 256, 30).tolist() for _ in range(2)]
    prompts = []
    for i in range(count):
        own = rng.integers(0, 256, int(rng.integers(1, longest))).tolist()
        begins = beginnings[i // 2 % 2][: int(rng.integers(1, 31))] if i % 2 else []
        prompts.append([*begins, *own][:longest])
    return prompts


def _generated(prompts: list[list[int]], cache_dtype=None, **settings) -> np.ndarray:
    """What ``jaxmoe.generate`` gives, MOST_NEW tokens each; ``settings`` [len(prompts)] for at most ROWS prompts."""
    each = {"cache_dtype": cache_dtype}
    parts = []
    for first in range(0, len(prompts), ROWS):
        own = prompts[first : first + ROWS]
        padded, lengths = np.zeros((ROWS, LONGEST), np.int32), np.ones(ROWS, np.int32)
        for row, prompt in enumerate(own):
            padded[row, : len(prompt)] = prompt
            lengths[row] = len(prompt)
        every = np.minimum(np.arange(ROWS), len(own) - 1)
        each |= {name: values[every] for name, values in settings.items()}
        new = jaxmoe.generate(_params(), CONFIG, padded, MOST_NEW, lengths=lengths, **each)
        parts.append(np.asarray(new)[: len(own)])
    return np.concatenate(parts)


def _rows(tokens: np.ndarray, new: int) -> list[tuple[int, ...]]:
    return [tuple(row[:new]) for row in tokens.tolist()]


@functools.partial(jax.jit, static_argnames="config")
def _forward(params, config, tokens):
    return jaxmoe.forward(params, config, tokens)


def _logits(tokens: list[int]) -> np.ndarray:
    """[T, V] of a whole pass; padded, so that it compiles once."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_forward(_params(), CONFIG, padded))[0, : len(tokens)]


def _in_threads(work: Callable[[int], None], count: int) -> None:
    """Runs ``work(0)`` ... at a time; the first exception of any is raised."""
    errors = []

    def guarded(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive(), "a caller waits for ever"
    if errors:
        raise errors[0]


# -- the same tokens as generate ---------------------------------------------------------------------


def _mixed_load(engine: Engine, count: int, seed: int) -> list[Result]:
    """``count`` greedy requests from four threads at random times, against ``generate``."""
    prompts = _prompts(count, seed)
    rng = np.random.default_rng(seed)
    new = rng.integers(1, 40, count)
    priorities = rng.integers(0, 3, count)
    pauses = rng.exponential(0.004, count)
    expected = _generated(prompts)
    results: list[Result | None] = [None] * count

    def client(number: int) -> None:
        streams = {}
        for i in range(number, count, 4):
            time.sleep(pauses[i])
            priority = int(priorities[i])
            streams[i] = engine.submit(prompts[i], _free(int(new[i])), priority=priority)
        for i, stream in streams.items():
            results[i] = stream.result(WAIT_S)

    _in_threads(client, 4)
    for i, result in enumerate(results):
        assert result.token_ids == tuple(expected[i, : new[i]].tolist()), f"request {i}"
        assert result.finish_reason == "length" and result.prompt_tokens == len(prompts[i])
    return results


def test_mixed_greedy_requests_get_the_tokens_of_generate_although_some_give_way():
    with _engine() as engine:
        results = _mixed_load(engine, 60, seed=1)
        assert engine.stats().preemptions > 5
        assert sum(result.cached_tokens for result in results) > 50
        _assert_empty(engine)


@pytest.mark.parametrize("dtype", ["fp8", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_over_rounded_rows_requests_get_the_tokens_that_generate_has_over_such_rows(dtype):
    prompts = _prompts(ROWS, seed=11)
    with _engine(cache_dtype=dtype) as engine:
        results = engine.generate(prompts, _free(MOST_NEW))
        assert engine.stats().preemptions > 0
        _assert_empty(engine)
    expected = _generated(prompts, dtype)
    assert [result.token_ids for result in results] == _rows(expected, MOST_NEW)
    assert (expected != _generated(prompts)).any(), "the format changes nothing"


@pytest.mark.slow
def test_two_hundred_mixed_requests_on_a_tiny_cache_get_the_tokens_of_generate():
    with _engine(pages=24) as engine:
        _mixed_load(engine, 200, seed=2)
        assert engine.stats().preemptions > 50
        _assert_empty(engine)


def test_drawn_tokens_are_those_of_generate_with_the_seeds_key(shared):
    prompts = _prompts(6, seed=3, longest=20)
    temperatures = np.array([0.7, 1.0, 0.0, 1.5, 1.0, 0.4], np.float32)
    top_ps = np.array([1.0, 0.9, 1.0, 0.5, 1.0, 0.8], np.float32)
    seeds = [0, 7, 3, 2**32 - 1, 12345, 99]
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    expected = _generated(prompts, temperature=temperatures, top_p=top_ps, key=keys)
    settings = [
        _free(20, temperature=float(t), top_p=float(p), seed=s)
        for t, p, s in zip(temperatures, top_ps, seeds, strict=True)
    ]
    together = shared.generate(prompts, settings)
    assert [result.token_ids for result in together] == _rows(expected, 20)
    for i in (1, 4):
        (alone,) = shared.generate(prompts[i : i + 1], settings[i])
        assert alone.token_ids == together[i].token_ids


def test_without_a_seed_draws_differ_from_request_to_request(shared):
    prompt = _prompts(1, seed=4)[0]
    results = shared.generate([prompt] * 4, _free(12, temperature=1.5))
    assert len({result.token_ids for result in results}) == 4


def test_company_of_every_kind_changes_no_tokens(shared):
    """Rows that draw, cut, penalise, report or follow a grammar share steps with rows that do not."""
    prompts = _prompts(6, seed=5, longest=20)
    kinds = [
        _free(16),
        _free(16, temperature=1.2, seed=1),
        _free(16, temperature=1.2, top_k=4, min_p=0.05, seed=2),
        _free(16, frequency_penalty=1.0, repetition_penalty=1.3),
        _free(16, logit_bias=((70, 3.0), (71, -100.0)), logprobs=2),
        SamplingParams(16, temperature=1.0, seed=3, json_schema='{"enum": ["one", "two"]}'),
    ]
    together = shared.generate(prompts, kinds)
    alone = [shared.generate([p], kind)[0] for p, kind in zip(prompts, kinds, strict=True)]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]


def test_four_ranks_give_the_tokens_of_one_device(shared, devices):
    mesh = make_mesh(expert=4, devices=devices[:4])
    prompts = _prompts(16, seed=6)
    settings = [
        _free(4 + i, temperature=0.9, seed=i) if i % 4 == 3 else _free(4 + i) for i in range(16)
    ]
    expected = shared.generate(prompts, settings)
    with _engine(max_running=2, max_step_tokens=4, pages=24, mesh=mesh) as four:
        results = four.generate(prompts, settings)
        stats = four.stats()
        _assert_empty(four)
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
    params, prompts = sharp_params(LLAMA), _prompts(3, seed=20, longest=20)
    options = EngineOptions(max_running=3, max_step_tokens=8, page_size=4, pages=30, max_length=64)
    with Engine(params, LLAMA, options=options) as engine:
        results = engine.generate(prompts, _free(12))
        assert engine.stats().expert_load.shape == (0, 0)
        assert engine.stats().rank_experts == [[]]
        _assert_empty(engine)
    for prompt, result in zip(prompts, results, strict=True):
        expected = np.asarray(jaxmoe.generate(params, LLAMA, np.array([prompt]), 12))[0]
        assert result.token_ids == tuple(expected.tolist())


# -- sampling parameters through the engine ----------------------------------------------------------


def test_penalties_and_bias_choose_what_numpy_chooses_from_a_whole_pass(shared):
    prompt = list(b"to be or not to be")
    p = _free(
        24,
        repetition_penalty=1.4,
        presence_penalty=0.6,
        frequency_penalty=0.3,
        logit_bias=((101, -50.0), (32, 1.0), (32, 0.5)),
    )
    (result,) = shared.generate([prompt], p)
    (free,) = shared.generate([prompt], _free(24))
    assert result.token_ids != free.token_ids
    raw = _logits([*prompt, *result.token_ids])
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
    prompt = _prompts(1, seed=7, longest=20)[0]
    chunks = list(shared.stream(prompt, _free(12, logprobs=3, temperature=1.0, seed=4)))
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    logprobs = [entry for chunk in chunks for entry in chunk.logprobs]
    assert [entry.token for entry in logprobs] == tokens and len(tokens) == 12
    logits = _logits([*prompt, *tokens])[len(prompt) - 1 : -1].astype(np.float64)
    exact = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for entry, row in zip(logprobs, exact, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token], abs=5e-5)
        assert [token for token, _ in entry.top] == np.argsort(-row)[:3].tolist()
        np.testing.assert_allclose([v for _, v in entry.top], np.sort(row)[:-4:-1], atol=5e-5)


def test_zero_logprobs_are_only_those_of_the_tokens_and_none_are_none(shared):
    prompt = _prompts(1, seed=8)[0]
    some, none = shared.generate([prompt] * 2, [_free(3, logprobs=0), _free(3)])
    assert [entry.top for entry in some.logprobs] == [()] * 3
    assert none.logprobs == () and none.token_ids == some.token_ids


@pytest.mark.parametrize("cut", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}])
def test_the_narrowest_cuts_are_greedy(shared, cut):
    prompt = _prompts(1, seed=9)[0]
    greedy, drawn = shared.generate(
        [prompt] * 2, [_free(10), _free(10, temperature=3.0, seed=1, **cut)]
    )
    assert drawn.token_ids == greedy.token_ids


def test_top_k_and_min_p_draw_nothing_but_what_they_leave(shared):
    prompt = _prompts(1, seed=10, longest=20)[0]
    for cut in ({"top_k": 3}, {"min_p": 0.3}):
        (result,) = shared.generate([prompt], _free(30, temperature=2.0, seed=3, **cut))
        logits = _logits([*prompt, *result.token_ids])[len(prompt) - 1 : -1]
        ranks = []
        for token, row in zip(result.token_ids, logits, strict=True):
            ranks.append(int((row > row[token]).sum()))
            if "top_k" in cut:
                assert ranks[-1] < 3
            else:
                assert row[token] >= row.max() + 2 * np.log(0.3) - 1e-4
        assert max(ranks) > 0, "always the best: nothing was drawn"


# -- ends ----------------------------------------------------------------------------------------------

# Letters only: text that a stop text can be cut from.
_LETTERS = tuple((i, 100.0) for i in range(97, 105))


@pytest.fixture(scope="module")
def letters(shared) -> tuple[str, Result]:
    """A prompt and its free continuation of 40 letters."""
    (result,) = shared.generate(["abc"], _free(40, logit_bias=_LETTERS, temperature=2.0, seed=11))
    assert len(result.text) == 40 and set(result.text) <= set("abcdefgh")
    return "abc", result


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_stop_text_ends_before_it_wherever_tokens_cut_it(shared, letters, size):
    prompt, free = letters
    stop = free.text[20 : 20 + size]
    settings = _free(40, logit_bias=_LETTERS, temperature=2.0, seed=11, stop=("zzz", stop))
    chunks = list(shared.stream(prompt, settings))
    at = free.text.find(stop)
    assert "".join(chunk.text for chunk in chunks) == free.text[:at]
    assert chunks[-1].finish_reason == "stop"
    tokens = tuple(token for chunk in chunks for token in chunk.token_ids)
    assert tokens == free.token_ids[: at + size]
    for i in range(1, len(chunks)):
        assert free.text[:at].startswith("".join(chunk.text for chunk in chunks[:i]))


def test_a_beginning_of_a_stop_text_that_does_not_go_on_is_text_after_all(shared, letters):
    prompt, free = letters
    settings = _free(
        40, logit_bias=_LETTERS, temperature=2.0, seed=11, stop=(free.text[-3:] + "!",)
    )
    (result,) = shared.generate([prompt], settings)
    assert (result.text, result.finish_reason) == (free.text, "length")


def test_stop_tokens_end_and_are_not_shown(shared, letters):
    prompt, free = letters
    settings = {"logit_bias": _LETTERS, "temperature": 2.0, "seed": 11}
    stop = free.token_ids[15]
    at = free.token_ids.index(stop)
    (result,) = shared.generate([prompt], _free(40, stop_token_ids=(3, stop), **settings))
    assert result.token_ids == free.token_ids[:at] and result.finish_reason == "stop"
    assert result.text == free.text[:at]


def test_the_models_own_stop_token_ends_unless_it_is_ignored(shared):
    bias = ((CONFIG.eos_token_id, 1000.0),)
    ends, goes_on = shared.generate(
        ["Hello"] * 2, [SamplingParams(5, logit_bias=bias), _free(5, logit_bias=bias)]
    )
    assert (ends.token_ids, ends.text, ends.finish_reason) == ((), "", "stop")
    assert goes_on.token_ids == (CONFIG.eos_token_id,) * 5 and goes_on.finish_reason == "length"


def test_a_full_context_ends_with_length(shared):
    prompt = _prompts(1, seed=12)[0]
    (result,) = shared.generate([prompt], _free(1000))
    assert len(result.token_ids) == OPTIONS.max_length - len(prompt)
    assert result.finish_reason == "length"


def test_text_is_the_decoding_of_the_tokens_even_if_they_are_no_text(shared):
    for result in shared.generate(_prompts(4, seed=13), _free(30, temperature=2.0, seed=1)):
        assert result.text == ByteTokenizer().decode(result.token_ids)


_SCHEMAS = [
    {"enum": ["red", "green", 3]},
    {"type": "integer", "minimum": -5, "maximum": 120},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 4},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    {"anyOf": [{"const": None}, {"type": "string", "pattern": "^[a-f]{2,3}$"}]},
]


def test_output_with_a_schema_satisfies_it(shared):
    jsonschema = pytest.importorskip("jsonschema")
    pytest.importorskip("llguidance")
    settings = [
        SamplingParams(80, temperature=t, seed=seed, json_schema=json.dumps(schema))
        for schema in _SCHEMAS
        for t, seed in ((0.0, 0), (1.0, 1), (3.0, 2))
    ]
    results = shared.generate(["json: "] * len(settings), settings)
    for p, result in zip(settings, results, strict=True):
        assert result.finish_reason == "stop", (p.json_schema, result.text)
        jsonschema.validate(json.loads(result.text), json.loads(p.json_schema))
    assert len({result.text for result in results}) > len(_SCHEMAS)


# -- streams -------------------------------------------------------------------------------------------


def test_chunks_join_to_the_result_and_exactly_the_last_one_says_why(shared):
    stream = shared.submit("Hello", _free(20))
    chunks = list(stream)
    result = stream.result(WAIT_S)
    assert sum((chunk.token_ids for chunk in chunks), ()) == result.token_ids
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert list(stream) == [] and stream.result() is result
    assert 0 < result.time_to_first_token_s <= result.total_s


def test_several_threads_may_wait_for_one_result(shared):
    stream, results = shared.submit("Hello", _free(10)), []
    _in_threads(lambda i: results.append(stream.result(WAIT_S)), 4)
    assert len(results) == 4 and len(set(map(id, results))) == 1


def test_a_result_that_is_late_is_a_timeout_and_the_request_goes_on():
    engine = _slowed(_engine(), 0.02)
    with engine:
        stream = engine.submit("Hello", _free(8))
        with pytest.raises(TimeoutError, match=f"{stream.request_id} has not finished after 0.01"):
            stream.result(0.01)
        assert len(stream.result(WAIT_S).token_ids) == 8


def test_leaving_a_stream_early_cancels_its_request(shared):
    before = shared.stats().finished.get("cancelled", 0)
    for chunk in shared.stream("Hello", _free(80)):
        assert chunk.token_ids
        break
    _until(lambda: shared.stats().finished.get("cancelled", 0) == before + 1)


def test_callbacks_get_the_chunks_on_the_engines_thread_and_may_submit(shared):
    chunks, inner, threads = [], [], set()

    def on_chunk(chunk: Chunk) -> None:
        threads.add(threading.current_thread().name)
        chunks.append(chunk)
        if len(chunks) == 2:
            inner.append(shared.submit("inner", _free(3)))

    result = shared.submit("Hello", _free(6), on_chunk=on_chunk).result(WAIT_S)
    assert sum((chunk.token_ids for chunk in chunks), ()) == result.token_ids
    assert threads == {"jaxmoe-engine"}
    assert len(inner[0].result(WAIT_S).token_ids) == 3


# -- prefix reuse --------------------------------------------------------------------------------------


def test_a_repeated_beginning_is_reused_and_changes_no_token():
    prompt = _prompts(2, seed=14)[1]
    longer = [*prompt, *b" and more"]
    with _engine(prefix_reuse=False) as without:
        expected = without.generate([prompt, longer], _free(10))
        assert all(result.cached_tokens == 0 for result in without.generate([prompt] * 2, _free(4)))
        assert without.stats().pages_idle == 0
    with _engine() as engine:
        (first,) = engine.generate([prompt], _free(10))
        again, more = engine.generate([prompt, longer], _free(10))
        _assert_empty(engine)
    assert first.cached_tokens == 0
    whole_pages = OPTIONS.page_size * ((len(prompt) - 1) // OPTIONS.page_size)
    assert again.cached_tokens == whole_pages > 0
    assert more.cached_tokens >= whole_pages
    assert first.token_ids == again.token_ids == expected[0].token_ids
    assert more.token_ids == expected[1].token_ids


# -- deadlines, cancellation, priorities ---------------------------------------------------------------


def _slowed(engine: Engine, seconds: float) -> Engine:
    """Every step takes at least so long."""
    compute = engine._runner.program.compute

    def slow(*arguments):
        time.sleep(seconds)
        return compute(*arguments)

    engine._runner.program = engine._runner.program._replace(compute=slow)
    return engine


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)


def test_a_deadline_ends_requests_with_what_they_have_running_or_waiting():
    with _slowed(_engine(), 0.04) as engine:
        running = [
            engine.submit("Hello", _free(18), timeout_s=0.5) for _ in range(OPTIONS.max_running)
        ]
        waiting = engine.submit("Hello", _free(18), timeout_s=0.1)
        late, never = [stream.result(WAIT_S) for stream in running], waiting.result(WAIT_S)
        assert never.finish_reason == "deadline" and never.token_ids == ()
        assert never.total_s >= 0.1
        (expected,) = engine.generate(["Hello"], _free(18))
        for result in late:
            assert result.finish_reason == "deadline" and result.total_s >= 0.5
            count = len(result.token_ids)
            assert 0 < count < 18 and result.token_ids == expected.token_ids[:count]
        _assert_empty(engine)


def test_a_request_in_time_is_not_cut(shared):
    result = shared.submit("Hello", _free(5), timeout_s=WAIT_S).result(WAIT_S)
    assert result.finish_reason == "length"


def test_cancelling_ends_with_what_is_there_and_only_once():
    with _slowed(_engine(), 0.01) as engine:
        stream = engine.submit("Hello", _free(80))
        chunks = iter(stream)
        next(chunks)
        assert stream.cancel()
        rest = list(chunks)
        assert rest[-1].finish_reason == "cancelled"
        assert 0 < len(stream.result(WAIT_S).token_ids) < 80
        assert not stream.cancel() and not engine.cancel("nobody")
        _assert_empty(engine)


def test_a_hundred_and_fifty_requests_cancelled_at_random_times_leave_nothing_behind():
    prompts, rng = _prompts(150, seed=15), np.random.default_rng(15)
    pauses = rng.exponential(0.003, 150)
    reasons = collections.Counter()
    with _engine() as engine:

        def client(number: int) -> None:
            for i in range(number, 150, 5):
                stream = engine.submit(prompts[i], _free(30), priority=i % 3)
                time.sleep(pauses[i])
                stream.cancel()
                reasons[stream.result(WAIT_S).finish_reason] += 1

        _in_threads(client, 5)
        _assert_empty(engine)
        assert reasons["cancelled"] > 100 and sum(reasons.values()) == 150
        assert engine.stats().finished == dict(reasons)
        (result,) = engine.generate(prompts[:1], _free(20))
    assert [result.token_ids] == _rows(_generated(prompts[:1]), 20)


def test_higher_priorities_go_first_and_equal_ones_in_order():
    finished = []
    with _slowed(_engine(max_running=1), 0.002) as engine:
        engine.subscribe(
            lambda event: (
                finished.append(event["request_id"]) if event["type"] == "finished" else None
            )
        )
        first = engine.submit("first", _free(10), request_id="first")
        _until(lambda: engine.stats().running == 1)
        streams = [
            engine.submit("more", _free(2), priority=p, request_id=name)
            for name, p in (("low", -1), ("a", 0), ("high", 5), ("b", 0))
        ]
        for stream in (first, *streams):
            stream.result(WAIT_S)
    assert finished == ["first", "high", "a", "b", "low"]


# -- life and failures -----------------------------------------------------------------------------------


def test_draining_refuses_new_requests_and_finishes_the_present_ones():
    engine = _slowed(_engine(), 0.005)
    streams = [engine.submit("Hello", _free(10)) for _ in range(8)]
    assert engine.drain(0.001) is False
    assert engine.stats().draining
    with pytest.raises(EngineClosed, match="no new requests; it is draining or closed"):
        engine.submit("Hello")
    assert engine.drain(WAIT_S) is True
    assert [stream.result(0).finish_reason for stream in streams] == ["length"] * 8
    _assert_empty(engine)
    engine.close()


def test_closing_cancels_what_is_left_and_stops_the_thread():
    engine = _slowed(_engine(), 0.005)
    streams = [engine.submit("Hello", _free(80)) for _ in range(9)]
    next(iter(streams[0]))
    engine.close()
    assert [stream.result(0).finish_reason for stream in streams] == ["cancelled"] * 9
    assert not any(thread.name == "jaxmoe-engine" for thread in _threads_of(engine))
    _assert_empty(engine)
    for call in (lambda: engine.submit("Hello"), engine.start):
        with pytest.raises(EngineClosed):
            call()
    engine.close()
    assert engine.drain(0)


def _threads_of(engine: Engine) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread is engine._thread]


def test_an_engine_that_was_never_started_closes():
    engine = _engine()
    engine.close()
    with pytest.raises(EngineClosed):
        engine.submit("Hello")


def _failing_once(
    engine: Engine, name: str = "compute", late: bool = False, after: int = 3
) -> None:
    """The call of ``name`` after ``after`` more raises: at once, or ``late``, when it has had its operands."""
    original, left = getattr(engine._runner.program, name), [after]

    def failing(*arguments):
        left[0] -= 1
        if left[0] == -1:
            if late:
                original(*arguments)
            raise RuntimeError("the accelerator is on fire")
        return original(*arguments)

    engine._runner.program = engine._runner.program._replace(**{name: failing})


@pytest.mark.parametrize(
    ("name", "late"), [("compute", False), ("commit", False), ("commit", True)]
)
def test_a_step_that_fails_ends_its_requests_with_the_error_and_the_engine_goes_on(
    name, late, caplog
):
    prompts = _prompts(5, seed=16)
    with _engine() as engine:
        _failing_once(engine, name, late)
        streams = [engine.submit(prompt, _free(20)) for prompt in prompts]
        last = [list(stream)[-1] for stream in streams]
        # One that came after the failing step is served.
        failed = [chunk for chunk in last if chunk.finish_reason == "error"]
        assert failed and all("the accelerator is on fire" in chunk.error for chunk in failed)
        _assert_empty(engine)
        results = engine.generate(prompts, _free(20))
        assert engine.stats().finished["error"] == len(failed)
    assert "engine step failed" in caplog.text
    assert [result.token_ids for result in results] == _rows(_generated(prompts), 20)


def test_a_callback_that_fails_ends_its_own_request_and_no_other(caplog):
    def failing(chunk: Chunk) -> None:
        raise RuntimeError("a caller's mistake")

    with _engine() as engine:
        other = engine.submit("other", _free(30))
        bad = engine.submit("bad", _free(30), on_chunk=failing)
        assert bad.result(WAIT_S).finish_reason == "cancelled"
        assert other.result(WAIT_S).finish_reason == "length"
        _assert_empty(engine)
    assert "a caller's mistake" in caplog.text


def test_a_subscriber_that_fails_disturbs_nobody(caplog):
    def failing(event: dict) -> None:
        raise RuntimeError("a watcher's mistake")

    events = []
    with _engine() as engine:
        engine.subscribe(failing)
        stop = engine.subscribe(events.append)
        (result,) = engine.generate(["Hello"], _free(4))
        stop()
        engine.generate(["Hello"], _free(4))
    assert len(result.token_ids) == 4
    assert [event["type"] for event in events] == ["first_token", "finished"]
    assert events[1]["reason"] == "length" and events[1]["output_tokens"] == 4
    assert events[1]["ttft_s"] == events[0]["seconds"] > 0 and events[1]["tpot_s"] > 0
    assert "a watcher's mistake" in caplog.text


def test_generate_that_cannot_submit_all_leaves_none_behind():
    with _slowed(_engine(max_running=1, max_waiting=2), 0.005) as engine:
        with pytest.raises(QueueFull):
            engine.generate(["Hello"] * 9, _free(80))
        assert engine.drain(WAIT_S)
        assert set(engine.stats().finished) == {"cancelled"}
        _assert_empty(engine)


def test_a_full_queue_refuses_and_takes_again_when_there_is_room():
    with _slowed(_engine(max_running=1, max_waiting=2), 0.005) as engine:
        first = engine.submit("Hello", _free(5))
        _until(lambda: engine.stats().running == 1)
        streams = [first, *(engine.submit("Hello", _free(5)) for _ in range(2))]
        with pytest.raises(QueueFull, match=r"2 requests are waiting"):
            engine.submit("Hello", _free(5))
        assert all(stream.result(WAIT_S).finish_reason == "length" for stream in streams)
        assert len(engine.generate(["Hello"], _free(5))[0].token_ids) == 5
        _assert_empty(engine)


# -- counts ----------------------------------------------------------------------------------------------


def test_stats_add_up_with_what_clients_count():
    prompts = _prompts(12, seed=17, longest=12)  # all six that run at a time have room
    with _engine() as engine:
        results = engine.generate(prompts, [_free(1 + i) for i in range(12)])
        eos = SamplingParams(5, logit_bias=((CONFIG.eos_token_id, 1000.0),))
        results += engine.generate(prompts[:2], eos)
        stats = engine.stats()
    assert stats.finished == {"length": 12, "stop": 2}
    assert stats.prompt_tokens == sum(result.prompt_tokens for result in results)
    assert stats.cached_tokens == sum(result.cached_tokens for result in results) > 0
    # Stop tokens are generated but not shown.
    assert stats.generated_tokens == sum(len(result.token_ids) for result in results) + 2
    assert stats.preemptions == 0
    # A request's last token is not computed.
    computed = stats.prompt_tokens - stats.cached_tokens + stats.generated_tokens - len(results)
    assert stats.expert_load.shape == (MOE_LAYERS, CONFIG.n_routed_experts)
    assert stats.expert_load.sum(-1).tolist() == [computed * ACTIVE] * MOE_LAYERS
    assert stats.rank_experts == [list(range(CONFIG.n_routed_experts))]
    assert stats.steps >= computed / OPTIONS.max_step_tokens
    assert 0 < stats.schedule_s < stats.step_s
    assert repr(engine).startswith("Engine(1 rank, 0 running, 0 waiting, 0 of 40 pages held)")


def test_warming_up_compiles_every_size_and_changes_nothing():
    with _engine(max_step_tokens=5) as engine:
        prompt = _prompts(2, seed=18)[1]
        (before,) = engine.generate([prompt], _free(6))
        report = engine.warmup()
        assert report["sizes"] == [1, 2, 4, 5] and report["executables"] >= 2 * 4
        assert report["seconds"] > 0
        compiled = engine._runner.program.compute._cache_size()
        results = engine.generate([prompt, *_prompts(8, seed=19)], _free(6))
        assert engine._runner.program.compute._cache_size() == compiled
        assert results[0].token_ids == before.token_ids and results[0].cached_tokens > 0
        assert engine.stats().expert_load.sum() % (ACTIVE * MOE_LAYERS) == 0
        _assert_empty(engine)


def test_warming_up_while_requests_run_disturbs_none_of_them():
    prompts = _prompts(6, seed=21)
    expected = _generated(prompts)
    with _engine() as engine:
        streams = [engine.submit(prompt, _free(40)) for prompt in prompts]
        reports = [engine.warmup() for _ in range(6)]
        results = [stream.result(WAIT_S) for stream in streams]
    assert len(reports) == 6
    assert [result.token_ids for result in results] == _rows(expected, 40)


# -- errors ----------------------------------------------------------------------------------------------


@pytest.mark.misuse
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt": ""}, ValueError, "prompt must have at least one token; got none"),
        ({"prompt": []}, ValueError, "prompt must have at least one token; got none"),
        (
            {"prompt": [1, 320]},
            ValueError,
            r"prompt ids must lie in \[0, vocab_size=320\); got 1..320",
        ),
        ({"prompt": [-1]}, ValueError, r"vocab_size=320\); got -1..-1"),
        ({"prompt": [1.5]}, TypeError, "prompt must be text or integer token ids"),
        ({"prompt": [True]}, TypeError, "prompt must be text or integer token ids"),
        (
            {"prompt": [0] * 96},
            ValueError,
            "prompt has 96 tokens but the engine's max_length is 96",
        ),
        ({"timeout_s": 0}, ValueError, "timeout_s must be > 0 or None; got 0"),
        ({"timeout_s": float("nan")}, ValueError, "timeout_s must be > 0 or None; got nan"),
        (
            {"sampling": SamplingParams(logit_bias=((320, 1.0),))},
            ValueError,
            r"logit_bias names token 320; ids must be below vocab_size \(320\)",
        ),
        ({"sampling": SamplingParams(json_schema="{")}, ValueError, "json_schema is no JSON"),
        (
            {"sampling": SamplingParams(json_schema="3")},
            ValueError,
            "json_schema must be an object",
        ),
        (
            {"sampling": SamplingParams(json_schema='{"type": "nothing"}')},
            ValueError,
            "json_schema cannot be enforced",
        ),
    ],
)
def test_misuse_is_refused_with_the_argument_and_its_value(shared, arguments, error, message):
    full = {"prompt": "Hello", "sampling": SamplingParams()} | arguments
    with pytest.raises(error, match=message):
        shared.submit(**full)


def test_a_name_in_use_is_refused_until_its_request_has_ended():
    with _slowed(_engine(), 0.005) as engine:
        first = engine.submit("Hello", _free(20), request_id="mine")
        with pytest.raises(ValueError, match="request_id 'mine' is in use; choose another"):
            engine.submit("Hello", _free(20), request_id="mine")
        assert len(first.result(WAIT_S).token_ids) == 20
        assert engine.submit("Hello", _free(2), request_id="mine").result(WAIT_S).token_ids


def test_a_request_larger_than_the_cache_is_refused_with_both_sizes():
    with _engine(pages=8) as engine:
        with pytest.raises(ValueError, match=r"\(45 tokens\) exceed .* \(8 pages of 4\)"):
            engine.submit("Hello", _free(40))
        assert engine.stats().waiting == 0


@pytest.mark.parametrize("count", [1, 3])
def test_sampling_of_another_number_than_prompts_is_refused(shared, count):
    with pytest.raises(ValueError, match=rf"one per prompt \(2\); got {count}"):
        shared.generate(["a", "b"], [SamplingParams(1)] * count)


@pytest.mark.misuse
def test_impossible_options_are_refused():
    for name in ("max_running", "max_step_tokens", "max_waiting", "page_size", "pages"):
        with pytest.raises(ValueError, match=f"{name} must be >= 1; got 0"):
            EngineOptions(**{name: 0})
    with pytest.raises(ValueError, match="cache_dtype must be one of float32, .*; got 'fp4'"):
        EngineOptions(cache_dtype="fp4")
    with pytest.raises(ValueError, match=r"max_length \(129\) must be <= .* \(128\); shorten"):
        _engine(max_length=129)
