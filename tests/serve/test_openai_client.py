"""The official ``openai`` client, unmodified, against the real server.

The model has random weights. Where a test needs it to say something sensible, ``Script`` allows its sampler one text only;
nothing else is replaced.
"""

import httpx2
import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")
pydantic = pytest.importorskip("pydantic")

from serve.support import (  # noqa: E402
    CONFIG,
    HELLO,
    MODEL,
    SCRIPTED,
    is_idle,
    wait_until,
)

from bench._metrics import parse  # noqa: E402
from jaxmoe import chat  # noqa: E402

GREEDY = {"model": MODEL, "temperature": 0, "extra_body": {"ignore_eos": True}}


def test_models_lists_the_one_that_is_served(client):
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="other"):
        client.models.retrieve("other")


def test_a_chat_is_what_the_engine_generates_from_the_encoded_messages(client, engine):
    from jaxmoe.engine import SamplingParams

    answer = client.chat.completions.create(messages=HELLO, max_tokens=24, **GREEDY)
    prompt = [256, *chat.encode(HELLO, add_bos=False).encode()]
    params = SamplingParams(max_new_tokens=24, ignore_eos=True)
    (expected,) = engine.generate([prompt], params)
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content == expected.text
    assert choice.finish_reason == "length"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), 24)
    assert usage.total_tokens == len(prompt) + 24


def test_a_stream_joins_to_the_same_text_and_ends_with_the_usage(client):
    whole = client.chat.completions.create(messages=HELLO, max_tokens=24, **GREEDY)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    stream = client.chat.completions.create(messages=HELLO, max_tokens=24, **GREEDY, **options)
    chunks = list(stream)
    *pieces, last = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in pieces if c.choices[0].finish_reason] == ["length"]
    assert last.choices == [] and last.usage.completion_tokens == 24
    assert all(chunk.usage is None for chunk in pieces)
    assert len({chunk.id for chunk in chunks}) == 1


def test_without_include_usage_a_stream_says_nothing_about_it(client):
    stream = client.chat.completions.create(messages=HELLO, max_tokens=4, stream=True, **GREEDY)
    assert all(chunk.choices and chunk.usage is None for chunk in stream)


def test_reasoning_comes_apart_in_thinking_mode(client, says):
    says("seven is odd</think>Yes.", "seven is odd</think>Yes.")
    thinking = {"extra_body": {"chat_template_kwargs": {"thinking": True}}, "max_tokens": 64}
    answer = client.chat.completions.create(messages=HELLO, **thinking, **SCRIPTED)
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == ("seven is odd", "Yes.")
    stream = client.chat.completions.create(messages=HELLO, stream=True, **thinking, **SCRIPTED)
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "seven is odd"
    assert "".join(d.content or "" for d in deltas) == "Yes."


