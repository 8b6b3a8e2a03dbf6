"""Tool calls: what must be called, by the official client on random weights, and the form that calls then have."""

import json
import random

import jsonschema
import numpy as np
import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")
pytest.importorskip("llguidance")

from serve.support import CONFIG, HELLO, MODEL, SCRIPTED  # noqa: E402

from jaxmoe import chat  # noqa: E402
from jaxmoe.chat._dsml import render_calls  # noqa: E402
from jaxmoe.engine import grammar  # noqa: E402
from jaxmoe.serve._body import ApiError  # noqa: E402
from jaxmoe.serve._forms import answer_form  # noqa: E402
from jaxmoe.serve._tools import Tools, calls_form, read_tools  # noqa: E402
from jaxmoe.tokenizer import ByteTokenizer  # noqa: E402

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
            "required": ["a", "b"],
        },
    },
}
# All strings have an end: random weights would hardly ever write one.
BOOK = {
    "type": "function",
    "function": {
        "name": "book",
        "parameters": {
            "type": "object",
            "$defs": {"Day": {"type": "string", "enum": ["Mon", "Tue"]}},
            "properties": {
                "city": {"type": "string", "minLength": 1, "maxLength": 8},
                "day": {"$ref": "#/$defs/Day"},
                "people": {"type": "integer", "minimum": 1, "maximum": 20},
                "tags": {
                    "type": "array",
                    "items": {"anyOf": [{"$ref": "#/$defs/Day"}, {"type": "boolean"}]},
                    "maxItems": 3,
                },
                "window": {"type": ["boolean", "null"]},
            },
            "required": ["city", "day", "people"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
BOOK_ONLY = {"type": "function", "function": {"name": "book"}}
DRAWN = {"model": MODEL, "messages": HELLO, "max_tokens": 2400}


def satisfies(call):
    """Checks a call of the client's; its arguments."""
    tool = {"book": BOOK, "now": NOW}[call.function.name]
    arguments = json.loads(call.function.arguments)
    jsonschema.validate(arguments, tool["function"].get("parameters", {"maxProperties": 0}))
    return arguments


# -- calls that are forced, on random weights --------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
def test_a_named_function_is_called_with_valid_arguments(client, strict):
    tool = {"type": "function", "function": BOOK["function"] | {"strict": strict}}
    answer = client.chat.completions.create(
        tools=[NOW, tool], tool_choice=BOOK_ONLY, seed=0, n=4, **DRAWN
    )
    found = []
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        (call,) = choice.message.tool_calls
        assert call.type == "function" and call.function.name == "book"
        found.append(satisfies(call))
    assert len({json.dumps(arguments) for arguments in found}) == 4


def test_required_calls_one_or_more_functions(client):
    answer = client.chat.completions.create(
        tools=[BOOK, NOW], tool_choice="required", seed=0, n=4, **DRAWN
    )
    names = []
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        for call in choice.message.tool_calls:
            satisfies(call)
        names.append(tuple(call.function.name for call in choice.message.tool_calls))
    assert {name for several in names for name in several} == {"book", "now"}
    assert any(len(several) > 1 for several in names)


def test_without_parallel_calls_there_is_one(client):
    answer = client.chat.completions.create(
        tools=[BOOK, NOW], tool_choice="required", parallel_tool_calls=False, n=4, seed=0, **DRAWN
    )
    assert all(len(choice.message.tool_calls) == 1 for choice in answer.choices)


def test_only_allowed_tools_are_called(client):
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    answer = client.chat.completions.create(
        tools=[BOOK, NOW], tool_choice=choice, n=4, seed=0, **DRAWN
    )
    calls = [call for choice in answer.choices for call in choice.message.tool_calls]
    assert {(call.function.name, call.function.arguments) for call in calls} == {("now", "{}")}


def test_a_forced_call_goes_round_and_back_into_the_prompt(client):
    answer = client.chat.completions.create(tools=[BOOK], tool_choice=BOOK_ONLY, seed=1, **DRAWN)
    (call,) = answer.choices[0].message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "booked"}
    again = client.chat.completions.create(
        model=MODEL,
        messages=[*HELLO, answer.choices[0].message, result],
        tools=[BOOK],
        max_tokens=4,
    )
    assert again.usage.completion_tokens <= 4
    assert again.usage.prompt_tokens > answer.usage.prompt_tokens + 50


def test_the_arguments_of_a_forced_call_are_streamed_as_they_are_written(client):
    options = {"tools": [BOOK], "tool_choice": BOOK_ONLY, "seed": 5}
    whole = client.chat.completions.create(**options, **DRAWN).choices[0].message.tool_calls[0]
    stream = client.chat.completions.create(stream=True, **options, **DRAWN)
    chunks = [chunk.choices[0] for chunk in stream]
    pieces = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert pieces[0].function.name == "book" and pieces[0].id and pieces[0].type == "function"
    assert all(piece.index == 0 and piece.id is None for piece in pieces[1:])
    text = "".join(piece.function.arguments for piece in pieces)
    assert text == whole.function.arguments
    # Never more than a character of text, or a token of JSON: here tokens are bytes.
    assert len(pieces) > len(json.loads(text)["city"]) + 5
    assert chunks[-1].finish_reason == "tool_calls"
    assert not any(chunk.delta.content for chunk in chunks)


def test_the_clients_own_helper_parses_a_strict_call_into_a_model(client):
    pydantic = pytest.importorskip("pydantic")

    class Point(pydantic.BaseModel):
        x: int = pydantic.Field(ge=0, le=99)
        on: bool

    tool = openai.pydantic_function_tool(Point, name="point")
    assert tool["function"]["strict"] is True
    answer = client.chat.completions.parse(tools=[tool], tool_choice="required", seed=2, **DRAWN)
    for call in answer.choices[0].message.tool_calls:
        assert isinstance(call.function.parsed_arguments, Point)


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_the_limit_cuts_off_is_as_far_as_it_came(client, stream):
    options = DRAWN | {"max_tokens": 150}
    answer = client.chat.completions.create(
        tools=[BOOK], tool_choice=BOOK_ONLY, seed=0, stream=stream, **options
    )
    if stream:
        chunks = [chunk.choices[0] for chunk in answer]
        content = "".join(chunk.delta.content or "" for chunk in chunks)
        functions = [c.function for chunk in chunks for c in chunk.delta.tool_calls or ()]
        name, arguments = functions[0].name, "".join(f.arguments for f in functions)
    else:
        chunks = answer.choices
        content = chunks[0].message.content
        (call,) = chunks[0].message.tool_calls
        name, arguments = call.function.name, call.function.arguments
    assert chunks[-1].finish_reason == "length" and not content and name == "book"
    assert arguments.startswith('{"city": "') and not arguments.endswith("}")


def test_a_response_format_and_tools_give_json_or_calls(client):
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    schema |= {"additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    kinds = set()
    answer = client.chat.completions.create(
        tools=[BOOK, NOW], response_format=form, n=8, seed=0, **DRAWN
    )
    for choice in answer.choices:
        kinds.add(choice.finish_reason)
        if choice.finish_reason == "tool_calls":
            assert all(satisfies(call) is not None for call in choice.message.tool_calls)
        else:
            jsonschema.validate(json.loads(choice.message.content), schema)
    assert kinds == {"tool_calls", "stop"}


# -- calls that are free -----------------------------------------------------------------------------


def test_a_tool_call_goes_round(client, says):
    says("\n\n" + render_calls([("add", {"a": 2, "b": 3})]), "The sum is 5.")
    messages = [{"role": "user", "content": "2 + 3?"}]
    first = client.chat.completions.create(
        messages=messages, tools=[ADD], max_tokens=512, **SCRIPTED
    )
    (choice,) = first.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.function.name == "add"
    arguments = json.loads(call.function.arguments)
    assert arguments == {"a": 2, "b": 3}
    result = {"role": "tool", "tool_call_id": call.id, "content": str(sum(arguments.values()))}
    messages += [choice.message, result]
    second = client.chat.completions.create(
        messages=messages, tools=[ADD], max_tokens=64, **SCRIPTED
    )
    assert second.choices[0].message.content == "The sum is 5."
    assert second.choices[0].finish_reason == "stop"
    # The prompt of the second turn is V3.2's encoding of call and result.
    plain = [messages[0], choice.message.model_dump(exclude_none=True), result]
    encoded = chat.encode(plain, tools=[ADD], add_bos=False)
    assert "<result>5</result>" in encoded
    assert second.usage.prompt_tokens == 1 + len(encoded.encode())


def test_a_streamed_tool_call_accumulates_in_the_clients_own_helper(client, says):
    says("I add.\n\n" + render_calls([("add", {"a": 2, "b": 3}), ("add", {"a": 1, "b": 1})]))
    with client.chat.completions.stream(
        messages=HELLO, tools=[ADD], max_tokens=1024, **SCRIPTED
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.content == "I add."
    assert [json.loads(c.function.arguments)["a"] for c in message.tool_calls] == [2, 1]
    assert len({call.id for call in message.tool_calls}) == 2


def test_parallel_tool_calls_false_leaves_one_call(client, says):
    says("\n\n" + render_calls([("add", {"a": 2}), ("add", {"a": 1})]))
    answer = client.chat.completions.create(
        messages=HELLO, tools=[ADD], parallel_tool_calls=False, max_tokens=1024, **SCRIPTED
    )
    assert len(answer.choices[0].message.tool_calls) == 1


@pytest.mark.parametrize("extra", [{"tool_choice": "none", "tools": [ADD]}, {}])
def test_calls_that_nobody_offered_are_content(client, says, extra):
    block = "Well.\n\n" + render_calls([("add", {"a": 2})])
    says(block)
    answer = client.chat.completions.create(messages=HELLO, max_tokens=512, **extra, **SCRIPTED)
    (choice,) = answer.choices
    assert choice.message.tool_calls is None and choice.finish_reason == "stop"
    assert choice.message.content == block


BROKEN = render_calls([("add", {"a": 2, "b": "x"})]).replace(
    "</｜DSML｜invoke>", "</｜DSML｜invoke"
)


def test_a_malformed_call_is_content(client, says):
    says("Well.\n\n" + BROKEN)
    answer = client.chat.completions.create(messages=HELLO, tools=[ADD], max_tokens=512, **SCRIPTED)
    (choice,) = answer.choices
    assert choice.message.tool_calls is None and choice.finish_reason == "stop"
    assert choice.message.content == "Well.\n\n" + BROKEN


def test_a_malformed_call_that_has_begun_to_be_streamed_stays_unfinished(client, says):
    says("Well.\n\n" + BROKEN)
    stream = client.chat.completions.create(
        messages=HELLO, tools=[ADD], max_tokens=512, stream=True, **SCRIPTED
    )
    chunks = [chunk.choices[0] for chunk in stream]
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert "".join(call.function.arguments for call in calls) == '{"a": 2, "b": "x"'
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "Well.\n\n" + BROKEN
    assert chunks[-1].finish_reason == "stop"


def test_free_arguments_are_streamed_string_by_character_and_json_once_it_is_known_to_be_right(
    client, says
):
    says("\n\n" + render_calls([("add", {"s": "abc", "l": [1, 2, 3]})]))
    stream = client.chat.completions.create(
        messages=HELLO, tools=[ADD], max_tokens=512, stream=True, **SCRIPTED
    )
    calls = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or ()]
    pieces = [call.function.arguments for call in calls]
    assert pieces == ["", '{"s": ', '"', "a", "b", "c", '"', ', "l": ', "[1, 2, 3]", "}"]


# -- the form ----------------------------------------------------------------------------------------


def tools_of(*parameters, names="fgh", **fields):
    tools = [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name, schema in zip(names, parameters, strict=False)
    ]
    return read_tools({"tools": tools, "tool_choice": "required"} | fields)


def walk(form, choose, limit=5000):
    """Text of the form, each byte chosen from those that may come; None if it does not end in time."""
    state = grammar.start(form, ByteTokenizer(), CONFIG, frozenset([257]))
    data = []
    while not state.complete:
        bias = np.zeros(CONFIG.vocab_size, np.float32)
        state.forbid(bias)
        byte = choose(np.flatnonzero(bias == 0).tolist(), len(data))
        if byte is None or byte == 257 or len(data) == limit:
            return None if byte != 257 else bytes(data).decode()
        state.take(byte)
        data.append(byte)
    return bytes(data).decode()


def fits(form, text):
    """Whether the form takes ``text``, and it can end there."""
    data = [*text.encode(), 257]
    return walk(form, lambda allowed, i: data[i] if data[i] in allowed else None) == text


VALUES = [
    ({"type": "string"}, ["", "a<b\n", 'q"\\', "</｜DSML｜x", "é" * 300]),
    ({"type": "string", "maxLength": 2}, ["", "ab", "𝄞𝄞"]),
    ({"enum": ["a b", "c", 3, None]}, ["a b", "c", 3, None]),
    ({"const": "x"}, ["x"]),
    ({"type": ["string", "null"]}, ["x", None]),
    ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, ["x", 3]),
    ({"type": "number"}, [1, -1.5]),
    ({"type": "object", "properties": {"k": {"type": "string"}}}, [{}, {"k": "v"}]),
    ({"type": "array", "items": {"type": "boolean"}}, [[], [True, False]]),
    ({}, ["x", 3, None, [1], {"a": "b"}]),
    (True, ["x", 3]),
]


@pytest.mark.parametrize(("schema", "values"), VALUES)
def test_what_the_encoder_writes_for_a_valid_value_has_the_form(schema, values):
    form = calls_form(tools_of({"type": "object", "properties": {"v": schema}, "required": ["v"]}))
    for value in values:
        assert fits(form, "\n\n" + render_calls([("f", {"v": value})])), value


@pytest.mark.parametrize(
    ("schema", "values"),
    [
        ({"type": "string", "maxLength": 2}, ["abc", 3]),
        ({"type": "string", "minLength": 2}, ["a"]),
        ({"enum": ["a b", "c"]}, ["a", "a bc", 3]),
        ({"type": "integer"}, ["3", 1.5]),
        ({"type": "string", "pattern": "^a+$"}, ["b"]),
        ({"type": "string", "format": "date"}, ["today"]),
    ],
)
def test_a_value_that_breaks_the_schema_does_not_have_the_form(schema, values):
    form = calls_form(tools_of({"properties": {"v": schema}, "required": ["v"]}))
    for value in values:
        assert not fits(form, "\n\n" + render_calls([("f", {"v": value})])), value


def test_a_string_with_a_pattern_is_written_as_json():
    schema = {"type": "string", "pattern": "^a+$"}
    form = calls_form(tools_of({"properties": {"v": schema}, "required": ["v"]}))
    raw = "\n\n" + render_calls([("f", {"v": "aa"})])
    assert not fits(form, raw)
    assert fits(form, raw.replace('string="true">aa<', 'string="false">"aa"<'))


def test_required_arguments_come_and_optional_ones_may_in_the_order_of_the_schema():
    schema = {"properties": {"a": {}, "b": {}, "c": {}}, "required": ["b", "z"]}
    form = calls_form(tools_of(schema))
    for keys in ("bz", "abz", "bcz", "abcz"):
        assert fits(form, "\n\n" + render_calls([("f", dict.fromkeys(keys, 1))])), keys
    for keys in ("", "z", "b", "zb", "bza", "bzx"):
        assert not fits(form, "\n\n" + render_calls([("f", dict.fromkeys(keys, 1))])), keys


def test_a_required_argument_without_a_property_satisfies_additional_properties():
    others = {"$ref": "#/$defs/Count"}
    parameters = {
        "properties": {"b": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": others,
        "$defs": {"Count": {"type": "integer"}},
    }

    def call(*arguments):
        return "\n\n" + render_calls([("f", dict(arguments))])

    assert fits(calls_form(tools_of(parameters)), call(("a", 3)))
    assert fits(calls_form(tools_of(parameters)), call(("b", True), ("a", 3)))
    for wrong in (call(("a", "text")), call(("a", 1.5)), call(("a", 3), ("c", 4)), call()):
        assert not fits(calls_form(tools_of(parameters)), wrong)
    anything = calls_form(tools_of({"required": ["a"]}))
    assert fits(anything, call(("a", "text"))) and fits(anything, call(("a", 3)))


def test_a_call_that_begins_must_be_right_and_other_text_is_free_where_a_tool_is_strict():
    strict = {"type": "function", "function": ADD["function"] | {"strict": True}}
    form = answer_form(None, read_tools({"tools": [strict, NOW]}))
    good = render_calls([("add", {"a": 1, "b": 2.5}), ("now", {})])
    for text in ("", "Hm.", "<｜DSML｜function_calls>", "a\n\n<｜DSML｜function_c"):
        assert fits(form, text), text
    for text in (f"\n\n{good}", f"Hm.\n\n{good}"):
        assert fits(form, text), text
    for bad in ("add</x", "sub"):
        assert not fits(form, f"Hm.\n\n{good}".replace("add", bad))
    assert not fits(form, "\n\n" + render_calls([("add", {"a": 1})]))
    assert answer_form(None, read_tools({"tools": [ADD, NOW]})) is None


@pytest.mark.parametrize("thinking", [False, True])
def test_a_schema_has_no_say_in_the_reasoning(thinking):
    form = answer_form({"type": "integer"}, Tools(), thinking)
    before = "so < much </b>\n\n</think>" if thinking else ""
    assert fits(form, f"{before}12") and not fits(form, f"{before}x")
    assert not thinking or not fits(form, "12")
    assert not fits(form, f"<｜end▁of▁sentence｜>{before}12")
    forced = answer_form({"type": "integer"}, tools_of({}), thinking)
    call = "\n\n" + render_calls([("f", {})])
    assert fits(forced, before + call) and not fits(forced, f"{before}12")


PARAMETERS = [
    BOOK["function"]["parameters"],
    {"$ref": "#/definitions/P", "definitions": {"P": {"properties": {"x": {"enum": [1, "1"]}}}}},
    {
        "properties": {
            "date": {"type": "string", "format": "date"},
            "flags": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
            | {"additionalProperties": False},
        },
        "required": ["flags"],
    },
]


@pytest.mark.parametrize("seed", range(8))
def test_whatever_has_the_form_is_parsed_by_the_strict_parser_and_satisfies_the_schemas(seed):
    rng = random.Random(seed)
    form = calls_form(tools_of(*PARAMETERS))
    text = walk(form, lambda allowed, i: rng.choice(allowed))
    message = chat.parse(text, thinking=False, require_end=False)
    assert message.tool_calls and not message.content
    for call in message.tool_calls:
        jsonschema.validate(call.arguments, PARAMETERS["fgh".index(call.name)])


def test_an_end_tag_within_json_is_part_of_the_string():
    schema = {"properties": {"v": {"type": "array"}, "w": {}}, "required": ["v", "w"]}
    value = '["</｜DSML｜parameter>","\\"</｜DSML｜parameter>"]'
    text = "\n\n" + render_calls([("f", {"v": 0, "w": "x"})]).replace(">0<", f">{value}<")
    assert fits(calls_form(tools_of(schema)), text.replace('","', '", "'))
    for step in (1, 7, len(text)):
        parser = chat.StreamParser(thinking=False, require_end=False, enforced=True)
        deltas = [d for i in range(0, len(text), step) for d in parser.feed(text[i : i + step])]
        written = "".join(d.text for d in deltas if d.kind == "arguments")
        (call,) = parser.finish().tool_calls
        assert written == call.arguments_json and not parser.unfinished
        assert call.arguments == {"v": json.loads(value), "w": "x"}


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"type": "array"}, ["must describe an object", "'array'"]),
        ({"anyOf": [{}, {}]}, ["must describe an object", "'anyOf'"]),
        ({"properties": {"a": {"$ref": "#"}}}, ["properties.a must refer into $defs", "'#'"]),
        ({"properties": {"a": {"$ref": "#/properties/b"}, "b": {}}}, ["must refer into $defs"]),
        ({"properties": {'a"b': {}}}, ["must have names without quotes"]),
        ({"properties": {"</｜DSML｜parameter": {}}}, ["must have names without quotes"]),
        ({"properties": {"a": 3}}, ["properties.a must be an object"]),
        ({"properties": [1]}, ["properties must be an object"]),
        ({"required": [1]}, ["must have names in required"]),
        ({"required": "a"}, ["required must be a list"]),
        (
            {"required": ["a"], "properties": {"b": {}}, "additionalProperties": False},
            ["must have all required names in properties", "'a'", "take it out of required"],
        ),
        ({"required": ["a"], "additionalProperties": 3}, ["properties.a must be an object"]),
        ([1], ["parameters must be an object"]),
    ],
)
def test_parameters_that_cannot_be_enforced_are_refused_with_a_way_out(parameters, words):
    with pytest.raises(ApiError) as caught:
        calls_form(tools_of(parameters))
    assert caught.value.status == 400 and "\n" not in caught.value.message
    assert all(word in caught.value.message for word in words), caught.value.message


