"""Every request ends, whatever fails; misuse is refused; counts and warm-up."""

import pytest
from engine.support import (
    ACTIVE,
    CONFIG,
    MOE_LAYERS,
    OPTIONS,
    WAIT_S,
    assert_empty,
    compiled,
    every_kind,
    exactly,
    generated,
    new_engine,
    random_prompts,
    rows_of,
    slowed,
    until,
)

from jaxmoe.engine import Chunk, Engine, EngineOptions, QueueFull, SamplingParams, sampling

# Compiled before any deadline runs.
pytestmark = pytest.mark.usefixtures("warm_engine")


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
    prompts = random_prompts(5, seed=16)
    with new_engine() as engine:
        _failing_once(engine, name, late)
        streams = [engine.submit(prompt, exactly(20)) for prompt in prompts]
        last = [list(stream)[-1] for stream in streams]
        # One that came after the failing step is served.
        failed = [chunk for chunk in last if chunk.finish_reason == "error"]
        assert failed and all("the accelerator is on fire" in chunk.error for chunk in failed)
        assert_empty(engine)
        results = engine.generate(prompts, exactly(20))
        assert engine.stats().finished["error"] == len(failed)
    assert "engine step failed" in caplog.text
    assert [result.token_ids for result in results] == rows_of(generated(prompts), 20)


def test_a_callback_that_fails_ends_its_own_request_and_no_other(caplog):
    def failing(chunk: Chunk) -> None:
        raise RuntimeError("a caller's mistake")

    with new_engine() as engine:
        other = engine.submit("other", exactly(30))
        bad = engine.submit("bad", exactly(30), on_chunk=failing)
        assert bad.result(WAIT_S).finish_reason == "cancelled"
        assert other.result(WAIT_S).finish_reason == "length"
        assert_empty(engine)
    assert "a caller's mistake" in caplog.text


def test_a_subscriber_that_fails_disturbs_nobody(caplog):
    def failing(event: dict) -> None:
        raise RuntimeError("a watcher's mistake")

    events = []
    with new_engine() as engine:
        engine.subscribe(failing)
        stop = engine.subscribe(events.append)
        (result,) = engine.generate(["Hello"], exactly(4))
        stop()
        engine.generate(["Hello"], exactly(4))
    assert len(result.token_ids) == 4
    assert [event["type"] for event in events] == ["first_token", "finished"]
    assert events[1]["reason"] == "length" and events[1]["output_tokens"] == 4
    assert events[1]["ttft_s"] == events[0]["seconds"] > 0 and events[1]["tpot_s"] > 0
    assert "a watcher's mistake" in caplog.text


def test_generate_that_cannot_submit_all_leaves_none_behind():
    with slowed(new_engine(max_running=1), 0.005) as engine:
        with pytest.raises(ValueError, match="prompt must have at least one token"):
            engine.generate([*["Hello"] * 4, ""], exactly(80))
        assert engine.drain(WAIT_S)
        assert engine.stats().finished == {"cancelled": 4}
        assert_empty(engine)


def test_a_full_queue_refuses_and_takes_again_when_there_is_room():
    with slowed(new_engine(max_running=1, max_waiting=2), 0.005) as engine:
        first = engine.submit("Hello", exactly(5))
        until(lambda: engine.stats().running == 1)
        streams = [first, *(engine.submit("Hello", exactly(5)) for _ in range(2))]
        with pytest.raises(QueueFull, match=r"2 requests are waiting"):
            engine.submit("Hello", exactly(5))
        assert all(stream.result(WAIT_S).finish_reason == "length" for stream in streams)
        assert len(engine.generate(["Hello"], exactly(5))[0].token_ids) == 5
        assert_empty(engine)


# -- counts ----------------------------------------------------------------------------------------------


def test_stats_add_up_with_what_clients_count():
    prompts = random_prompts(12, seed=17, longest=12)  # all six that run at a time have room
    with new_engine() as engine:
        results = engine.generate(prompts, [exactly(1 + i) for i in range(12)])
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


