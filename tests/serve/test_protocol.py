"""Request bodies to sampling parameters and prompts, and every mistake to one line."""

import json

import pytest

pytest.importorskip("starlette")

from jaxmoe import chat  # noqa: E402
from jaxmoe.engine import SamplingParams  # noqa: E402
from jaxmoe.serve._body import MAX_DEPTH, ApiError, parse_object  # noqa: E402
from jaxmoe.serve.protocol import (  # noqa: E402
    MAX_CHOICES,
    ModelInfo,
    parse_chat,
    parse_completion,
)
from jaxmoe.tokenizer import ByteTokenizer  # noqa: E402

INFO = ModelInfo("m", ByteTokenizer(), 320, 1000)
HELLO = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
STRICT = {"type": "function", "function": {"name": "f", "strict": True}}


def named(name):
    return {"type": "function", "function": {"name": name}}


def allowed(mode, *names):
    tools = [named(name) for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def chat_job(**fields):
    return parse_chat({"model": "m", "messages": HELLO} | fields, INFO)


def completion_job(**fields):
    return parse_completion({"model": "m", "prompt": "hi"} | fields, INFO)


def sampling(**fields):
    return completion_job(**fields).choices[0].sampling


# -- what is understood ------------------------------------------------------------------------------


def test_defaults_are_openais():
    job = completion_job()
    assert job.choices[0].sampling == SamplingParams(16, temperature=1.0)
    assert (job.n, job.stream, job.include_usage, job.priority) == (1, False, False, 0)
    assert job.timeout_s is None


def test_every_sampling_field_arrives():
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "stop_token_ids": [3],
        "ignore_eos": True,
        "seed": -5,
    }
    more = {"max_tokens": 7, "stop": ["a", "b"], "logit_bias": {"5": -100}, "logprobs": 4}
    expected = SamplingParams(
        **fields | {"stop_token_ids": (3,)},
        max_new_tokens=7,
        stop=("a", "b"),
        logit_bias=((5, -100.0),),
        logprobs=4,
    )
    assert sampling(**fields, **more) == expected


def test_a_width_is_one_of_those_that_are_served():
    body = {"model": "m", "prompt": "hi"}
    info = INFO.__class__("m", ByteTokenizer(), 320, 1000, (3, 8))
    assert parse_completion(body | {"width": 3}, info).choices[0].sampling.width == 3
    assert parse_completion(body, info).choices[0].sampling.width is None
    for value in (5, 0, True, "8", 3.0, [3]):
        with pytest.raises(ApiError, match=r"^width must be one of 3, 8; got .*\. Leave it out"):
            parse_completion(body | {"width": value}, info)
    with pytest.raises(
        ApiError, match="width is not supported .* not in SEFP: leave it out"
    ) as error:
        completion_job(width=4)
    assert error.value.param == "width"


def test_null_means_absent():
    fields = [
        "temperature",
        "n",
        "stop",
        "seed",
        "logprobs",
        "stream",
        "logit_bias",
        "width",
        "echo",
    ]
    assert sampling(**dict.fromkeys(fields)) == sampling()


def test_unknown_fields_are_ignored():
    assert sampling(user="me", metadata={"a": 1}, foo=[1]) == sampling()


def test_a_chat_prompt_is_the_encoded_conversation_after_the_begin_token():
    (choice,) = chat_job().choices
    assert choice.prompt == [256, *chat.encode(HELLO, add_bos=False).encode()]
    assert choice.sampling.max_new_tokens == 1000 - len(choice.prompt)
    assert choice.sampling.stop == (chat.SPECIAL_TOKENS[1],)


def test_max_completion_tokens_goes_before_max_tokens():
    choice = chat_job(max_completion_tokens=5, max_tokens=9).choices[0]
    assert choice.sampling.max_new_tokens == 5


def test_unknown_fields_of_messages_do_not_reach_the_prompt():
    message = HELLO[0] | {"name": "Bob", "refusal": None, "tools": [TOOL], "annotations": []}
    assert chat_job(messages=[message]).choices == chat_job().choices


def test_thinking_opens_the_reasoning():
    job = chat_job(chat_template_kwargs={"thinking": True})
    assert job.thinking and bytes(job.choices[0].prompt[1:]).endswith(b"<think>")


def test_tools_are_in_the_prompt_unless_the_choice_is_none():
    with_tools = chat_job(tools=[TOOL])
    assert with_tools.tools and b'"name": "f"' in bytes(with_tools.choices[0].prompt[1:])
    without = chat_job(tools=[TOOL], tool_choice="none")
    assert not without.tools and without.choices == chat_job().choices


@pytest.mark.parametrize(
    ("form", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": 1}}}, {"a": 1}),
    ],
)
def test_response_formats_become_schemas(form, schema):
    for job in (chat_job, completion_job):
        found = job(response_format=form).choices[0].sampling.form
        assert (None if found is None else json.loads(found.schema)) == schema


