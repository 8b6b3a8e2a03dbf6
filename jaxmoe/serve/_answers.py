"""What the engine says, in the words of OpenAI's API: events of a stream, or one body."""

import dataclasses
import json
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import jaxmoe
from jaxmoe import chat
from jaxmoe.chat._dsml import render_calls
from jaxmoe.engine import Chunk, Result, TokenLogprobs
from jaxmoe.serve._body import ApiError
from jaxmoe.serve.protocol import Job, ModelInfo
from jaxmoe.tokenizer import ByteTokenizer

_LEAST_LOGPROB = -9999.0  # OpenAI's way to write minus infinity, which JSON cannot


def dump(value: Any) -> bytes:
    """JSON on one line."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode(errors="replace")


def failure(chunk: Chunk) -> ApiError | None:
    """The error that a last chunk reports."""
    if chunk.finish_reason == "error":
        return ApiError(500, "The engine failed at this request.", code="engine_error")
    if chunk.finish_reason == "cancelled":
        return ApiError(503, "The server ended this request, as it is shutting down.", code="ended")
    return None


# -- tokens ------------------------------------------------------------------------------------------


def _token(token: int, info: ModelInfo) -> tuple[str, list[int] | None]:
    """A token's text and bytes. Bytes that are no text by themselves are spelled out, as OpenAI does."""
    if isinstance(info.tokenizer, ByteTokenizer):
        if token >= 256:
            return f"<{token}>", None
        if token >= 128:
            return f"bytes:\\x{token:02x}", [token]
        return chr(token), [token]
    text = info.tokenizer.decode([token])
    if "\ufffd" in text or not text:
        return f"<{token}>", None
    return text, list(text.encode())


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST_LOGPROB