def test_a_schema_that_the_library_refuses_is_a_mistake_of_its_tool(client):
    bad = {"properties": {"a": {"type": "array", "uniqueItems": True}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": bad}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(tools=[NOW, tool], tool_choice="required", **DRAWN)
    assert caught.value.param == "tools[1].function.parameters.properties.a"
    assert "uniqueItems" in caught.value.body["message"]
    # Where nothing is forced, it is only shown to the model.
    client.chat.completions.create(tools=[NOW, tool], **DRAWN | {"max_tokens": 2})


HUGE = {"type": "string", "pattern": "^(a{1000}){1000}$"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
def test_a_tool_whose_form_takes_too_much_work_is_refused_and_others_go_on(client, choice):
    parameters = {"type": "object", "properties": {"s": HUGE}, "required": ["s"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    with pytest.raises(openai.BadRequestError, match="too many expressions") as caught:
        client.chat.completions.create(
            model=MODEL, messages=HELLO, tools=[tool], tool_choice=choice, max_tokens=30
        )
    assert "\n" not in caught.value.body["message"]
    assert caught.value.body["message"].startswith("tools[0].function.parameters.properties.s ")
    client.completions.create(model=MODEL, prompt="Hello", max_tokens=2)


@pytest.mark.parametrize("stream", [False, True])
def test_a_form_that_takes_too_much_work_later_is_an_error_and_no_answer(client, stream):
    parameters = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2]}, "s": HUGE},
        "required": ["n", "s"],
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    with pytest.raises(openai.APIError, match="The engine failed at this request"):
        answer = client.chat.completions.create(
            model=MODEL,
            messages=HELLO,
            tools=[tool],
            tool_choice="required",
            max_tokens=400,
            stream=stream,
        )
        for chunk in answer:
            assert not getattr(chunk, "choices", ()) or chunk.choices[0].finish_reason is None