def test_choices_of_one_seed_differ_and_the_first_is_that_of_n_1():
    seeds = [choice.sampling.seed for choice in completion_job(n=3, seed=2**63 - 2).choices]
    assert seeds == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert {choice.sampling.seed for choice in completion_job(n=3).choices} == {None}


def test_prompts_may_be_texts_or_ids_and_come_in_order():
    job = completion_job(prompt=["ab", [99], "d"], n=2, echo=True)
    prompts = [(bytes(choice.prompt), choice.echo) for choice in job.choices]
    assert prompts == [(b"ab", "ab")] * 2 + [(b"c", "c")] * 2 + [(b"d", "d")] * 2


def test_a_default_limit_shrinks_to_the_room_there_is():
    assert completion_job(prompt="x" * 990).choices[0].sampling.max_new_tokens == 10


# -- mistakes ----------------------------------------------------------------------------------------

COMMON = [
    ({"model": None}, "model", 400),
    ({"model": 5}, "model", 400),
    ({"model": "other"}, "model", 404),
    ({"temperature": True}, "temperature", 400),
    ({"temperature": "1"}, "temperature", 400),
    ({"temperature": 10**400}, "temperature", 400),
    ({"top_p": 0}, "top_p", 400),
    ({"top_k": 1.5}, "top_k", 400),
    ({"top_k": 10**30}, "top_k", 400),
    ({"min_p": -0.1}, "min_p", 400),
    ({"repetition_penalty": 0}, "repetition_penalty", 400),
    ({"presence_penalty": 3}, "presence_penalty", 400),
    ({"seed": 2**64}, "seed", 400),
    ({"seed": 0.5}, "seed", 400),
    ({"n": 0}, "n", 400),
    ({"n": MAX_CHOICES + 1}, "n", 400),
    ({"max_tokens": 0}, "max_tokens", 400),
    ({"max_tokens": "5"}, "max_tokens", 400),
    ({"max_tokens": 10**18}, "prompt", 400),
    ({"stop": ""}, "stop", 400),
    ({"stop": [1]}, "stop", 400),
    ({"stop": ["a"] * 17}, "stop", 400),
    ({"stop": {"a": 1}}, "stop", 400),
    ({"stop_token_ids": [320]}, "stop_token_ids", 400),
    ({"stop_token_ids": [True]}, "stop_token_ids", 400),
    ({"logit_bias": {"x": 1}}, "logit_bias", 400),
    ({"logit_bias": {"1_0": 1}}, "logit_bias", 400),
    ({"logit_bias": {"１": 1}}, "logit_bias", 400),
    ({"logit_bias": {"320": 1}}, "logit_bias", 400),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", 400),
    ({"logit_bias": {"1": 101}}, "logit_bias", 400),
    ({"logit_bias": [1]}, "logit_bias", 400),
    ({"stream": "yes"}, "stream", 400),
    ({"stream_options": {}}, "stream_options", 400),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage", 400),
    ({"priority": 10**9}, "priority", 400),
    ({"timeout": 0}, "timeout", 400),
    ({"timeout": -1}, "timeout", 400),
    ({"response_format": "json"}, "response_format", 400),
    ({"response_format": {"type": ["text"]}}, "response_format.type", 400),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", 400),
    ({"width": 4}, "width", 400),
    ({"functions": [1]}, "functions", 400),
    ({"store": True}, "store", 400),
    ({"guided_regex": "a"}, "guided_regex", 400),
]

COMPLETION = [
    ({"prompt": None}, "prompt", 400),
    ({"prompt": ""}, "prompt", 400),
    ({"prompt": []}, "prompt", 400),
    ({"prompt": [[]]}, "prompt", 400),
    ({"prompt": {"a": 1}}, "prompt", 400),
    ({"prompt": [1, "a"]}, "prompt", 400),
    ({"prompt": [320]}, "prompt", 400),
    ({"prompt": [-1]}, "prompt", 400),
    ({"prompt": [True]}, "prompt", 400),
    ({"prompt": [1.0]}, "prompt[0]", 400),
    ({"prompt": ["a", None]}, "prompt[1]", 400),
    ({"prompt": ["a"] * (MAX_CHOICES + 1)}, "prompt", 400),
    ({"prompt": ["a"] * 65, "n": 2}, "n", 400),
    ({"prompt": "a" * 1000}, "prompt", 400),
    ({"suffix": "a"}, "suffix", 400),
    ({"best_of": 2}, "best_of", 400),
    ({"logprobs": True}, "logprobs", 400),
    ({"logprobs": 21}, "logprobs", 400),
    ({"logprobs": 0, "echo": True}, "echo", 400),
]