def _chat_logprobs(entries: Sequence[TokenLogprobs], info: ModelInfo) -> dict[str, Any]:
    def one(token: int, logprob: float) -> dict[str, Any]:
        text, data = _token(token, info)
        return {"token": text, "logprob": _finite(logprob), "bytes": data}

    content = [
        one(entry.token, entry.logprob) | {"top_logprobs": [one(*pair) for pair in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _completion_logprobs(
    entries: Sequence[TokenLogprobs], info: ModelInfo, offset: int
) -> tuple[dict[str, Any], int]:
    """The older form; and where the next token's text begins."""
    tokens, offsets = [], []
    for entry in entries:
        text, data = _token(entry.token, info)
        tokens.append(text)
        offsets.append(offset)
        offset += 0 if data is None else len(bytes(data).decode(errors="replace"))
    report = {
        "tokens": tokens,
        "token_logprobs": [_finite(entry.logprob) for entry in entries],
        "top_logprobs": [
            {_token(token, info)[0]: _finite(logprob) for token, logprob in entry.top}
            for entry in entries
        ],
        "text_offset": offsets,
    }
    return report, offset


# -- answers -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Call:
    """A call under way; together its pieces are the arguments."""

    id: str
    name: str
    pieces: list[str] = dataclasses.field(default_factory=list)

    def whole(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": "".join(self.pieces)}
        return {"id": self.id, "type": "function", "function": function}


@dataclasses.dataclass
class _ChatChoice:
    """One choice under way. Without ``tools`` calls are content, and the parser gives them out whole."""

    parser: chat.StreamParser
    tools: bool
    parallel: bool
    calls: list[_Call] = dataclasses.field(default_factory=list)
    text: dict[str, list[str]] = dataclasses.field(
        default_factory=lambda: {"content": [], "reasoning_content": []}
    )
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None

    def feed(self, chunk: Chunk) -> list[dict[str, Any]]:
        """The deltas that a chunk adds."""
        found = self.parser.feed(chunk.text)
        self.finish_reason = chunk.finish_reason
        stopped = chunk.finish_reason == "stop"
        # A call that a limit has cut off is not malformed: its text is no content.
        if stopped or (chunk.finish_reason is not None and not self.parser.unfinished):
            found += self.parser.flush()
        deltas = [delta for piece in found for delta in self._delta(piece)]
        if stopped and self.tools and self.calls and not self._is_broken():
            self.finish_reason = "tool_calls"
        return deltas

    def shown_calls(self) -> list[_Call]:
        """For an answer in one piece, once all has come; a malformed call's text is in the content."""
        calls = self.calls if self.parallel else self.calls[:1]
        malformed = self.finish_reason == "stop" and self._is_broken()
        return calls[:-1] if malformed else calls

    def _is_broken(self) -> bool:
        """Whether the last call that is given out is not complete."""
        return self.parser.unfinished and (self.parallel or len(self.calls) == 1)

    def _delta(self, piece: chat.Delta) -> list[dict[str, Any]]:
        if piece.kind not in ("call", "arguments"):
            field = "content" if piece.kind == "content" else "reasoning_content"
            return [{field: piece.text}]
        if piece.kind == "call":
            self.calls.append(_Call(f"call_{uuid.uuid4().hex[:24]}", piece.text))
            delta = self.calls[-1].whole()
        else:
            self.calls[piece.index].pieces.append(piece.text)
            delta = {"function": {"arguments": piece.text}}
        if not self.tools:
            return self._as_content(self.calls[piece.index])
        if piece.index and not self.parallel:
            return []
        return [{"tool_calls": [{"index": piece.index} | delta]}]

    @staticmethod
    def _as_content(call: _Call) -> list[dict[str, Any]]:
        if not call.pieces:
            return []
        arguments = chat.ToolCall(call.name, call.pieces[0]).arguments
        return [{"content": "\n\n" + render_calls([(call.name, arguments)])}]


class Answer:
    """An answer under way. ``add`` every chunk and send the events it returns, or take ``whole`` at the end.

    Args:
      job: what was asked.
      info: of the model.
      name: the answer's id.
    """

    object = ""
    event_object = ""

    def __init__(self, job: Job, info: ModelInfo, name: str):
        self._job, self._info = job, info
        self._head = {
            "id": name,
            "object": self.object,
            "created": int(time.time()),
            "model": info.name,
            "system_fingerprint": f"jaxmoe-{jaxmoe.__version__}",
        }

    def opening(self) -> list[dict[str, Any]]:
        """Events before the first chunk."""
        return []

    def add(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:
        """Takes a chunk of a choice; its events."""
        raise NotImplementedError

    def closing(self, results: Sequence[Result]) -> list[dict[str, Any]]:
        """Events after the last chunk."""
        if not self._job.include_usage:
            return []
        return [self._event([]) | {"usage": self.usage(results)}]

    def whole(self, results: Sequence[Result]) -> dict[str, Any]:
        """The body that says all."""
        choices = [self._choice(index) for index in range(len(self._job.choices))]
        return self._head | {"choices": choices, "usage": self.usage(results)}

    def usage(self, results: Sequence[Result]) -> dict[str, Any]:
        """Tokens; a prompt counts once, however many choices it has."""
        firsts = results[:: self._job.n]
        prompt = sum(result.prompt_tokens for result in firsts)
        completion = sum(len(result.token_ids) for result in results)
        # A policy may have given prompts of one call different widths: then the sum has none.
        widths = {result.width for result in results} if self._info.widths else set()
        width = {"width": widths.pop()} if len(widths) == 1 else {}
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {
                "cached_tokens": sum(result.cached_tokens for result in firsts)
            },
            **width,
        }

    def _choice(self, index: int) -> dict[str, Any]:
        raise NotImplementedError

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        event = self._head | {"object": self.event_object, "choices": choices}
        return event | {"usage": None} if self._job.include_usage else event


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    object = "chat.completion"
    event_object = "chat.completion.chunk"

    def __init__(self, job: Job, info: ModelInfo, name: str):
        super().__init__(job, info, name)
        self._choices = [self._new_choice() for _ in job.choices]

    def _new_choice(self) -> _ChatChoice:
        parser = chat.StreamParser(
            self._job.thinking,
            tolerant=True,
            require_end=False,
            whole_calls=not self._job.tools,
            enforced=self._job.enforced,
        )
        return _ChatChoice(parser, self._job.tools, self._job.parallel_calls)

    def opening(self) -> list[dict[str, Any]]:
        """The roles."""
        delta = {"role": "assistant", "content": ""}
        return [self._delta(i, dict(delta)) for i in range(len(self._choices))]

    def add(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:
        """Takes a chunk of a choice; its events."""
        choice = self._choices[index]
        deltas = choice.feed(chunk)
        logprobs = _chat_logprobs(chunk.logprobs, self._info) if chunk.logprobs else None
        if not self._job.stream:
            for delta in deltas:
                for field in choice.text:
                    choice.text[field].append(delta.get(field, ""))
            choice.logprobs += chunk.logprobs
            return []
        if logprobs and not deltas:
            deltas = [{}]  # Text may lag behind its tokens.
        events = []
        for delta in deltas:
            events.append(self._delta(index, delta, logprobs))
            logprobs = None
        if choice.finish_reason is not None:
            events.append(self._delta(index, {}, finish_reason=choice.finish_reason))
        return events

    def _delta(
        self,
        index: int,
        delta: Mapping[str, Any],
        logprobs: Mapping[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return self._event([choice])

    def _choice(self, index: int) -> dict[str, Any]:
        choice = self._choices[index]
        content, reasoning = ("".join(pieces) for pieces in choice.text.values())
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._job.thinking:
            message["reasoning_content"] = reasoning
        calls = choice.shown_calls() if self._job.tools else []
        if calls:
            message |= {"content": content or None, "tool_calls": [call.whole() for call in calls]}
        logprobs = None
        if self._job.choices[index].sampling.logprobs is not None:
            logprobs = _chat_logprobs(choice.logprobs, self._info)
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }


class CompletionAnswer(Answer):
    """Of /v1/completions."""

    object = event_object = "text_completion"

    def __init__(self, job: Job, info: ModelInfo, name: str):
        super().__init__(job, info, name)
        self._chunks: list[list[Chunk]] = [[] for _ in job.choices]
        self._offsets = [0] * len(job.choices)

    def opening(self) -> list[dict[str, Any]]:
        """The prompts, if they are to be repeated."""
        choices = enumerate(self._job.choices)
        return [self._event([self._part(i, c.echo, ())]) for i, c in choices if c.echo]

    def add(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:
        """Takes a chunk of a choice; its events."""
        if not self._job.stream:
            self._chunks[index].append(chunk)
            return []
        if not (chunk.text or chunk.logprobs or chunk.finish_reason):
            return []
        part = self._part(index, chunk.text, chunk.logprobs, chunk.finish_reason)
        return [self._event([part])]

    def _part(
        self,
        index: int,
        text: str,
        logprobs: Sequence[TokenLogprobs],
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        report = None
        if logprobs:
            offset = self._offsets[index]
            report, self._offsets[index] = _completion_logprobs(logprobs, self._info, offset)
        return {"index": index, "text": text, "logprobs": report, "finish_reason": finish_reason}

    def _choice(self, index: int) -> dict[str, Any]:
        chunks = self._chunks[index]
        text = self._job.choices[index].echo + "".join(chunk.text for chunk in chunks)
        logprobs = [entry for chunk in chunks for entry in chunk.logprobs]
        return self._part(index, text, logprobs, chunks[-1].finish_reason)