@pytest.mark.slow
def test_warming_up_compiles_every_size_and_changes_nothing():
    sampling.choose.clear_cache()  # of what other tests have compiled
    with new_engine(max_step_tokens=5) as engine:
        prompt = random_prompts(2, seed=18)[1]
        (before,) = engine.generate([prompt], exactly(6))
        report = engine.warmup()
        assert report["sizes"] == [1, 2, 4, 5] and report["executables"] >= 2 * 4
        assert report["seconds"] > 0
        warm = compiled(engine)
        results = engine.generate([prompt, *random_prompts(8, seed=19)], exactly(6))
        for settings in every_kind(6):
            for count in range(1, 6):  # steps of all sizes
                engine.generate(random_prompts(count, seed=19), settings)
        engine.generate(random_prompts(len(every_kind(6)), seed=20), every_kind(6))
        assert compiled(engine) == warm
        assert warm["choose"] == 4 * (len(sampling.Kind) - 1)
        assert results[0].token_ids == before.token_ids and results[0].cached_tokens > 0
        assert engine.stats().expert_load.sum() % (ACTIVE * MOE_LAYERS) == 0
        assert_empty(engine)


def test_warming_up_while_requests_run_disturbs_none_of_them():
    prompts = random_prompts(6, seed=21)
    expected = generated(prompts)
    with new_engine() as engine:
        streams = [engine.submit(prompt, exactly(40)) for prompt in prompts]
        reports = [engine.warmup() for _ in range(6)]
        results = [stream.result(WAIT_S) for stream in streams]
    assert len(reports) == 6
    assert [result.token_ids for result in results] == rows_of(expected, 40)


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
        ({"timeout_s": 0}, ValueError, "timeout_s must be .*> 0 or None; got 0"),
        ({"timeout_s": float("nan")}, ValueError, "timeout_s must be .*> 0 or None; got nan"),
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
    with slowed(new_engine(), 0.005) as engine:
        first = engine.submit("Hello", exactly(20), request_id="mine")
        with pytest.raises(ValueError, match="request_id 'mine' is in use; choose another"):
            engine.submit("Hello", exactly(20), request_id="mine")
        assert len(first.result(WAIT_S).token_ids) == 20
        assert engine.submit("Hello", exactly(2), request_id="mine").result(WAIT_S).token_ids


def test_a_request_larger_than_the_cache_is_refused_with_both_sizes():
    with new_engine(pages=8) as engine:
        with pytest.raises(ValueError, match=r"\(45 tokens\) exceed .* \(8 pages of 4\)"):
            engine.submit("Hello", exactly(40))
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
        new_engine(max_length=129)


def test_more_prompts_than_may_wait_are_submitted_as_there_is_room():
    with new_engine(max_running=1, max_waiting=2) as engine:
        results = engine.generate(["Hello"] * 7, exactly(3))
        assert len({result.token_ids for result in results}) == 1
        assert_empty(engine)


@pytest.mark.misuse
def test_chunks_go_one_way_only():
    with new_engine() as engine:
        with pytest.raises(TypeError, match="stream hands out the chunks itself; leave on_chunk"):
            next(engine.stream("Hello", exactly(2), on_chunk=print))
        stream = engine.submit("Hello", exactly(2), on_chunk=lambda chunk: None)
        with pytest.raises(RuntimeError, match="chunks go to its on_chunk; use result"):
            next(iter(stream))
        assert len(stream.result(WAIT_S).token_ids) == 2


@pytest.mark.misuse
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda e: e.generate("Hello"), TypeError, "prompts must be a list; got one text"),
        (lambda e: e.submit(5), TypeError, "prompt must be text or integer token ids; got 5"),
        (lambda e: e.submit("a", timeout_s="3"), ValueError, "timeout_s must be > 0 .*; got '3'"),
        (
            lambda e: e.submit("a", priority=None),
            TypeError,
            "priority must be an integer; got None",
        ),
    ],
)
def test_arguments_of_another_kind_are_refused(call, error, message):
    engine = new_engine()
    with pytest.raises(error, match=message):
        call(engine)
    engine.close()