def test_chat_logprobs_are_those_of_the_tokens(client):
    answer = client.chat.completions.create(
        messages=HELLO, max_tokens=8, logprobs=True, top_logprobs=3, **GREEDY
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 8
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob  # Greedy takes the best.
        assert entry.token == entry.top_logprobs[0].token
        assert entry.logprob < 0
    data = bytes(b for entry in content for b in entry.bytes or ())
    assert data.decode(errors="replace") == answer.choices[0].message.content


def test_streamed_logprobs_are_the_same_as_whole_ones(client):
    options = {"messages": HELLO, "max_tokens": 8, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**options, **GREEDY)
    stream = client.chat.completions.create(stream=True, **options, **GREEDY)
    parts = [chunk.choices[0].logprobs for chunk in stream]
    entries = [entry for part in parts if part for entry in part.content]
    assert entries == whole.choices[0].logprobs.content


def test_completions_take_texts_and_token_ids_and_n(client):
    options = {"max_tokens": 6, **GREEDY}
    (a, b), (c,) = (
        [choice.text for choice in client.completions.create(prompt=prompt, **options).choices]
        for prompt in (["ab", "xyz"], list(b"ab"))
    )
    assert a == c != b
    answer = client.completions.create(
        model=MODEL, prompt=["ab", "xyz"], n=2, seed=3, max_tokens=6, temperature=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text != answer.choices[1].text
    assert answer.usage.prompt_tokens == 5
    alone = client.completions.create(model=MODEL, prompt="ab", seed=3, max_tokens=6, temperature=1)
    assert alone.choices[0].text == answer.choices[0].text


def test_completions_stream_echo_and_logprobs(client):
    whole = client.completions.create(prompt="ab", max_tokens=6, **GREEDY).choices[0].text
    stream = client.completions.create(prompt="ab", max_tokens=6, echo=True, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in stream) == "ab" + whole
    report = client.completions.create(prompt="ab", max_tokens=6, logprobs=2, **GREEDY)
    logprobs = report.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 6
    assert all(len(top) == 2 for top in logprobs.top_logprobs)


def test_stop_texts_end_the_text_and_are_not_part_of_it(client, says):
    says("one, two, three")
    answer = client.chat.completions.create(
        messages=HELLO, stop=[", th"], max_tokens=64, **SCRIPTED
    )
    assert answer.choices[0].message.content == "one, two"
    assert answer.choices[0].finish_reason == "stop"


class Verdict(pydantic.BaseModel):
    prime: bool
    digit: int = pydantic.Field(ge=0, le=9)


def test_output_satisfies_a_json_schema(client):
    # A random model, unscripted; temperature 1, several times.
    for seed in range(3):
        answer = client.chat.completions.parse(
            model=MODEL, messages=HELLO, response_format=Verdict, max_tokens=64, seed=seed
        )
        assert isinstance(answer.choices[0].message.parsed, Verdict)
        assert answer.choices[0].finish_reason == "stop"


def test_a_closed_stream_frees_its_request(client, engine):
    before = engine.stats().finished.get("cancelled", 0)
    stream = client.chat.completions.create(messages=HELLO, max_tokens=3900, stream=True, **GREEDY)
    with stream:
        next(iter(stream))  # says the role; the request may still wait
        stats = engine.stats()
        assert stats.running + stats.waiting == 1
    wait_until(lambda: is_idle(engine))
    assert engine.stats().finished["cancelled"] == before + 1


def test_a_client_that_gives_up_waiting_frees_its_request(client, engine):
    before = engine.stats().finished.get("cancelled", 0)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(
            messages=HELLO, max_tokens=3900, n=3, **GREEDY
        )
    wait_until(lambda: is_idle(engine))
    assert engine.stats().finished["cancelled"] == before + 3


def test_a_timeout_gives_what_there_is(client):
    extra = {"extra_body": {"ignore_eos": True, "timeout": 0.2}}
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, temperature=0, max_tokens=3900, **extra
    )
    assert answer.choices[0].finish_reason == "deadline"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tool_choice": "required"}, ["tool_choice", "Give tools"]),
        ({"extra_body": {"width": 4}}, ["width", "4", "leave it out"]),
        ({"max_tokens": 100000}, ["100000", "4096"]),
        ({"temperature": -1}, ["temperature", "[0, 100]", "-1"]),
    ],
)
def test_the_client_gets_one_line_for_a_mistake(client, options, words):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, **options)
    message = caught.value.body["message"]
    assert all(word in message for word in words) and "\n" not in message


def test_metrics_agree_with_the_clients_counts(client, url, engine):
    def scrape():
        return parse(httpx2.get(f"{url}/metrics").text)

    wait_until(lambda: is_idle(engine))
    before = scrape()
    prompt = completion = 0
    for i in range(5):
        text = f"{i} a prompt of its own, so that nothing is cached"
        answer = client.completions.create(prompt=text, max_tokens=3 + i, **GREEDY)
        prompt += answer.usage.prompt_tokens
        completion += answer.usage.completion_tokens
    after = scrape()

    def grown(name, **labels):
        key = (f"jaxmoe_{name}", tuple(sorted(labels.items())))
        return after[key] - before.get(key, 0)

    assert grown("prompt_tokens_total") == prompt
    assert grown("generated_tokens_total") == completion
    assert grown("requests_finished_total", reason="length") == 5
    assert grown("time_to_first_token_seconds_count") == 5
    assert grown("time_per_output_token_seconds_count") == 5
    assert grown("http_responses_total", path="/v1/completions", status="200") == 5
    experts = [key for key in after if key[0] == "jaxmoe_expert_tokens_total"]
    assert len(experts) == CONFIG.n_routed_experts  # One layer has experts.
    load = sum(after[key] - before.get(key, 0) for key in experts)
    # Every token but a request's last goes through the model once, to so many experts.
    assert load == (prompt + completion - 5) * CONFIG.num_experts_per_tok
    assert after[("jaxmoe_requests_running", ())] == after[("jaxmoe_requests_waiting", ())] == 0
