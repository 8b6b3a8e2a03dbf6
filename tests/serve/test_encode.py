"""Messages to V3.2's text: golden strings by hand from the spec, and every refusal."""

import json

import pytest
from serve.messages import (
    BOS,
    CALL_F,
    CALLS_FG,
    EOS,
    FG,
    SECTION,
    TOOLS,
    F,
    rendered,
    result,
    says,
    user,
)

from jaxmoe import chat
from jaxmoe.chat import ToolCall, encode, parse

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
