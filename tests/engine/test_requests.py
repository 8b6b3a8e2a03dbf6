"""Requests from end to end: stop texts, streams, deadlines, cancellation, priorities, draining."""

import collections
import json
import threading
import time

import numpy as np
import pytest
from engine.support import (
    CONFIG,
    OPTIONS,
    WAIT_S,
    assert_empty,
    exactly,
    generated,
    in_threads,
    new_engine,
    random_prompts,
    rows_of,
    slowed,
    until,
)

from jaxmoe.engine import Chunk, Engine, EngineClosed, Result, SamplingParams
from jaxmoe.tokenizer import ByteTokenizer

# Compiled before any deadline runs.
pytestmark = pytest.mark.usefixtures("warm_engine")


# -- ends ----------------------------------------------------------------------------------------------

# Letters only: text that a stop text can be cut from.
_LETTERS = tuple((i, 100.0) for i in range(97, 105))


@pytest.fixture(scope="module")
def letters(warm_engine) -> tuple[str, Result]:
    """A prompt and its free continuation of 40 letters."""
    (result,) = warm_engine.generate(
        ["abc"], exactly(40, logit_bias=_LETTERS, temperature=2.0, seed=11)
    )
    assert len(result.text) == 40 and set(result.text) <= set("abcdefgh")
    return "abc", result


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_stop_text_ends_before_it_wherever_tokens_cut_it(shared, letters, size):
    prompt, free = letters
    stop = free.text[20 : 20 + size]
    settings = exactly(40, logit_bias=_LETTERS, temperature=2.0, seed=11, stop=("zzz", stop))
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
    settings = exactly(
        40, logit_bias=_LETTERS, temperature=2.0, seed=11, stop=(free.text[-3:] + "!",)
    )
    (result,) = shared.generate([prompt], settings)
    assert (result.text, result.finish_reason) == (free.text, "length")


def test_stop_tokens_end_and_are_not_shown(shared, letters):
    prompt, free = letters
    settings = {"logit_bias": _LETTERS, "temperature": 2.0, "seed": 11}
    stop = free.token_ids[15]
    at = free.token_ids.index(stop)
    (result,) = shared.generate([prompt], exactly(40, stop_token_ids=(3, stop), **settings))
    assert result.token_ids == free.token_ids[:at] and result.finish_reason == "stop"
    assert result.text == free.text[:at]


def test_the_models_own_stop_token_ends_unless_it_is_ignored(shared):
    bias = ((CONFIG.eos_token_id, 1000.0),)
    ends, goes_on = shared.generate(
        ["Hello"] * 2, [SamplingParams(5, logit_bias=bias), exactly(5, logit_bias=bias)]
    )
    assert (ends.token_ids, ends.text, ends.finish_reason) == ((), "", "stop")
    assert goes_on.token_ids == (CONFIG.eos_token_id,) * 5 and goes_on.finish_reason == "length"


def test_a_full_context_ends_with_length(shared):
    prompt = random_prompts(1, seed=12)[0]
    (result,) = shared.generate([prompt], exactly(1000))
    assert len(result.token_ids) == OPTIONS.max_length - len(prompt)
    assert result.finish_reason == "length"


def test_text_is_the_decoding_of_the_tokens_even_if_they_are_no_text(shared):
    for result in shared.generate(random_prompts(4, seed=13), exactly(30, temperature=2.0, seed=1)):
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
    stream = shared.submit("Hello", exactly(20))
    chunks = list(stream)
    result = stream.result(WAIT_S)
    assert sum((chunk.token_ids for chunk in chunks), ()) == result.token_ids
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert list(stream) == [] and stream.result() is result
    assert 0 < result.time_to_first_token_s <= result.total_s


def test_several_threads_may_wait_for_one_result(shared):
    stream, results = shared.submit("Hello", exactly(10)), []
    in_threads(lambda i: results.append(stream.result(WAIT_S)), 4)
    assert len(results) == 4 and len(set(map(id, results))) == 1


def test_a_result_that_is_late_is_a_timeout_and_the_request_goes_on():
    engine = slowed(new_engine(), 0.02)
    with engine:
        stream = engine.submit("Hello", exactly(8))
        with pytest.raises(TimeoutError, match=f"{stream.request_id} has not finished after 0.01"):
            stream.result(0.01)
        assert len(stream.result(WAIT_S).token_ids) == 8


def test_leaving_a_stream_early_cancels_its_request(shared):
    before = shared.stats().finished.get("cancelled", 0)
    for chunk in shared.stream("Hello", exactly(80)):
        assert chunk.token_ids
        break
    until(lambda: shared.stats().finished.get("cancelled", 0) == before + 1)


def test_callbacks_get_the_chunks_on_the_engines_thread_and_may_submit(shared):
    chunks, inner, threads = [], [], set()

    def on_chunk(chunk: Chunk) -> None:
        threads.add(threading.current_thread().name)
        chunks.append(chunk)
        if len(chunks) == 2:
            inner.append(shared.submit("inner", exactly(3)))

    result = shared.submit("Hello", exactly(6), on_chunk=on_chunk).result(WAIT_S)
    assert sum((chunk.token_ids for chunk in chunks), ()) == result.token_ids
    assert threads == {"jaxmoe-engine"}
    assert len(inner[0].result(WAIT_S).token_ids) == 3


