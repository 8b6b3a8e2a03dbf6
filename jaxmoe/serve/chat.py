"""Messages to the text a V3.2 model reads, and the text it writes to messages (post-training spec, section 3).

``encode`` renders OpenAI-style messages; ``parse`` and ``StreamParser`` read an assistant message back. Pure functions of
strings: which of the special tokens are single ids is the tokenizer's matter.
"""

import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jaxmoe.serve._dsml import (
    ASSISTANT,
    BEGIN,
    CALLS,
    DSML,
    END,
    END_CALLS,
    END_THINK,
    SPECIAL_TOKENS,
    THINK,
    TURN_TOKENS,
    USER,
    ChatFormatError,
    Delta,
    ParsedMessage,
    StreamParser,
    ToolCall,
    dump_json,
    is_plain,
    load_json,
    parse,
    render_calls,
)

__all__ = [
    "DROP_EARLIER",
    "KEEP_ALL",
    "KEEP_TOOL_TURNS",
    "SPECIAL_TOKENS",
    "ChatFormatError",
    "Delta",
    "ParsedMessage",
    "ReasoningPolicy",
    "StreamParser",
    "ToolCall",
    "Wording",
    "encode",
    "parse",
]

Message = Mapping[str, Any]

# -- what is kept of earlier reasoning ---------------------------------------------------------------


@dataclass(frozen=True)
class ReasoningPolicy:
    """Which reasoning stays in the prompt (spec 3.1). Only asked in thinking mode.

    Attributes:
      keeps: whether the assistant message at an index of the messages keeps its reasoning. Asked for
        messages before the last user or developer message; later ones always keep it.
      drops_developer: whether developer messages before the last user or developer message are left out.
    """

    keeps: Callable[[Sequence[Message], int], bool]
    drops_developer: bool = False


def _begins_turn(message: Message) -> bool:
    return message.get("role") in ("user", "developer")


def _in_tool_turn(messages: Sequence[Message], index: int) -> bool:
    first, last = index, index
    while first > 0 and not _begins_turn(messages[first]):
        first -= 1
    while last < len(messages) and not _begins_turn(messages[last]):
        last += 1
    return any(message.get("tool_calls") for message in messages[first:last])


DROP_EARLIER = ReasoningPolicy(lambda messages, index: False, drops_developer=True)
"""V3.2's rule: a new user message discards all earlier reasoning, and (a quirk of the released encoder) the
developer messages before it."""

KEEP_TOOL_TURNS = ReasoningPolicy(_in_tool_turn)
"""The rule of later models: turns in which tools were called keep their reasoning."""

KEEP_ALL = ReasoningPolicy(lambda messages, index: True)
"""Nothing is discarded: the text of a conversation only ever grows."""

# -- what the format says in words -------------------------------------------------------------------


@dataclass(frozen=True)
class Wording:
    """The prose of the format. The spec gives its structure and not its words: for a released checkpoint,
    pass those it was trained on.

    Attributes:
      tools: stands before the list of functions.
      response_format: stands before the response schema.
      developer: stands before a developer message.
    """

    tools: str = f"""## Tools

You can call the functions listed below. To do so, end your reply with a block of this form, with one or more calls:

{CALLS}
<{DSML}invoke name="FUNCTION">
<{DSML}parameter name="PARAMETER" string="true|false">VALUE</{DSML}parameter>
...
</{DSML}invoke>
...
{END_CALLS}

Strings are written as they are, without quotes or escapes, and marked string="true". Everything else is written as JSON and
marked string="false". The results follow between <function_results> and </function_results>.

The functions, one JSON schema per line:"""
    response_format: str = "## Response Format:\n\nReply with JSON that matches this schema:"
    developer: str = "# The user's message is: "


_WORDING = Wording()

# -- reading messages --------------------------------------------------------------------------------


class _Call(NamedTuple):
    id: str | None
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class _Turn:
    """A checked message; an assistant's holds the tool results that answer it, in the order of its calls."""

    index: int
    role: str
    content: str = ""
    reasoning: str = ""
    calls: tuple[_Call, ...] = ()
    results: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    schema: str = ""

    @property
    def asks(self) -> bool:
        """Whether the assistant speaks next."""
        return self.role in ("user", "developer")

    @property
    def is_answered(self) -> bool:
        """Whether all calls have results, and there are any."""
        return bool(self.calls) and len(self.results) == len(self.calls)


