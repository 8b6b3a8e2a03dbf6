"""V3.2's text to messages: round trips, every split, every rejection."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve.messages import BOS, CALL_F, CALLS_FG, EOS, says, user

from jaxmoe import chat
from jaxmoe.chat import Delta, ParsedMessage, StreamParser, ToolCall, encode, parse

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