# -- deadlines, cancellation, priorities ---------------------------------------------------------------


def test_a_deadline_ends_requests_with_what_they_have_running_or_waiting():
    with slowed(new_engine(), 0.04) as engine:
        running = [
            engine.submit("Hello", exactly(18), timeout_s=0.5) for _ in range(OPTIONS.max_running)
        ]
        waiting = engine.submit("Hello", exactly(18), timeout_s=0.1)
        late, never = [stream.result(WAIT_S) for stream in running], waiting.result(WAIT_S)
        assert never.finish_reason == "deadline" and never.token_ids == ()
        assert never.total_s >= 0.1
        (expected,) = engine.generate(["Hello"], exactly(18))
        for result in late:
            assert result.finish_reason == "deadline" and result.total_s >= 0.5
            count = len(result.token_ids)
            assert 0 < count < 18 and result.token_ids == expected.token_ids[:count]
        assert_empty(engine)


def test_a_request_in_time_is_not_cut(shared):
    result = shared.submit("Hello", exactly(5), timeout_s=WAIT_S).result(WAIT_S)
    assert result.finish_reason == "length"


def test_cancelling_ends_with_what_is_there_and_only_once():
    with slowed(new_engine(), 0.01) as engine:
        stream = engine.submit("Hello", exactly(80))
        chunks = iter(stream)
        next(chunks)
        assert stream.cancel()
        rest = list(chunks)
        assert rest[-1].finish_reason == "cancelled"
        assert 0 < len(stream.result(WAIT_S).token_ids) < 80
        assert not stream.cancel() and not engine.cancel("nobody")
        assert_empty(engine)


def test_five_hundred_requests_cancelled_at_random_times_leave_nothing_behind():
    prompts, rng = random_prompts(500, seed=15), np.random.default_rng(15)
    pauses = rng.exponential(0.003, 500)
    reasons = collections.Counter()
    with new_engine() as engine:

        def client(number: int) -> None:
            for i in range(number, 500, 5):
                stream = engine.submit(prompts[i], exactly(30), priority=i % 3)
                time.sleep(pauses[i])
                stream.cancel()
                reasons[stream.result(WAIT_S).finish_reason] += 1

        in_threads(client, 5)
        assert_empty(engine)
        assert reasons["cancelled"] > 300 and sum(reasons.values()) == 500
        assert engine.stats().finished == dict(reasons)
        (result,) = engine.generate(prompts[:1], exactly(20))
    assert [result.token_ids] == rows_of(generated(prompts[:1]), 20)


def test_higher_priorities_go_first_and_equal_ones_in_order():
    finished = []
    with slowed(new_engine(max_running=1), 0.002) as engine:
        engine.subscribe(
            lambda event: (
                finished.append(event["request_id"]) if event["type"] == "finished" else None
            )
        )
        first = engine.submit("first", exactly(10), request_id="first")
        until(lambda: engine.stats().running == 1)
        streams = [
            engine.submit("more", exactly(2), priority=p, request_id=name)
            for name, p in (("low", -1), ("a", 0), ("high", 5), ("b", 0))
        ]
        for stream in (first, *streams):
            stream.result(WAIT_S)
    assert finished == ["first", "high", "a", "b", "low"]


# -- draining and closing -----------------------------------------------------------------------------


def test_draining_refuses_new_requests_and_finishes_the_present_ones():
    engine = slowed(new_engine(), 0.005)
    streams = [engine.submit("Hello", exactly(10)) for _ in range(8)]
    assert engine.drain(0.001) is False
    assert engine.stats().draining
    with pytest.raises(EngineClosed, match="no new requests; it is draining or closed"):
        engine.submit("Hello")
    assert engine.drain(WAIT_S) is True
    assert [stream.result(0).finish_reason for stream in streams] == ["length"] * 8
    assert_empty(engine)
    engine.close()


def test_closing_cancels_what_is_left_and_stops_the_thread():
    engine = slowed(new_engine(), 0.005)
    streams = [engine.submit("Hello", exactly(80)) for _ in range(9)]
    next(iter(streams[0]))
    engine.close()
    assert [stream.result(0).finish_reason for stream in streams] == ["cancelled"] * 9
    assert not any(thread.name == "jaxmoe-engine" for thread in _threads_of(engine))
    assert_empty(engine)
    for call in (lambda: engine.submit("Hello"), engine.start):
        with pytest.raises(EngineClosed):
            call()
    engine.close()
    assert engine.drain(0)


def _threads_of(engine: Engine) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread is engine._thread]


def test_an_engine_that_was_never_started_closes():
    engine = new_engine()
    engine.close()
    with pytest.raises(EngineClosed):
        engine.submit("Hello")
