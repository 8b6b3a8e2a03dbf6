"""Reading OpenAI-style messages: every rule about their fields, and tool results put to the calls they answer."""

import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jaxmoe.chat._dsml import SPECIAL_TOKENS, TURN_TOKENS, dump_json, is_plain, load_json

Message = Mapping[str, Any]


class Call(NamedTuple):
    id: str | None
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """A checked message; an assistant's holds the tool results that answer it, in the order of its calls."""

    index: int
    role: str
    content: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
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


def error_of(where: str, rule: str, value: Any, advice: str) -> ValueError:
    shown = reprlib.repr(value).replace("\n", " ")
    return ValueError(f"{where} {rule}; got {shown}. {advice}.")


def _text(where: str, value: Any, refused: tuple[str, ...]) -> str:
    """A message's text, from a string or a list of text parts, which are joined with nothing between."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for i, part in enumerate(value):
            text = part.get("text") if isinstance(part, Mapping) else None
            if not isinstance(text, str) or part.get("type") != "text":
                rule = "must be a part of type 'text' with a string"
                raise error_of(f"{where}[{i}]", rule, part, "Only text can be encoded")
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise error_of(where, "must be a string or a list of text parts", value, "Give its text")
    surrogate = re.search("[\ud800-\udfff]", value)
    if surrogate:
        rule = "must be encodable as UTF-8"
        raise error_of(where, rule, surrogate.group(), "Remove the lone surrogate")
    found = next((token for token in refused if token in value), None)
    if found:
        rule = "must not contain a special token, which the model could take for structure"
        raise error_of(where, rule, found, "Remove it, or pass check_tokens=False to keep it")
    return value


def _name(where: str, value: Any, *, empty: bool = False) -> str:
    """A name that can stand between quotes in the markup, which has no escapes."""
    if not isinstance(value, str) or not (value or empty):
        raise error_of(where, "must be a name", value, "Give a non-empty string")
    if any(token in value for token in ('"', *SPECIAL_TOKENS)) or not is_plain(value):
        rule = "must not contain quotes, special tokens or lone surrogates"
        raise error_of(where, rule, value, "Rename it")
    return value


def _id(where: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise error_of(where, "must be a string", value, "Use the id of the call")
    return value


def _list(where: str, value: Any) -> Sequence[Any]:
    if not isinstance(value or (), Sequence) or isinstance(value, str | bytes):
        raise error_of(where, "must be a list", value, "Leave it out if there are none")
    return value or ()


def json_of(where: str, value: Any) -> str:
    try:
        return dump_json(value)
    except (TypeError, ValueError) as error:
        raise error_of(where, f"must be JSON ({error})", value, "Correct it") from None


def tool_lines(where: str, tools: Any) -> tuple[str, ...]:
    """One line for each function."""
    lines = []
    for i, tool in enumerate(_list(where, tools)):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping):
            rule = "must be of type 'function' and hold a function"
            raise error_of(f"{where}[{i}]", rule, tool, "Give its name, description and parameters")
        _name(f"{where}[{i}].function.name", function.get("name"))
        lines.append(json_of(f"{where}[{i}].function", function))
    return tuple(lines)


def _call(where: str, call: Any) -> Call:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise error_of(where, "must have a function with name and arguments", call, "Add it")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = load_json(arguments)
        except ValueError as error:
            rule = f"must be JSON ({error})"
            raise error_of(f"{where}.function.arguments", rule, arguments, "Correct it") from None
    if not isinstance(arguments, dict):
        rule = "must be a JSON object, as text"
        raise error_of(
            f"{where}.function.arguments", rule, arguments, "Without arguments pass '{}'"
        )
    for key in arguments:
        _name(f"{where}: the name of an argument", key, empty=True)
    name = _name(f"{where}.function.name", function.get("name"))
    return Call(_id(f"{where}.id", call.get("id")), name, arguments)


def _assistant(index: int, message: Message, check_tokens: bool) -> Turn:
    where, refused = f"messages[{index}]", SPECIAL_TOKENS if check_tokens else ()
    calls = _list(f"{where}.tool_calls", message.get("tool_calls"))

    def text(field: str) -> str:
        value = message.get(field)
        return "" if value is None else _text(f"{where}.{field}", value, refused)

    return Turn(
        index,
        "assistant",
        content=text("content"),
        reasoning=text("reasoning_content"),
        calls=tuple(_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls)),
    )


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None


def _turn(index: int, message: Message, check_tokens: bool) -> Turn:
    where, role = f"messages[{index}]", _role(message)
    if role == "assistant":
        return _assistant(index, message, check_tokens)
    if role == "tool":
        rule = "must follow an assistant message with tool calls"
        raise error_of(where, rule, "a tool message that follows none", "Add the calls it answers")
    if role not in ("system", "user", "developer"):
        rule = "must have the role system, developer, user, assistant or tool"
        raise error_of(where, rule, role if isinstance(message, Mapping) else message, "Correct it")
    content = message.get("content")
    if role == "developer" and not content:
        raise error_of(f"{where}.content", "must not be empty", content, "Leave the message out")
    if role == "system" and content is None:
        content = ""
    text = _text(f"{where}.content", content, TURN_TOKENS if check_tokens else ())
    if role == "user":
        return Turn(index, role, text)
    schema = message.get("response_format")
    return Turn(
        index,
        role,
        text,
        tools=tool_lines(f"{where}.tools", message.get("tools")),
        schema=json_of(f"{where}.response_format", schema) if schema else "",
    )


def _results(
    turn: Turn, answers: Sequence[tuple[str, Message]], check_tokens: bool
) -> list[str | None]:
    """One text or None per call: by id, or by position if no answer has an id (spec 3.2)."""
    ids = [_id(f"{where}.tool_call_id", answer.get("tool_call_id")) for where, answer in answers]
    by_id = any(answer_id is not None for answer_id in ids)
    slots = {call.id: i for i, call in enumerate(turn.calls) if call.id is not None}
    if by_id and len(slots) < len(turn.calls):
        where, rule = f"messages[{turn.index}].tool_calls", "must have ids of their own"
        raise error_of(
            where, rule, [call.id for call in turn.calls], "Results name their call by id"
        )
    results: list[str | None] = [None] * len(turn.calls)
    for position, ((where, answer), answer_id) in enumerate(zip(answers, ids, strict=True)):
        if position >= len(turn.calls):
            rule = (
                f"must not be one more than the {len(turn.calls)} calls of messages[{turn.index}]"
            )
            raise error_of(where, rule, f"{len(answers)} results", "Remove it")
        slot = slots.get(answer_id) if by_id else position
        if slot is None or results[slot] is not None:
            rule = f"must name a call of messages[{turn.index}] that has no result yet"
            advice = f"Still open: {', '.join(_open(turn, results))}"
            raise error_of(f"{where}.tool_call_id", rule, answer_id, advice)
        refused = TURN_TOKENS if check_tokens else ()
        results[slot] = _text(f"{where}.content", answer.get("content"), refused)
    return results


def _open(turn: Turn, results: Sequence[str | None]) -> list[str]:
    """The calls without a result."""
    return [call.id or call.name for call, r in zip(turn.calls, results, strict=True) if r is None]


def read(messages: Sequence[Message], check_tokens: bool, complete: bool) -> list[Turn]:
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
            raise error_of(f"messages[{index}]", rule, f"none for {', '.join(missing)}", "Add them")
        turns.append(replace(turn, results=tuple(r for r in results if r is not None)))
        index = after
    return turns