def _error(where: str, rule: str, value: Any, advice: str) -> ValueError:
    shown = reprlib.repr(value).replace("\n", " ")
    return ValueError(f"{where} {rule}; got {shown}. {advice}.")


def _text(where: str, value: Any, refused: tuple[str, ...]) -> str:
    """A message's text, from a string or a list of text parts, which are joined with nothing between."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for i, part in enumerate(value):
            text = part.get("text") if isinstance(part, Mapping) else None
            if not isinstance(text, str) or part.get("type") != "text":
                rule = "must be a part of type 'text' with a string"
                raise _error(f"{where}[{i}]", rule, part, "Only text can be encoded")
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise _error(where, "must be a string or a list of text parts", value, "Give its text")
    surrogate = re.search("[\ud800-\udfff]", value)
    if surrogate:
        rule = "must be encodable as UTF-8"
        raise _error(where, rule, surrogate.group(), "Remove the lone surrogate")
    found = next((token for token in refused if token in value), None)
    if found:
        rule = "must not contain a special token, which the model could take for structure"
        raise _error(where, rule, found, "Remove it, or pass check_tokens=False to keep it")
    return value


def _name(where: str, value: Any, *, empty: bool = False) -> str:
    """A name that can stand between quotes in the markup, which has no escapes."""
    if not isinstance(value, str) or not (value or empty):
        raise _error(where, "must be a name", value, "Give a non-empty string")
    if any(token in value for token in ('"', *SPECIAL_TOKENS)) or not is_plain(value):
        rule = "must not contain quotes, special tokens or lone surrogates"
        raise _error(where, rule, value, "Rename it")
    return value


def _id(where: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise _error(where, "must be a string", value, "Use the id of the call")
    return value


def _list(where: str, value: Any) -> Sequence[Any]:
    if not isinstance(value or (), Sequence) or isinstance(value, str | bytes):
        raise _error(where, "must be a list", value, "Leave it out if there are none")
    return value or ()


def _json(where: str, value: Any) -> str:
    try:
        return dump_json(value)
    except (TypeError, ValueError) as error:
        raise _error(where, f"must be JSON ({error})", value, "Correct it") from None


def _tools(where: str, tools: Any) -> tuple[str, ...]:
    """One line for each function."""
    lines = []
    for i, tool in enumerate(_list(where, tools)):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping):
            rule = "must be of type 'function' and hold a function"
            raise _error(f"{where}[{i}]", rule, tool, "Give its name, description and parameters")
        _name(f"{where}[{i}].function.name", function.get("name"))
        lines.append(_json(f"{where}[{i}].function", function))
    return tuple(lines)


def _call(where: str, call: Any) -> _Call:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise _error(where, "must have a function with name and arguments", call, "Add it")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = load_json(arguments)
        except ValueError as error:
            rule = f"must be JSON ({error})"
            raise _error(f"{where}.function.arguments", rule, arguments, "Correct it") from None
    if not isinstance(arguments, dict):
        rule = "must be a JSON object, as text"
        raise _error(f"{where}.function.arguments", rule, arguments, "Without arguments pass '{}'")
    for key in arguments:
        _name(f"{where}: the name of an argument", key, empty=True)
    name = _name(f"{where}.function.name", function.get("name"))
    return _Call(_id(f"{where}.id", call.get("id")), name, arguments)


def _assistant(index: int, message: Message, check_tokens: bool) -> _Turn:
    where, refused = f"messages[{index}]", SPECIAL_TOKENS if check_tokens else ()
    calls = _list(f"{where}.tool_calls", message.get("tool_calls"))

    def text(field: str) -> str:
        value = message.get(field)
        return "" if value is None else _text(f"{where}.{field}", value, refused)

    return _Turn(
        index,
        "assistant",
        content=text("content"),
        reasoning=text("reasoning_content"),
        calls=tuple(_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls)),
    )


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None


def _turn(index: int, message: Message, check_tokens: bool) -> _Turn:
    where, role = f"messages[{index}]", _role(message)
    if role == "assistant":
        return _assistant(index, message, check_tokens)
    if role == "tool":
        rule = "must follow an assistant message with tool calls"
        raise _error(where, rule, "a tool message that follows none", "Add the calls it answers")
    if role not in ("system", "user", "developer"):
        rule = "must have the role system, developer, user, assistant or tool"
        raise _error(where, rule, role if isinstance(message, Mapping) else message, "Correct it")
    content = message.get("content")
    if role == "developer" and not content:
        raise _error(f"{where}.content", "must not be empty", content, "Leave the message out")
    if role == "system" and content is None:
        content = ""
    text = _text(f"{where}.content", content, TURN_TOKENS if check_tokens else ())
    if role == "user":
        return _Turn(index, role, text)
    schema = message.get("response_format")
    return _Turn(
        index,
        role,
        text,
        tools=_tools(f"{where}.tools", message.get("tools")),
        schema=_json(f"{where}.response_format", schema) if schema else "",
    )


def _results(
    turn: _Turn, answers: Sequence[tuple[str, Message]], check_tokens: bool
) -> list[str | None]:
    """One text or None per call: by id, or by position if no answer has an id (spec 3.2)."""
    ids = [_id(f"{where}.tool_call_id", answer.get("tool_call_id")) for where, answer in answers]
    by_id = any(answer_id is not None for answer_id in ids)
    slots = {call.id: i for i, call in enumerate(turn.calls) if call.id is not None}
    if by_id and len(slots) < len(turn.calls):
        where, rule = f"messages[{turn.index}].tool_calls", "must have ids of their own"
        raise _error(where, rule, [call.id for call in turn.calls], "Results name their call by id")
    results: list[str | None] = [None] * len(turn.calls)
    for position, ((where, answer), answer_id) in enumerate(zip(answers, ids, strict=True)):
        if position >= len(turn.calls):
            rule = (
                f"must not be one more than the {len(turn.calls)} calls of messages[{turn.index}]"
            )
            raise _error(where, rule, f"{len(answers)} results", "Remove it")
        slot = slots.get(answer_id) if by_id else position
        if slot is None or results[slot] is not None:
            rule = f"must name a call of messages[{turn.index}] that has no result yet"
            advice = f"Still open: {', '.join(_open(turn, results))}"
            raise _error(f"{where}.tool_call_id", rule, answer_id, advice)
        refused = TURN_TOKENS if check_tokens else ()
        results[slot] = _text(f"{where}.content", answer.get("content"), refused)
    return results


def _open(turn: _Turn, results: Sequence[str | None]) -> list[str]:
    """The calls without a result."""
    return [call.id or call.name for call, r in zip(turn.calls, results, strict=True) if r is None]


def _read(messages: Sequence[Message], check_tokens: bool, complete: bool) -> list[_Turn]:
    """Checked turns. The last may lack results: all of them, or, unless ``complete``, some."""
    turns, index = [], 0
    while index < len(messages):
        turn, after = _turn(index, messages[index], check_tokens), index + 1
        while turn.calls and after < len(messages) and _role(messages[after]) == "tool":
            after += 1
        answers = [(f"messages[{i}]", messages[i]) for i in range(index + 1, after)]
        results = _results(turn, answers, check_tokens)
        missing = _open(turn, results)
        may_lack = after == len(messages) and not (answers and complete)
        if missing and not may_lack:
            rule = "must be followed by one tool message for each of its calls"
            raise _error(f"messages[{index}]", rule, f"none for {', '.join(missing)}", "Add them")
        turns.append(replace(turn, results=tuple(r for r in results if r is not None)))
        index = after
    return turns


# -- rendering ---------------------------------------------------------------------------------------


def _sections(turn: _Turn, wording: Wording) -> list[str]:
    """The tools section and the format section, as far as there are any."""
    sections = []
    if turn.tools:
        # The released encoder ends this section, unlike the other, in a line break.
        lines = [wording.tools, "<functions>", *turn.tools, "</functions>\n"]
        sections.append("\n".join(lines))
    if turn.schema:
        sections.append(f"{wording.response_format}\n{turn.schema}")
    return sections


def _render_assistant(turn: _Turn, shows: bool) -> str:
    text = turn.reasoning + END_THINK if shows else ""
    text += turn.content
    if turn.calls:
        text += "\n\n" + render_calls([(call.name, call.arguments) for call in turn.calls])
    text += END
    if turn.results:
        results = [f"<result>{result}</result>" for result in turn.results]
        text += "\n".join(["\n\n<function_results>", *results])
        if turn.is_answered:
            text += "\n</function_results>"
    return text


def _render_text(turn: _Turn, wording: Wording) -> str:
    sections = _sections(turn, wording)
    if turn.role == "system":
        return "\n\n".join([turn.content, *sections])
    if turn.role == "developer":
        return USER + "\n\n".join(["", *sections, wording.developer + turn.content])
    return USER + turn.content


def _render(turn: _Turn, wording: Wording, *, shows: bool, leads: bool, opens: bool) -> str:
    """A turn's text. shows: its reasoning; leads: over to the assistant, who then thinks if ``opens``."""
    if turn.role == "assistant":
        text = _render_assistant(turn, shows)
        over = "\n\n" if turn.is_answered else None
    else:
        text = _render_text(turn, wording)
        over = ASSISTANT if turn.asks else None
    if leads and over is not None:
        text += over + (THINK if opens else END_THINK)
    return text


