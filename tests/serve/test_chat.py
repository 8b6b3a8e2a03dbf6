"""The V3.2 message format: golden strings by hand from the spec, round trips, every split, every rejection."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.serve import chat
from jaxmoe.serve.chat import Delta, ParsedMessage, StreamParser, ToolCall, encode, parse

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
WORDING = chat.Wording(tools="TOOLS", response_format="FORMAT", developer="SAYS: ")
ADD = {"name": "add", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": ADD}, {"type": "function", "function": {"name": "é"}}]
SECTION = 'TOOLS\n<functions>\n{"name": "add", "parameters": {"type": "object"}}\n{"name": "é"}\n</functions>\n'


def user(text="hi"):
    return {"role": "user", "content": text}


def says(content="", reasoning=None, calls=None):
    message = {"role": "assistant", "content": content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls is not None:
        message["tool_calls"] = [
            {"id": f"c{i}", "type": "function", "function": {"name": n, "arguments": a}}
            for i, (n, a) in enumerate(calls)
        ]
    return message


def result(text, call_id=None):
    return {"role": "tool", "content": text} | ({"tool_call_id": call_id} if call_id else {})


def rendered(*messages, **options):
    return encode(messages, **({"add_bos": False, "wording": WORDING} | options))


CALL_F = """<｜DSML｜function_calls>
<｜DSML｜invoke name="f">
<｜DSML｜parameter name="x" string="false">1</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜function_calls>"""
F = [("f", '{"x": 1}')]
FG = [("f", "{}"), ("g", "{}")]
CALLS_FG = """<｜DSML｜function_calls>
<｜DSML｜invoke name="f">

</｜DSML｜invoke>
<｜DSML｜invoke name="g">

