"""The V3.2 decoder of assistant messages: one incremental parser, so that a stream and a whole text cannot disagree."""

import functools
import json
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from jaxmoe.chat._dsml import (
    BLOCK,
    END,
    END_CALLS,
    END_INVOKE,
    END_PARAMETER,
    END_THINK,
    INVOKE,
    JSON,
    PARAMETER,
    SPECIAL_TOKENS,
    STRING,
    load_json,
)


class ChatFormatError(ValueError):
    """Text of a model breaks the message format.

    Attributes:
      position: characters before the fault.
      rule: what the format asks for there.
    """

    def __init__(self, position: int, rule: str):
        super().__init__(
            f"text breaks the message format at character {position}: {rule}; "
            "parse with tolerant=True to get it as content."
        )
        self.position, self.rule = position, rule

    def __reduce__(self):
        return type(self), (self.position, self.rule)


@dataclass(frozen=True)
class ToolCall:
    """A function's name and the JSON object of its arguments, as text."""

    name: str
    arguments_json: str

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments with their types: strings as they were written, everything else from JSON."""
        return load_json(self.arguments_json)


@dataclass(frozen=True)
class ParsedMessage:
    """What an assistant message says; ``error`` is the first fault that a tolerant parser passed over."""

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    error: str | None = None

    def to_message(self, call_ids: Sequence[str] | None = None) -> dict[str, Any]:
        """The OpenAI-style message that ``encode`` takes; ids are call_0, call_1, ... if not given."""
        if call_ids is None:
            call_ids = [f"call_{i}" for i in range(len(self.tool_calls))]
        if len(call_ids) != len(self.tool_calls):
            raise ValueError(
                f"call_ids must be one per tool call ({len(self.tool_calls)}); got {len(call_ids)}."
            )
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call_id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments_json},
                }
                for call_id, call in zip(call_ids, self.tool_calls, strict=True)
            ]
        return message


@dataclass(frozen=True)
class Delta:
    """A piece of a message under way.

    Attributes:
      kind: what ``text`` is: a piece of the reasoning or content, the name of a call that begins, or a
        piece of its arguments as JSON (all pieces of a call together are its ``arguments_json``).
      index: which call, for "call" and "arguments".
    """

    kind: Literal["reasoning", "content", "call", "arguments"]
    text: str
    index: int = 0


@functools.cache
def _pattern(markers: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, markers)))


@functools.cache
def _beginnings(markers: tuple[str, ...]) -> frozenset[str]:
    return frozenset(marker[:end] for marker in markers for end in range(1, len(marker)))


def _undecided(text: str, markers: tuple[str, ...]) -> int:
    """Where the longest end of ``text`` begins that may grow into a marker; its length if none does."""
    beginnings = _beginnings(markers)
    first = max(0, len(text) - max(map(len, markers)) + 1)
    return next((i for i in range(first, len(text)) if text[i:] in beginnings), len(text))


class StreamParser:
    """Parses an assistant message that arrives in pieces; the same result for every split.

    Text is given out as soon as it cannot be part of a marker. Feed pieces, then ``flush``; ``finish``
    gives the whole message.

    A strict parser raises ``ChatFormatError`` at the first fault. A tolerant one never raises: it notes
    the first fault in ``ParsedMessage.error``, takes special tokens in text for text, drops what follows
    the end token, and gives a malformed call out as content, verbatim, with all that follows it (and
    with the block's opening, if no call before it was complete). Complete calls stay calls.

    Args:
      thinking: the prompt ended in ``<think>``: reasoning comes first.
      tolerant: see above.
      require_end: whether the text must end in the end token. An engine that stops at that token and
        does not hand it out passes False.
      whole_calls: give a call out only when it is complete. Otherwise a call that turns out malformed
        has already been announced, cannot be taken back, and is missing from ``finish().tool_calls``.
      enforced: the writer was held to the format. Then JSON, too, is given out before it is complete; and an
        end tag within a JSON string, which the released decoder would stumble over, is part of the string.

    Attributes:
      unfinished: whether a call has been announced and is not complete, and may never be.

    Example:
      >>> parser = StreamParser(thinking=True, require_end=False)
      >>> parser.feed("add them</thi"), parser.feed("nk>4"), parser.flush()
      ([Delta(kind='reasoning', text='add them', index=0)], [Delta(kind='content', text='4', index=0)], [])
    """

    def __init__(
        self,
        thinking: bool,
        *,
        tolerant: bool = False,
        require_end: bool = True,
        whole_calls: bool = False,
        enforced: bool = False,
    ):
        self.unfinished = False
        self._thinking, self._tolerant, self._enforced = thinking, tolerant, enforced
        self._require_end, self._whole_calls = require_end, whole_calls
        self._pieces: list[str] = []  # All of the text, for the way back from a malformed call.
        self._buffer, self._position = "", 0  # What is not consumed yet, and where that begins.
        self._safe = 0  # Where a malformed call's text would begin.
        self._ended = False
        self._failure: ChatFormatError | None = None
        self._deltas: list[Delta] = []
        self._text: dict[str, list[str]] = {"reasoning": [], "content": []}
        self._calls: list[ToolCall] = []
        self._error: str | None = None
        self._steps = self._message()

    def feed(self, piece: str) -> list[Delta]:
        """What ``piece`` adds."""
        if self._ended:
            raise ValueError("feed must come before flush and finish; start a new StreamParser.")
        self._pieces.append(piece)
        self._buffer += piece
        return self._advance()

    def flush(self) -> list[Delta]:
        """What the end of the text adds: characters that could have begun a marker."""
        self._ended = True
        return self._advance()

    def finish(self) -> ParsedMessage:
        """The whole message; flushes first."""
        self.flush()
        reasoning, content = ("".join(self._text[kind]) for kind in ("reasoning", "content"))
        return ParsedMessage(reasoning, content, tuple(self._calls), self._error)

    def _advance(self) -> list[Delta]:
        if self._failure is not None:
            raise self._failure
        try:
            next(self._steps, None)
        except ChatFormatError as error:
            self._failure = error
            raise
        deltas, self._deltas = self._deltas, []
        return deltas

    # Below: the grammar as generators, which yield wherever they need more text to decide.

    def _message(self) -> Generator[None, None, None]:
        if self._thinking:
            end = yield from self._until_marker("reasoning", (END_THINK, END))
            if end != END_THINK:
                self._fault(f"reasoning must end in {END_THINK!r}")
                if end:
                    yield from self._after_end()
                return
        end = yield from self._until_marker("content", (END, BLOCK))
        if end == BLOCK:
            self._safe = self._position - len(BLOCK)
            try:
                yield from self._block()
                return
            except ChatFormatError as error:
                if not self._tolerant:
                    raise
                self._note(error)
            self._buffer, self._position = "".join(self._pieces)[self._safe :], self._safe
            end = yield from self._until_marker("content", (END,), refused=())
        if end is None and self._require_end:
            self._fault(f"a message must end in {END!r}")
        elif end:
            yield from self._after_end()

    def _block(self) -> Generator[None, None, None]:
        yield from self._literal(">\n")
        first = True
        while (yield from self._literal(*([INVOKE] if first else [INVOKE, END_CALLS]))) == INVOKE:
            yield from self._call()
            self._safe, first = self._position, False
        self._safe = self._position
        while not self._buffer and not self._ended:
            yield
        if self._buffer or self._require_end:
            yield from self._literal(END)
            yield from self._after_end()

    def _call(self) -> Generator[None, None, None]:
        name = yield from self._until('"')
        if not name:
            raise ChatFormatError(self._position - 1, "a function must have a name")
        yield from self._literal(">\n")
        self.unfinished = True
        self._emit_call("call", name)
        keys: set[str] = set()
        pieces: list[str] = []

        def write(text: str) -> None:
            pieces.append(text)
            self._emit_call("arguments", text)

        while True:
            empty_line = () if keys else ("\n",)
            tag = yield from self._literal(PARAMETER, END_INVOKE, *empty_line)
            if tag != PARAMETER:
                break
            yield from self._argument(keys, write)
        if tag == "\n":
            yield from self._literal(END_INVOKE)
        write("}" if keys else "{}")
        if self._whole_calls:
            index = len(self._calls)
            self._emit(Delta("call", name, index))
            self._emit(Delta("arguments", "".join(pieces), index))
        self._calls.append(ToolCall(name, "".join(pieces)))
        self.unfinished = False

    def _argument(
        self, keys: set[str], write: Callable[[str], None]
    ) -> Generator[None, None, None]:
        start = self._position
        key = yield from self._until('"')
        if key in keys:
            raise ChatFormatError(start, f"argument {key!r} must not be given twice")
        write(f"{', ' if keys else '{'}{json.dumps(key, ensure_ascii=False)}: ")
        keys.add(key)
        if (yield from self._literal(STRING[1:], JSON[1:])) == STRING[1:]:
            write('"')
            # Escapes are per character, so that pieces of a string can be escaped one by one.
            yield from self._until(
                END_PARAMETER, lambda text: write(json.dumps(text, ensure_ascii=False)[1:-1])
            )
            write('"')
        elif self._enforced:
            yield from self._enforced_json(write)
        else:
            start = self._position
            value = yield from self._until(END_PARAMETER)
            try:
                load_json(value)
            except ValueError as error:
                # From None: the rule says it all, and a chain would keep the text alive.
                rule = f'argument {key!r} has string="false" and must be JSON ({error})'
                raise ChatFormatError(start, rule) from None
            write(value)
        yield from self._literal("\n")

    def _enforced_json(self, write: Callable[[str], None]) -> Generator[None, None, None]:
        """A value that is JSON for certain, up to and with the end tag behind it."""
        value = ""

        def sink(text: str) -> None:
            nonlocal value
            value += text
            write(text)

        while True:
            yield from self._until(END_PARAMETER, sink)
            try:
                load_json(value)
                return
            except ValueError:  # The tag stands in a string.
                sink(END_PARAMETER)

    def _after_end(self) -> Generator[None, None, None]:
        while True:
            if self._buffer:
                self._fault(f"no text may follow {END!r}")
                self._take(len(self._buffer))
            if self._ended:
                return
            yield

    def _until_marker(
        self,
        kind: Literal["reasoning", "content"],
        ends: tuple[str, ...],
        refused: tuple[str, ...] = SPECIAL_TOKENS,
    ) -> Generator[None, None, str | None]:
        """Gives text out up to one of ``ends``, which it returns, or up to the end of the text: None."""
        markers = ends + tuple(token for token in refused if token not in ends)
        while True:
            match = _pattern(markers).search(self._buffer)
            sure = len(self._buffer) if self._ended else _undecided(self._buffer, markers)
            if match is None or match.start() >= sure:
                # A marker at or past `sure` may yet turn out to be the inside of a longer one.
                self._emit_text(kind, self._take(sure))
                if self._ended and not self._buffer:
                    return None
                yield
                continue
            self._emit_text(kind, self._take(match.start()))
            if match.group() in ends:
                return self._take(len(match.group()))
            self._fault(f"{kind} must not contain {match.group()!r}")
            self._emit_text(kind, self._take(len(match.group())))

    def _until(
        self, end: str, sink: Callable[[str], None] | None = None
    ) -> Generator[None, None, str]:
        """Consumes up to and with ``end``. Passes what is before it to ``sink`` as it comes, or returns it."""
        pieces: list[str] = []
        sink = sink or pieces.append
        start = self._position
        while end not in self._buffer:
            sink(self._take(_undecided(self._buffer, (end,))))
            if self._ended:
                raise ChatFormatError(start, f"{end!r} must follow and is missing")
            yield
        sink(self._take(self._buffer.index(end)))
        self._take(len(end))
        return "".join(pieces)

    def _literal(self, *options: str) -> Generator[None, None, str]:
        """Consumes one of ``options``, none of which begins another."""
        while True:
            for option in options:
                if self._buffer.startswith(option):
                    return self._take(len(option))
            possible = any(option.startswith(self._buffer) for option in options)
            if self._ended or not possible:
                wanted = " or ".join(map(repr, options))
                raise ChatFormatError(self._position, f"{wanted} must follow")
            yield

    def _take(self, count: int) -> str:
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        self._position += count
        return taken

    def _fault(self, rule: str) -> None:
        error = ChatFormatError(self._position, rule)
        if not self._tolerant:
            raise error
        self._note(error)

    def _note(self, error: ChatFormatError) -> None:
        self._error = self._error or f"at character {error.position}: {error.rule}"

    def _emit_text(self, kind: Literal["reasoning", "content"], text: str) -> None:
        if text:
            self._text[kind].append(text)
            self._emit(Delta(kind, text))

    def _emit_call(self, kind: Literal["call", "arguments"], text: str) -> None:
        if text and not self._whole_calls:
            self._emit(Delta(kind, text, len(self._calls)))

    def _emit(self, delta: Delta) -> None:
        last = self._deltas[-1] if self._deltas else None
        if last and delta.kind != "call" and (last.kind, last.index) == (delta.kind, delta.index):
            self._deltas[-1] = replace(last, text=last.text + delta.text)
        else:
            self._deltas.append(delta)


def parse(
    text: str, *, thinking: bool, tolerant: bool = False, require_end: bool = True
) -> ParsedMessage:
    """The message that a model wrote, end token included; ``StreamParser`` explains the arguments.

    Raises:
      ChatFormatError: for a missing ``</think>``, a malformed call or argument, an argument given twice,
        text after the call block, a special token in reasoning or content, a missing end token (spec 3.2).

    Example:
      >>> parse("add them</think>4<｜end▁of▁sentence｜>", thinking=True)
      ParsedMessage(reasoning='add them', content='4', tool_calls=(), error=None)
    """
    parser = StreamParser(thinking, tolerant=tolerant, require_end=require_end)
    for start in range(0, len(text), 4096):  # The buffer is copied at every marker: keep it short.
        parser.feed(text[start : start + 4096])
    return parser.finish()