def _with_sections(turns: list[_Turn], tools: tuple[str, ...], schema: str) -> list[_Turn]:
    """Puts what is given for the whole conversation into the system message that begins it."""
    if not (tools or schema):
        return turns
    if not turns or turns[0].role != "system":
        return [_Turn(-1, "system", tools=tools, schema=schema), *turns]
    first = turns[0]
    for name, twice in (
        ("tools", tools and first.tools),
        ("response_schema", schema and first.schema),
    ):
        if twice:
            rule = "must not be given both in messages[0] and for the conversation"
            raise _error(name, rule, "both", "Leave one out")
    first = replace(first, tools=tools or first.tools, schema=schema or first.schema)
    return [first, *turns[1:]]


def _shown(
    turns: Sequence[_Turn], last: int, messages: Sequence[Message], policy: ReasoningPolicy
) -> set[int]:
    """The assistant messages that are rendered with a think block; ``last`` is the last user message."""
    shown = set()
    for turn in turns:
        if turn.role != "assistant":
            continue
        if turn.index > last and not (turn.reasoning or turn.calls):
            where, rule = f"messages[{turn.index}]", "must have reasoning_content or tool_calls"
            raise _error(where, rule, messages[turn.index], "Add it, or pass thinking=False")
        if turn.index > last or (turn.reasoning and policy.keeps(messages, turn.index)):
            shown.add(turn.index)
    return shown