CHAT = [
    ({"messages": None}, "messages", 400),
    ({"messages": []}, "messages", 400),
    ({"messages": "hi"}, "messages", 400),
    ({"messages": ["hi"]}, "messages[0]", 400),
    ({"messages": [{}]}, "messages[0]", 400),
    ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0]", 400),
    ({"messages": [{"role": ["user"], "content": "a"}]}, "messages[0]", 400),
    ({"messages": [{"role": "user"}]}, "messages[0].content", 400),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", 400),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0]",
        400,
    ),
    ({"messages": [{"role": "user", "content": "<｜User｜>"}]}, "messages[0].content", 400),
    ({"messages": [*HELLO, {"role": "assistant", "content": "a"}]}, "messages", 400),
    ({"messages": [{"role": "system", "content": "a"}]}, "messages", 400),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0]", 400),
    (
        {"messages": [{"role": "assistant", "function_call": {}}, *HELLO]},
        "messages[0].function_call",
        400,
    ),
    ({"top_logprobs": 3}, "top_logprobs", 400),
    ({"logprobs": 3}, "logprobs", 400),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", 400),
    ({"tools": "f"}, "tools", 400),
    ({"tools": [{}]}, "tools[0]", 400),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0]", 400),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", 400),
    ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice", 400),
    ({"tools": [TOOL], "tool_choice": {"type": "custom"}}, "tool_choice", 400),
    ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice", 400),
    ({"tools": [TOOL], "tool_choice": named("g")}, "tool_choice", 400),
    ({"tools": [TOOL], "tool_choice": allowed("all", "f")}, "tool_choice.allowed_tools.mode", 400),
    ({"tools": [TOOL], "tool_choice": allowed("auto")}, "tool_choice.allowed_tools.tools", 400),
    (
        {"tools": [TOOL], "tool_choice": allowed("auto", "g")},
        "tool_choice.allowed_tools.tools",
        400,
    ),
    ({"tools": [STRICT | {"function": STRICT["function"] | {"strict": 1}}]}, "strict", 400),
    ({"tool_choice": "required"}, "tool_choice", 400),
    ({"chat_template_kwargs": {"thinking": 1}}, "thinking", 400),
    ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs.x", 400),
    ({"chat_template_kwargs": [1]}, "chat_template_kwargs", 400),
    ({"parallel_tool_calls": 0}, "parallel_tool_calls", 400),
    ({"reasoning_effort": "low"}, "reasoning_effort", 400),
    ({"modalities": ["audio"]}, "modalities", 400),
    ({"max_completion_tokens": 0}, "max_completion_tokens", 400),
    ({"add_generation_prompt": False}, "add_generation_prompt", 400),
]


def check_error(make, fields, param, status):
    with pytest.raises(ApiError) as caught:
        make(**fields)
    error = caught.value
    assert (error.status, error.param) == (status, param)
    assert "\n" not in error.message and len(error.message) < 500
    assert error.message.startswith(param)
    assert error.message.endswith(".")
    json.dumps(error.envelope()).encode()


@pytest.mark.parametrize(("fields", "param", "status"), COMMON + COMPLETION)
def test_a_mistake_in_a_completion_is_one_line_that_names_the_field(fields, param, status):
    check_error(completion_job, fields, param, status)


@pytest.mark.parametrize(("fields", "param", "status"), COMMON + CHAT)
def test_a_mistake_in_a_chat_is_one_line_that_names_the_field(fields, param, status):
    check_error(chat_job, fields, param, status)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b"null",
        b"\xff{}",
        b"\xef\xbb\xbf{}",
        '{"a": 1}'.encode("utf-16"),
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": "\\ud800"}',
        b'{"\\udfff": 1}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
        b'{"a": 1} x',
        b"{'a': 1}",
    ],
)
def test_a_body_that_is_no_plain_json_object_is_one_line(body):
    with pytest.raises(ApiError) as caught:
        parse_object(body)
    assert caught.value.status == 400 and caught.value.code == "invalid_json"
    assert "\n" not in caught.value.message


def test_a_body_may_be_as_deep_as_the_limit_and_have_escapes():
    depth = MAX_DEPTH - 1
    body = b'{"a": ' + b"[" * depth + b"]" * depth + b', "b": "\\ud83d\\ude00"}'
    assert parse_object(body)["b"] == "😀"


# -- schemas that native code must not see -----------------------------------------------------------


@pytest.mark.parametrize("schema", [{"const": -(2**63)}, {"enum": ["x" * 100_000]}])
def test_a_schema_beyond_the_limits_never_reaches_the_grammar_library(schema):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    param = "response_format.json_schema.schema"
    check_error(chat_job, {"response_format": form}, param, 400)
    check_error(completion_job, {"response_format": form}, param, 400)
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"properties": {"a": schema}}},
    }
    fields = {"tools": [tool], "tool_choice": "required"}
    check_error(chat_job, fields, "tools[0].function.parameters.properties.a", 400)
