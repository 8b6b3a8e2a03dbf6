"""Messages to the text that a V3.2 model reads."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jaxmoe.chat._dsml import (
    ASSISTANT,
    BEGIN,
    CALLS,
    DSML,
    END,
    END_CALLS,
    END_THINK,
    THINK,
    USER,
    render_calls,
)
from jaxmoe.chat._messages import Message, Turn, error_of, json_of, read, tool_lines

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

# -- rendering ---------------------------------------------------------------------------------------


def _sections(turn: Turn, wording: Wording) -> list[str]:
    """The tools section and the format section, as far as there are any."""
    sections = []
    if turn.tools:
        # The released encoder ends this section, unlike the other, in a line break.
        lines = [wording.tools, "<functions>", *turn.tools, "</functions>\n"]
        sections.append("\n".join(lines))
    if turn.schema:
        sections.append(f"{wording.response_format}\n{turn.schema}")
    return sections


class Piece(NamedTuple):
    """A part of a conversation's text, and whether the assistant says it."""

    text: str
    said: bool


def _render_assistant(turn: Turn, shows: bool) -> Iterator[Piece]:
    text = turn.reasoning + END_THINK if shows else ""
    text += turn.content
    if turn.calls:
        text += "\n\n" + render_calls([(call.name, call.arguments) for call in turn.calls])
    yield Piece(text + END, True)
    if turn.results:
        results = [f"<result>{result}</result>" for result in turn.results]
        text = "\n".join(["\n\n<function_results>", *results])
        if turn.is_answered:
            text += "\n</function_results>"
        yield Piece(text, False)


def _render_text(turn: Turn, wording: Wording) -> str:
    sections = _sections(turn, wording)
    if turn.role == "system":
        return "\n\n".join([turn.content, *sections])
    if turn.role == "developer":
        return USER + "\n\n".join(["", *sections, wording.developer + turn.content])
    return USER + turn.content


def _render(
    turn: Turn, wording: Wording, *, shows: bool, leads: bool, opens: bool
) -> Iterator[Piece]:
    """A turn's text. shows: its reasoning; leads: over to the assistant, who then thinks if ``opens``."""
    if turn.role == "assistant":
        yield from _render_assistant(turn, shows)
        over = "\n\n" if turn.is_answered else None
    else:
        yield Piece(_render_text(turn, wording), False)
        over = ASSISTANT if turn.asks else None
    if leads and over is not None:
        yield Piece(over + (THINK if opens else END_THINK), False)


def _with_sections(turns: list[Turn], tools: tuple[str, ...], schema: str) -> list[Turn]:
    """Puts what is given for the whole conversation into the system message that begins it."""
    if not (tools or schema):
        return turns
    if not turns or turns[0].role != "system":
        return [Turn(-1, "system", tools=tools, schema=schema), *turns]
    first = turns[0]
    for name, twice in (
        ("tools", tools and first.tools),
        ("response_schema", schema and first.schema),
    ):
        if twice:
            rule = "must not be given both in messages[0] and for the conversation"
            raise error_of(name, rule, "both", "Leave one out")
    first = replace(first, tools=tools or first.tools, schema=schema or first.schema)
    return [first, *turns[1:]]


def _shown(
    turns: Sequence[Turn], last: int, messages: Sequence[Message], policy: ReasoningPolicy
) -> set[int]:
    """The assistant messages that are rendered with a think block; ``last`` is the last user message."""
    shown = set()
    for turn in turns:
        if turn.role != "assistant":
            continue
        if turn.index > last and not (turn.reasoning or turn.calls):
            where, rule = f"messages[{turn.index}]", "must have reasoning_content or tool_calls"
            raise error_of(where, rule, messages[turn.index], "Add it, or pass thinking=False")
        if turn.index > last or (turn.reasoning and policy.keeps(messages, turn.index)):
            shown.add(turn.index)
    return shown


def _render_all(
    turns: Sequence[Turn], shown: set[int], wording: Wording, *, leads: bool, opens_from: int | None
) -> Iterator[Piece]:
    """All turns' text. leads: over to the assistant at the end, too; opens_from: the turn that begins the present reasoning."""
    for turn, following in zip(turns, [*turns[1:], None], strict=True):
        yield from _render(
            turn,
            wording,
            shows=turn.index in shown,
            leads=following is not None or leads,
            opens=(opens_from is not None and turn.index >= opens_from)
            or (following is not None and following.index in shown),
        )


def encode_pieces(
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
) -> list[Piece]:
    """``encode`` in pieces that join to its text: what the assistant says, and what it reads.

    It says its reasoning and the token that ends it, its content, its calls and the end of its turn: what a model is
    trained on. What leads over to it, "<think>" or, where it does not think, "</think>" included, is given.

    Args:
      messages, tools, response_schema, thinking, keep_reasoning, add_generation_prompt, add_bos, check_tokens, wording:
        as of ``encode``, as are errors.

    Example:
      >>> encode_pieces([{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}])[-1]
      Piece(text='4<｜end▁of▁sentence｜>', said=True)
    """
    if not messages:
        raise ValueError("messages must not be empty; got []. Give at least a user message.")
    turns = read(messages, check_tokens, complete=add_generation_prompt)
    last = max((turn.index for turn in turns if turn.asks), default=-1)
    shown = _shown(turns, last, messages, keep_reasoning) if thinking else set()
    if thinking and keep_reasoning.drops_developer:
        turns = [turn for turn in turns if turn.role != "developer" or turn.index == last]
    schema = json_of("response_schema", response_schema) if response_schema else ""
    turns = _with_sections(turns, tool_lines("tools", tools), schema)
    opens_from = last if thinking else None
    pieces = _render_all(turns, shown, wording, leads=add_generation_prompt, opens_from=opens_from)
    return [*([Piece(BEGIN, False)] if add_bos else []), *pieces]


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
    pieces = encode_pieces(
        messages,
        tools=tools,
        response_schema=response_schema,
        thinking=thinking,
        keep_reasoning=keep_reasoning,
        add_generation_prompt=add_generation_prompt,
        add_bos=add_bos,
        check_tokens=check_tokens,
        wording=wording,
    )
    return "".join(piece.text for piece in pieces)