</｜DSML｜invoke>
</｜DSML｜function_calls>"""

# -- encode: the rows of the table -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "options", "text"),
    [
        ([user()], {}, "<｜User｜>hi<｜Assistant｜></think>"),
        ([user()], {"thinking": True}, "<｜User｜>hi<｜Assistant｜><think>"),
        ([user()], {"add_generation_prompt": False}, "<｜User｜>hi"),
        ([user("")], {}, "<｜User｜><｜Assistant｜></think>"),
        (
            [user("a"), says("b"), user("c")],
            {"thinking": True},
            f"<｜User｜>a<｜Assistant｜></think>b{EOS}<｜User｜>c<｜Assistant｜><think>",
        ),
        (
            [user("a"), user("b")],
            {"thinking": True},
            "<｜User｜>a<｜Assistant｜></think><｜User｜>b<｜Assistant｜><think>",
        ),
        (
            [{"role": "system", "content": "be kind"}, user()],
            {},
            "be kind<｜User｜>hi<｜Assistant｜></think>",
        ),
        ([user(), says("yo")], {}, f"<｜User｜>hi<｜Assistant｜></think>yo{EOS}"),
        (
            [user(), says("yo", "hm")],
            {"thinking": True},
            f"<｜User｜>hi<｜Assistant｜><think>hm</think>yo{EOS}",
        ),
        ([user(), says("yo", "hm")], {}, f"<｜User｜>hi<｜Assistant｜></think>yo{EOS}"),
        (
            [user(), says(None, calls=F)],
            {"thinking": True},
            f"<｜User｜>hi<｜Assistant｜><think></think>\n\n{CALL_F}{EOS}",
        ),
        (
            [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])],
            {"add_generation_prompt": False},
            "<｜User｜>ab",
        ),
    ],
)
def test_turns_are_rendered_as_the_table_says(messages, options, text):
    assert rendered(*messages, **options) == text


def test_the_begin_token_comes_first_unless_the_tokenizer_adds_it():
    assert encode([user()]) == BOS + encode([user()], add_bos=False)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tools": TOOLS}, f"be kind\n\n{SECTION}"),
        ({"response_schema": {"a": "é"}}, 'be kind\n\nFORMAT\n{"a": "é"}'),
        (
            {"tools": TOOLS, "response_schema": {"a": 1}},
            f'be kind\n\n{SECTION}\n\nFORMAT\n{{"a": 1}}',
        ),
        ({"tools": [], "response_schema": {}}, "be kind"),
    ],
)
def test_tools_and_format_follow_the_system_message(options, text):
    assert rendered({"role": "system", "content": "be kind"}, **options) == text


def test_tools_without_a_system_message_make_an_empty_one():
    assert rendered(user(), tools=TOOLS) == f"\n\n{SECTION}<｜User｜>hi<｜Assistant｜></think>"


def test_a_system_message_may_have_tools_and_a_format_of_its_own():
    own = {"role": "system", "content": "s", "tools": TOOLS, "response_format": {"a": 1}}
    assert rendered(own) == rendered(
        {"role": "system", "content": "s"}, tools=TOOLS, response_schema={"a": 1}
    )
    with pytest.raises(ValueError, match=r"^tools must not be given both"):
        rendered(own, tools=TOOLS)


def test_a_developer_message_is_a_user_turn_behind_its_tools_and_format():
    developer = {
        "role": "developer",
        "content": "find",
        "tools": TOOLS,
        "response_format": {"a": 1},
    }
    assert rendered(developer, thinking=True) == (
        f'<｜User｜>\n\n{SECTION}\n\nFORMAT\n{{"a": 1}}\n\nSAYS: find<｜Assistant｜><think>'
    )
    assert rendered({"role": "developer", "content": "find"}) == (
        "<｜User｜>\n\nSAYS: find<｜Assistant｜></think>"
    )


def test_the_default_wording_shows_the_markup_that_parse_reads():
    text = encode([user()], tools=TOOLS, response_schema={"a": 1})
    shown = text[text.index("\n\n<｜DSML｜function_calls>") : text.index("\n\nStrings are")]
    shown = shown.replace('"true|false"', '"true"').replace("\n...", "")
    assert parse(shown, thinking=False, require_end=False).tool_calls == (
        ToolCall("FUNCTION", '{"PARAMETER": "VALUE"}'),
    )


def test_arguments_are_raw_strings_or_json():
    arguments = (
        '{"s": "a \\"q\\" <b>\\n", "n": 1.5, "b": true, "z": null, "l": ["é", {"k": 2}], "": "ü"}'
    )
    text = rendered(says(calls=[("f", arguments)]))
    assert text == (
        "\n\n<｜DSML｜function_calls>\n"
        '<｜DSML｜invoke name="f">\n'
        '<｜DSML｜parameter name="s" string="true">a "q" <b>\n</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="n" string="false">1.5</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="b" string="false">true</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="z" string="false">null</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="l" string="false">["é", {"k": 2}]</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="" string="true">ü</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n"
        f"</｜DSML｜function_calls>{EOS}"
    )
    assert parse(text, thinking=False).tool_calls[0].arguments == json.loads(arguments)


@pytest.mark.parametrize(
    "value",
    [
        "a</｜DSML｜parameter>b",
        "/｜DSML｜parameter",
        f"x{EOS}",
        "<｜User｜>",
        "\ud800",
        ["</｜DSML｜parameter>"],
    ],
)
def test_a_string_that_would_end_its_argument_early_is_written_as_escaped_json(value):
    text = rendered(says(calls=[("f", json.dumps({"k": value}))]))
    assert f'<｜DSML｜parameter name="k" string="false">{json.dumps(value)}<' in text
    assert parse(text, thinking=False).tool_calls[0].arguments == {"k": value}


def test_other_markup_inside_a_string_stays_raw_and_comes_back():
    value = f'{CALL_F.split("<｜DSML｜parameter")[0]}</｜DSML｜invoke>\n<think></think>"\\'
    text = rendered(says(calls=[("f", json.dumps({"k": value}))]))
    assert f'string="true">{value}</｜DSML｜parameter>' in text
    assert parse(text, thinking=False).tool_calls[0].arguments == {"k": value}


# -- encode: tool results ----------------------------------------------------------------------------

RESULTS = "\n\n<function_results>\n<result>one</result>\n<result>two</result>\n</function_results>"


@pytest.mark.parametrize(
    "answers",
    [
        [result("one", "c0"), result("two", "c1")],
        [result("two", "c1"), result("one", "c0")],
        [result("one"), result("two")],
    ],
    ids=["in-order", "out-of-order", "by-position"],
)
@pytest.mark.parametrize(("thinking", "mark"), [(True, "<think>"), (False, "</think>")])
def test_results_follow_the_end_token_in_the_order_of_the_calls(answers, thinking, mark):
    calls = [user(), says("ok", "hm", calls=FG)]
    start = rendered(*calls, thinking=thinking)
    assert start.endswith(f"ok\n\n{CALLS_FG}{EOS}")
    assert rendered(*calls, *answers, thinking=thinking) == f"{start}{RESULTS}\n\n{mark}"
    assert (
        rendered(*calls, *answers, thinking=thinking, add_generation_prompt=False)
        == start + RESULTS
    )


def test_reasoning_persists_over_a_chain_of_tool_calls():
    assert rendered(
        user(),
        says("", "a", F),
        result("1", "c0"),
        says("", "b", F),
        result("2", "c0"),
        thinking=True,
    ) == (
        f"<｜User｜>hi<｜Assistant｜><think>a</think>\n\n{CALL_F}{EOS}"
        "\n\n<function_results>\n<result>1</result>\n</function_results>\n\n<think>"
        f"b</think>\n\n{CALL_F}{EOS}"
        "\n\n<function_results>\n<result>2</result>\n</function_results>\n\n<think>"
    )


def test_results_before_the_last_user_message_lead_over_without_thinking():
    text = rendered(
        user(), says("", "a", F), result("1", "c0"), says("b", "c"), user("d"), thinking=True
    )
    assert text == (
        f"<｜User｜>hi<｜Assistant｜></think>\n\n{CALL_F}{EOS}"
        f"\n\n<function_results>\n<result>1</result>\n</function_results>\n\n</think>b{EOS}"
        "<｜User｜>d<｜Assistant｜><think>"
    )


def test_results_that_are_still_missing_leave_the_list_open_at_the_end_only():
    messages = [user(), says("", "a", FG), result("two", "c1")]
    text = rendered(*messages, add_generation_prompt=False)
    assert text.endswith(f"{EOS}\n\n<function_results>\n<result>two</result>")
    for broken in (messages, [*messages, user()], [user(), says("", "a", FG), user()]):
        with pytest.raises(ValueError, match=r"^messages\[1\] must be followed by one tool.*c0"):
            rendered(*broken)


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        (
            [result("1"), result("2"), result("3")],
            r"^messages\[4\] must not be one more than the 2",
        ),
        (
            [result("1", "c0"), result("2", "c1"), result("3", "c0")],
            r"^messages\[4\] must not be one more than the 2",
        ),
        ([result("1", "c1"), result("2", "c1")], r"^messages\[3\].tool_call_id .* open: c0"),
        ([result("1", "nope")], r"^messages\[2\].tool_call_id must name a call .* got 'nope'"),
        ([result("1", "c0"), result("2")], r"^messages\[3\].tool_call_id must name .* got None"),
        ([result(None, "c0"), result("2", "c1")], r"^messages\[2\].content must be a string"),
        ([{"role": "tool", "content": "", "tool_call_id": []}], r"tool_call_id must be a string"),
    ],
)
def test_results_that_answer_no_open_call_are_refused(answers, error):
    with pytest.raises(ValueError, match="(?i)" + error):
        rendered(user(), says("", "a", FG), *answers)


def test_results_by_id_need_calls_with_ids_of_their_own():
    calls = says("", "a", FG)
    calls["tool_calls"][1]["id"] = "c0"
    with pytest.raises(ValueError, match=r"^messages\[1\].tool_calls must have ids of their own"):
        rendered(user(), calls, result("1", "c0"), result("2", "c0"))


@pytest.mark.parametrize("before", [[], [user()], [user(), says("yo")]])
def test_a_result_needs_a_call_before_it(before):
    with pytest.raises(ValueError, match=rf"^messages\[{len(before)}\] must follow an assistant"):
        rendered(*before, result("1", "c0"))


# -- encode: retention of reasoning ------------------------------------------------------------------

HISTORY = [
    user("u0"),
    says("a1", "r1"),
    user("u2"),
    says("a3", "r3", F),
    result("t4", "c0"),
    says("a5", "r5"),
    user("u6"),
    says("a7", "r7"),
]


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (chat.DROP_EARLIER, {7}),
        (chat.KEEP_TOOL_TURNS, {3, 5, 7}),
        (chat.KEEP_ALL, {1, 3, 5, 7}),
        (chat.ReasoningPolicy(lambda messages, index: messages[index]["content"] == "a5"), {5, 7}),
    ],
    ids=["drop", "tools", "all", "own"],
)
def test_a_policy_says_which_earlier_reasoning_stays(policy, kept):
    def thought(index):
        return f"<think>r{index}</think>" if index in kept else "</think>"

    assert rendered(*HISTORY, thinking=True, keep_reasoning=policy) == (
        f"<｜User｜>u0<｜Assistant｜>{thought(1)}a1{EOS}"
        f"<｜User｜>u2<｜Assistant｜>{thought(3)}a3\n\n{CALL_F}{EOS}"
        f"\n\n<function_results>\n<result>t4</result>\n</function_results>\n\n{thought(5)}a5{EOS}"
        f"<｜User｜>u6<｜Assistant｜>{thought(7)}a7{EOS}"
    )
    without = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in HISTORY]
    assert rendered(*HISTORY, keep_reasoning=policy) == rendered(*without)


def test_with_nothing_dropped_a_conversation_only_grows():
    ends = [i for i, message in enumerate(HISTORY) if message["role"] in ("user", "tool")]
    texts = [rendered(*HISTORY[: i + 1], thinking=True, keep_reasoning=chat.KEEP_ALL) for i in ends]
    assert all(b.startswith(a) for a, b in zip(texts, texts[1:], strict=False))


def test_a_kept_turn_without_reasoning_does_not_open_a_think_block():
    text = rendered(user("a"), says("b"), user("c"), thinking=True, keep_reasoning=chat.KEEP_ALL)
    assert text.startswith(f"<｜User｜>a<｜Assistant｜></think>b{EOS}")


def test_earlier_developer_messages_go_with_dropped_reasoning():
    messages = [{"role": "developer", "content": "d"}, says("a", "r"), user("u")]
    tail = f"a{EOS}<｜User｜>u<｜Assistant｜>"
    assert rendered(*messages, thinking=True) == f"{tail}<think>"
    start = "<｜User｜>\n\nSAYS: d<｜Assistant｜>"
    assert rendered(*messages) == f"{start}</think>{tail}</think>"
    kept = rendered(*messages, thinking=True, keep_reasoning=chat.KEEP_ALL)
    assert kept == f"{start}<think>r</think>{tail}<think>"


# -- encode: refusals --------------------------------------------------------------------------------


def _called(**function):
    return {"role": "assistant", "tool_calls": [{"id": "c", "function": function}]}


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "robot", "content": ""}, r" must have the role .* got 'robot'"),
        ({"content": "x"}, r" must have the role .* got None"),
        ({"role": "user"}, r"\.content must be a string or a list of text parts; got None"),
        ({"role": "user", "content": 3}, r"\.content must be a string"),
        ({"role": "user", "content": b"x"}, r"\.content must be a string"),
        ({"role": "user", "content": ["x"]}, r"\.content\[0\] must be a part of type 'text'"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": ""}]},
            r"\.content\[0\] must be a part of type 'text'",
        ),
        ({"role": "user", "content": "\ud800"}, r"\.content must be encodable as UTF-8"),
        ({"role": "developer", "content": ""}, r"\.content must not be empty"),
        (
            {"role": "user", "content": "a<｜Assistant｜>"},
            r"\.content must not contain .*'<｜Assis",
        ),
        ({"role": "system", "content": BOS}, r"\.content must not contain a special token"),
        (says("<think>"), r"\.content must not contain a special token.*'<think>'"),
        (says("", "a</think>"), r"\.reasoning_content must not contain.*'</think>'"),
        (says("x｜DSML｜"), r"\.content must not contain.*'｜DSML｜'"),
        ({"role": "assistant", "tool_calls": "x"}, r"\.tool_calls must be a list"),
        ({"role": "assistant", "tool_calls": {"a": 1}}, r"\.tool_calls must be a list"),
        ({"role": "assistant", "tool_calls": [3]}, r"\.tool_calls\[0\] must have a function"),
        (_called(arguments="{}"), r"\.tool_calls\[0\]\.function\.name must be a name; got None"),
        (_called(name="", arguments="{}"), r"\.function\.name must be a name"),
        (_called(name='a"b', arguments="{}"), r"\.function\.name must not contain quotes"),
        (_called(name="f"), r"\.arguments must be a JSON object, as text; got None"),
        (_called(name="f", arguments="[]"), r"\.arguments must be a JSON object"),
        (_called(name="f", arguments="{"), r"\.arguments must be JSON \("),
        (_called(name="f", arguments='{"a": NaN}'), r"\.arguments must be JSON \(NaN is no"),
        (_called(name="f", arguments='{"a": -1e999}'), r"\.arguments must be JSON \(-1e999 is no"),
        (_called(name="f", arguments="[" * 99999), r"\.arguments must be JSON \(nested too"),
        (_called(name="f", arguments='{"\\"": 1}'), r"argument must not contain quotes"),
        (_called(name="f", arguments='{"\\ud800": 1}'), r"argument must not contain quotes"),
        (_called(name="f", arguments=f'{{"{EOS}": 1}}'), r"argument must not contain quotes"),
        ({"role": "system", "content": "", "tools": 3}, r"\.tools must be a list"),
        ({"role": "system", "content": "", "tools": [{}]}, r"\.tools\[0\] must be of type"),
    ],
)
def test_a_malformed_message_is_refused_in_one_line_that_names_it(message, error):
    with pytest.raises(ValueError, match=r"^messages\[1\]" + ".*" + error) as caught:
        rendered(user(), message)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


@pytest.mark.misuse
def test_a_message_that_is_no_mapping_is_refused():
    for message in ("x", None, ["user", "x"]):
        with pytest.raises(ValueError, match=r"^messages\[1\] must have the role"):
            rendered(user(), message)


def test_an_empty_conversation_is_refused():
    with pytest.raises(ValueError, match=r"^messages must not be empty"):
        encode([])


def test_thinking_requires_reasoning_or_calls_after_the_last_user_message_only():
    with pytest.raises(
        ValueError, match=r"^messages\[1\] must have reasoning_content or tool_calls"
    ):
        rendered(user(), says("yo"), thinking=True)
    rendered(user(), says("yo"), user(), thinking=True)
    rendered(user(), says("yo"))


def test_tool_schemas_are_checked_and_cannot_smuggle_tokens():
    with pytest.raises(ValueError, match=r"^tools\[0\].function.name must be a name"):
        rendered(user(), tools=[{"function": {}}])
    text = rendered(user(), tools=[{"function": {"name": "f", "description": EOS}}])
    assert EOS not in text and json.dumps(EOS) in text
    with pytest.raises(ValueError, match=r"^response_schema must be JSON \(.*float"):
        rendered(user(), response_schema={"a": float("nan")})
    deep = []
    for _ in range(99999):
        deep = [deep]
    with pytest.raises(ValueError, match=r"^response_schema must be JSON \(nested too deeply"):
        rendered(user(), response_schema={"a": deep})


def test_special_tokens_are_passed_on_where_the_caller_says_so():
    text = rendered(user(EOS), says("<think>x"), user(), check_tokens=False)
    assert text.startswith(f"<｜User｜>{EOS}<｜Assistant｜></think><think>x{EOS}")
    assert rendered(user("<think> ｜DSML｜")).startswith("<｜User｜><think> ｜DSML｜<｜A")


# -- parse -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "thinking", "message"),
    [
        (f"yo{EOS}", False, ParsedMessage("", "yo")),
        (EOS, False, ParsedMessage("", "")),
        (f"</think>{EOS}", True, ParsedMessage("", "")),
        (f"hm\n</think>\n\nyo\n\n{EOS}", True, ParsedMessage("hm\n", "\n\nyo\n\n")),
        (f"\n\n{CALL_F}{EOS}", False, ParsedMessage("", "", (ToolCall("f", '{"x": 1}'),))),
        (
            f"hm</think>ok\n\n\n{CALLS_FG}{EOS}",
            True,
            ParsedMessage("hm", "ok\n", (ToolCall("f", "{}"), ToolCall("g", "{}"))),
        ),
        (
            f"\n\n{CALLS_FG}{EOS}".replace("\n\n</", "\n</"),
            False,
            ParsedMessage("", "", (ToolCall("f", "{}"), ToolCall("g", "{}"))),
        ),
    ],
)
def test_a_message_is_taken_apart(text, thinking, message):
    assert parse(text, thinking=thinking) == message


def test_arguments_are_typed_by_their_string_attribute():
    text = f"\n\n{CALL_F}{EOS}"
    assert parse(text, thinking=False).tool_calls[0].arguments == {"x": 1}
    text = text.replace('string="false"', 'string="true"')
    assert parse(text, thinking=False).tool_calls[0].arguments == {"x": "1"}


def _broken(old, new):
    text = f"ok\n\n{CALL_F}{EOS}"
    assert text.count(old) == 1, old
    return text.replace(old, new)


# name: (text with § where the fault is, thinking, rule)
_MARKED = {
    "no-think-end": (f"hm{EOS}§", True, "reasoning must end in '</think>'"),
    "no-think-end-cut": ("hm</thi§", True, "reasoning must end in '</think>'"),
    "call-in-reasoning": (f"\n\n<§{CALL_F[1:]}", True, "reasoning must not contain '｜DSML｜'"),
    "no-end": ("yo§", False, "a message must end in"),
    "half-end": (f"yo{EOS[:-1]}§", False, "a message must end in"),
    "no-end-after-calls": (f"\n\n{CALL_F}§", False, f"'{EOS}' must follow"),
    "text-after-end": (f"yo{EOS}§!", False, "no text may follow"),
    "text-after-calls": (_broken(EOS, f"§\n{EOS}"), False, f"'{EOS}' must follow"),
    "two-blocks": (f"\n\n{CALL_F}§\n\n{CALL_F}{EOS}", False, f"'{EOS}' must follow"),
    "begin-token": (f"a§{BOS}{EOS}", False, "content must not contain '<｜begin"),
    "user-token": (f"a§<｜User｜>{EOS}", False, "content must not contain '<｜User｜>'"),
    "assistant-token": (f"§<｜Assistant｜>{EOS}", False, "content must not contain '<｜Assistant"),
    "think-in-content": (f"a</think>§<think>{EOS}", True, "content must not contain '<think>'"),
    "second-think-end": (f"a</think>§</think>{EOS}", True, "content must not contain '</think>'"),
    "think-in-chat": (f"a§</think>b{EOS}", False, "content must not contain '</think>'"),
    "think-in-reasoning": (f"§<think>a</think>{EOS}", True, "reasoning must not contain '<think>'"),
    "no-blank-line": (_broken("\n\n<", "\n<§"), False, "content must not contain '｜DSML｜'"),
    "other-tag": (f"\n\n<§｜DSML｜tool_calls>{EOS}", False, "content must not contain '｜DSML｜'"),
    "bad-opening": (_broken("calls>\n<｜DSML｜i", "calls§ >\n<｜DSML｜i"), False, "must follow"),
    "no-call": (
        f"\n\n<｜DSML｜function_calls>\n§</｜DSML｜function_calls>{EOS}",
        False,
        "'<｜DSML｜invoke name=\"' must follow",
    ),
    "no-name": (_broken('<｜DSML｜invoke name="f"', "§<｜DSML｜invoke"), False, "must follow"),
    "empty-name": (_broken('name="f"', 'name="§"'), False, "a function must have a name"),
    "name-open": (
        f'\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="§f{EOS}',
        False,
        "is missing",
    ),
    "no-line-after-name": (_broken('"f">\n', '"f"§>'), False, "must follow"),
    "attribute": (_broken('"x" string="false"', '"x"§ string="maybe"'), False, "must follow"),
    "no-attribute": (_broken('"x" string="false"', '"x"§'), False, "must follow"),
    "no-json": (
        _broken(">1<", ">§one<"),
        False,
        "argument 'x' has string=\"false\" and must be JSON",
    ),
    "no-finite-json": (_broken(">1<", ">§1e999<"), False, "must be JSON (1e999 is no JSON number)"),
    "nan": (_broken(">1<", ">§NaN<"), False, "must be JSON (NaN is no JSON number)"),
    "huge-int": (_broken(">1<", f">§{'1' * 5000}<"), False, "must be JSON"),
    "deep-json": (_broken(">1<", f">§{'[' * 99999}<"), False, "must be JSON (nested too deeply)"),
    "argument-open": (
        _broken("1</｜DSML｜parameter>", "§1"),
        False,
        "'</｜DSML｜parameter>' must follow",
    ),
    "text-after-argument": (_broken("parameter>\n", "parameter>§ \n"), False, "must follow"),
    "call-open": (_broken("</｜DSML｜invoke>\n", "§"), False, "must follow"),
    "block-open": (_broken("</｜DSML｜function_calls>", "§"), False, "must follow"),
    "twice": (
        _broken("parameter>\n", 'parameter>\n<｜DSML｜parameter name="§x" string="true">'),
        False,
        "argument 'x' must not be given twice",
    ),
}
REJECTED = {
    name: (text.replace("§", ""), thinking, text.index("§"), rule)
    for name, (text, thinking, rule) in _MARKED.items()
}


@pytest.mark.parametrize("name", REJECTED)
def test_the_strict_parser_rejects(name):
    text, thinking, position, rule = REJECTED[name]
    with pytest.raises(chat.ChatFormatError) as caught:
        parse(text, thinking=thinking)
    assert rule in caught.value.rule
    assert caught.value.position == position, (
        caught.value.rule,
        text[caught.value.position :][:20],
    )
    assert f"character {position}" in str(caught.value) and "\n" not in str(caught.value)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.position, copy.rule, str(copy)) == (position, caught.value.rule, str(caught.value))


def test_the_end_token_may_be_left_out_where_the_engine_keeps_it():
    for text in ("yo", f"yo{EOS}", f"yo\n\n{CALL_F}", f"yo\n\n{CALL_F}{EOS}"):
        assert parse(text, thinking=False, require_end=False).content == "yo"
    assert parse("yo\n\n<｜DSML", thinking=False, require_end=False).content == "yo\n\n<｜DSML"


# -- round trips -------------------------------------------------------------------------------------

TEXT = st.text(st.sampled_from('aé￿𝄞 \n<>/"\\｜{}') | st.characters(codec="utf-8"), max_size=12)
MARKUP = st.sampled_from(
    [
        CALL_F,
        "</｜DSML｜parameter>",
        "</｜DSML｜invoke>\n",
        EOS,
        "</think>",
        "\n\n<｜DSML",
        "</｜DSML｜p",
    ]
)
PLAIN = st.lists(TEXT | st.sampled_from(["\n\n<｜DSML", "\n\n\n", "</thi", "<｜end"])).map("".join)
PLAIN = PLAIN.filter(lambda text: not any(token in text for token in chat.SPECIAL_TOKENS))
NAME = st.text(st.characters(codec="utf-8", exclude_characters='"｜<'), max_size=5)
VALUE = st.recursive(
    st.lists(TEXT | MARKUP, max_size=3).map("".join)
    | st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
CALLS = st.lists(st.tuples(NAME.filter(bool), st.dictionaries(NAME, VALUE, max_size=3)), max_size=3)


def _written(reasoning, content, calls, thinking):
    """What the model would have written after the prompt."""
    message = says(content, reasoning, [(name, json.dumps(a)) for name, a in calls])
    prompt = encode([user()], thinking=thinking)
    whole = encode([user(), message], thinking=thinking)
    assert whole.startswith(prompt)
    return whole[len(prompt) :]


@settings(max_examples=300)
@given(PLAIN.filter(bool), PLAIN, CALLS, st.booleans())
def test_what_was_encoded_is_parsed_back(reasoning, content, calls, thinking):
    text = _written(reasoning, content, calls, thinking)
    parsed = parse(text, thinking=thinking)
    assert (parsed.reasoning, parsed.content) == (reasoning if thinking else "", content)
    assert [(call.name, call.arguments) for call in parsed.tool_calls] == calls
    again = encode([user(), parsed.to_message()], thinking=thinking)
    assert again.endswith(text)


def test_a_parsed_message_takes_the_ids_it_is_given():
    parsed = parse(f"\n\n{CALLS_FG}{EOS}", thinking=False)
    assert [c["id"] for c in parsed.to_message(["x", "y"])["tool_calls"]] == ["x", "y"]
    with pytest.raises(ValueError, match="call_ids must be one per tool call"):
        parsed.to_message(["x"])


# -- streams -----------------------------------------------------------------------------------------


def _stream(pieces, thinking, **options):
    """The message, the deltas put together, and the fault if there is one."""
    parser = StreamParser(thinking, **options)
    deltas, fault = [], None
    try:
        for piece in pieces:
            deltas += parser.feed(piece)
        deltas += parser.flush()
        message = parser.finish()
    except chat.ChatFormatError as error:
        message, fault = None, (error.position, error.rule)
    together = {}
    for delta in deltas:
        assert delta.text
        together.setdefault((delta.kind, delta.index), []).append(delta.text)
    return message, {key: "".join(texts) for key, texts in together.items()}, fault


def _expected(message):
    """The deltas of a message, put together."""
    together = {("reasoning", 0): message.reasoning, ("content", 0): message.content}
    for i, call in enumerate(message.tool_calls):
        together |= {("call", i): call.name, ("arguments", i): call.arguments_json}
    return {key: text for key, text in together.items() if text}


def _splits(text, cuts):
    places = sorted({min(cut, len(text)) for cut in cuts})
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


EXAMPLE = (
    'think <b</thin</think>say < \n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="s" string="true">"</｜DSML｜x\\\n</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="n" string="false">[1, 2]</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    '<｜DSML｜invoke name="g">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>' + EOS
)


@pytest.mark.parametrize("whole_calls", [False, True])
def test_every_split_of_a_message_in_two_and_into_characters_gives_the_same(whole_calls):
    message = parse(EXAMPLE, thinking=True)
    assert message == ParsedMessage(
        "think <b</thin",
        "say < ",
        (ToolCall("f", '{"s": "\\"</｜DSML｜x\\\\\\n", "n": [1, 2]}'), ToolCall("g", "{}")),
    )
    splits = [[EXAMPLE[:i], EXAMPLE[i:]] for i in range(len(EXAMPLE))] + [list(EXAMPLE)]
    for pieces in splits:
        got, deltas, fault = _stream(pieces, True, whole_calls=whole_calls)
        assert (got, deltas, fault) == (message, _expected(message), None), pieces


@settings(max_examples=300)
@given(PLAIN, PLAIN, CALLS, st.booleans(), st.lists(st.integers(0, 400)), st.booleans())
def test_any_split_gives_what_parse_gives(reasoning, content, calls, thinking, cuts, tolerant):
    if not reasoning and not calls:
        reasoning = "hm"
    text = _written(reasoning, content, calls, thinking)
    message, deltas, fault = _stream(_splits(text, cuts), thinking, tolerant=tolerant)
    assert fault is None and message == parse(text, thinking=thinking)
    assert deltas == _expected(message)


@pytest.mark.parametrize("name", REJECTED)
def test_every_split_of_malformed_text_meets_the_same_fault(name):
    text, thinking, position, _ = REJECTED[name]
    with pytest.raises(chat.ChatFormatError) as caught:
        parse(text, thinking=thinking)
    cuts = range(min(len(text), 300))
    for pieces in [[text[:i], text[i:]] for i in cuts] + [list(text)]:
        assert _stream(pieces, thinking)[2] == (position, caught.value.rule)


def test_a_failed_parser_keeps_failing_and_a_finished_one_takes_no_more():
    parser = StreamParser(thinking=False)
    for act in (
        lambda: parser.feed("<think>"),
        lambda: parser.feed("a"),
        parser.flush,
        parser.finish,
    ):
        with pytest.raises(chat.ChatFormatError, match="character 0"):
            act()
    parser = StreamParser(thinking=False, require_end=False)
    assert parser.feed("a") == [Delta("content", "a")]
    assert parser.flush() == [] and parser.finish() == parser.finish() == ParsedMessage("", "a")
    with pytest.raises(ValueError, match="^feed must come before"):
        parser.feed("b")


def test_text_is_given_out_at_once_and_markers_never():
    parser = StreamParser(thinking=True)
    assert parser.feed("a <") == [Delta("reasoning", "a ")]
    assert parser.feed("/") == []
    assert parser.feed("b") == [Delta("reasoning", "</b")]
    assert parser.feed("</think>c\n\n") == [Delta("content", "c")]
    assert parser.feed("\nd\n") == [Delta("content", "\n\n\nd")]
    assert parser.feed('\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f') == []
    assert parser.feed('">\n') == [Delta("call", "f", 0)]
    assert parser.feed('<｜DSML｜parameter name="k" string="true">x"') == [
        Delta("arguments", '{"k": "x\\"', 0)
    ]
    assert parser.feed("\n") == [Delta("arguments", "\\n", 0)]
    assert parser.feed("</｜DSML｜parameter>") == [Delta("arguments", '"', 0)]


def test_whole_calls_are_given_out_when_they_are_complete():
    parser = StreamParser(thinking=False, whole_calls=True)
    head, tail = f"\n\n{CALL_F}".split("</｜DSML｜invoke>\n")
    assert parser.feed(head) == []
    assert parser.feed("</｜DSML｜invoke>\n") == [
        Delta("call", "f"),
        Delta("arguments", '{"x": 1}'),
    ]
    assert parser.feed(tail + EOS) == []


# -- tolerance ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REJECTED)
def test_a_tolerant_parser_reports_the_fault_that_a_strict_one_raises(name):
    text, thinking, position, rule = REJECTED[name]
    message = parse(text, thinking=thinking, tolerant=True)
    assert message.error.startswith(f"at character {position}: ") and rule in message.error
    assert EOS not in message.content or name == "name-open"
    for pieces in [[text[:i], text[i:]] for i in range(min(len(text), 300))] + [list(text)]:
        got, deltas, _ = _stream(pieces, thinking, tolerant=True, whole_calls=True)
        assert got == message and deltas == _expected(message), pieces


def test_a_malformed_call_becomes_content_verbatim():
    text = f"ok\n\n{CALL_F}".replace(">1<", ">one<")
    message = parse(text + EOS, thinking=False, tolerant=True)
    assert (message.content, message.tool_calls) == (text, ())


def test_complete_calls_before_a_malformed_one_stay():
    bad = '<｜DSML｜invoke name="g">\n<｜DSML｜parameter name="k" string="true">cut off'
    text = f"ok\n\n{CALL_F.removesuffix('</｜DSML｜function_calls>')}{bad}"
    message = parse(text, thinking=False, tolerant=True)
    assert (message.content, message.tool_calls) == ("ok" + bad, (ToolCall("f", '{"x": 1}'),))
    # A stream has announced the call by then: its start and arguments cannot be taken back.
    got, deltas, _ = _stream(list(text), False, tolerant=True)
    assert got == message
    assert deltas == _expected(message) | {("call", 1): "g", ("arguments", 1): '{"k": "cut off'}


def test_a_tolerant_parser_reads_on_after_special_tokens_in_text():
    text = f"a<think>b</think>c<｜User｜>d\n\n{CALL_F}{EOS}"
    message = parse(text, thinking=True, tolerant=True)
    assert (message.reasoning, message.content) == ("a<think>b", "c<｜User｜>d")
    assert (
        message.tool_calls
        and message.error == "at character 1: reasoning must not contain '<think>'"
    )


def test_text_cut_off_in_reasoning_is_reasoning():
    message = parse("hm</th", thinking=True, tolerant=True, require_end=False)
    assert (message.reasoning, message.content) == ("hm</th", "")
    assert "reasoning must end" in message.error


TOKENS = st.sampled_from(
    [
        *chat.SPECIAL_TOKENS,
        "\n\n<｜DSML｜function_calls",
        ">\n",
        '<｜DSML｜invoke name="',
        '"',
        "f",
        "\n",
    ]
    + [
        '<｜DSML｜parameter name="',
        ' string="true">',
        ' string="false">',
        "1",
        "</｜DSML｜parameter>",
    ]
    + ["</｜DSML｜invoke>", "</｜DSML｜function_calls>", "<", "/", "｜", "</｜DSML", "é"]
)


@settings(max_examples=500)
@given(
    st.lists(TOKENS, max_size=20).map("".join) | st.just(f"ok\n\n{CALL_F}{EOS}"),
    st.lists(st.integers(0, 200)),
    st.tuples(st.integers(0, 140), st.integers(0, 6)),
    st.booleans(),
    st.booleans(),
)
def test_a_tolerant_parser_takes_any_text_and_agrees_with_the_strict_one(
    text, cuts, hole, thinking, require_end
):
    text = text[: hole[0]] + text[hole[0] + hole[1] :]
    options = {"require_end": require_end}
    pieces = _splits(text, cuts)
    message, deltas, _ = _stream(pieces, thinking, tolerant=True, whole_calls=True, **options)
    assert message == parse(text, thinking=thinking, tolerant=True, **options)
    assert deltas == _expected(message)
    strict, _, fault = _stream(pieces, thinking, **options)
    if fault is None:
        assert strict == message
    else:
        assert message.error == f"at character {fault[0]}: {fault[1]}"