def encode(
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    response_schema: Mapping[str, Any] | None = None,
    thinking: bool = False,
    keep_reasoning: ReasoningPolicy = DROP_EARLIER,
    add_generation_prompt: bool = True,
    add_bos: bool = True,
    check_tokens: bool = True,
    wording: Wording = _WORDING,
) -> str:
    """The text of a conversation, up to where the assistant goes on (spec 3.2).

    Rules beyond OpenAI's: in thinking mode an assistant message after the last user or developer message
    has reasoning or tool calls; system and developer messages may have ``tools`` and ``response_format``
    of their own; results are put in the order of the calls. Only results at the end may be incomplete,
    and only without ``add_generation_prompt``: their list then stays open.

    Args:
      messages: with role, content (text or a list of text parts), and as in OpenAI's API reasoning_content,
        tool_calls and tool_call_id.
      tools: OpenAI-style functions, for the system message at the beginning (an empty one if there is none).
      response_schema: a JSON schema of the reply; goes to the same place.
      thinking: whether the assistant reasons before it replies.
      keep_reasoning: what stays of reasoning before the last user or developer message.
      add_generation_prompt: whether to end in what begins the assistant's message, after a user or
        developer message and after results. After an assistant message there is nothing to add.
      add_bos: whether to begin with the begin token; no, if the tokenizer adds it.
      check_tokens: refuse turn tokens in any message, and all special tokens in the assistant's, where
        ``parse`` would refuse them. Otherwise they are passed on, as the released encoder does.
      wording: the prose around tools and formats.

    Raises:
      ValueError: names the message, the rule, the value and a way out.

    Example:
      >>> encode([{"role": "user", "content": "2+2?"}], thinking=True)
      '<｜begin▁of▁sentence｜><｜User｜>2+2?<｜Assistant｜><think>'
    """
    if not messages:
        raise ValueError("messages must not be empty; got []. Give at least a user message.")
    turns = _read(messages, check_tokens, complete=add_generation_prompt)
    last = max((turn.index for turn in turns if turn.asks), default=-1)
    shown = _shown(turns, last, messages, keep_reasoning) if thinking else set()
    if thinking and keep_reasoning.drops_developer:
        turns = [turn for turn in turns if turn.role != "developer" or turn.index == last]
    schema = _json("response_schema", response_schema) if response_schema else ""
    turns = _with_sections(turns, _tools("tools", tools), schema)
    text = BEGIN if add_bos else ""
    for turn, following in zip(turns, [*turns[1:], None], strict=True):
        text += _render(
            turn,
            wording,
            shows=turn.index in shown,
            leads=following is not None or add_generation_prompt,
            opens=(thinking and turn.index >= last)
            or (following is not None and following.index in shown),
        )
    return text
