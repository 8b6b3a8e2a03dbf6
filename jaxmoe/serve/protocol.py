"""OpenAI request bodies to prompts and ``SamplingParams``. Pure: no HTTP, no engine.

Unknown fields are ignored, as OpenAI does, except those that ask for something this server would silently not do.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmoe import chat
from jaxmoe.engine import SamplingParams
from jaxmoe.serve._body import ApiError, bad, boolean, integer, items, mapping, number, unsupported
from jaxmoe.serve._forms import answer_form, response_schema
from jaxmoe.serve._tools import read_tools
from jaxmoe.tokenizer import ByteTokenizer, FileTokenizer

MAX_CHOICES = 128  # of one HTTP request: prompts times n
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
MAX_PRIORITY = 1000
MAX_TIMEOUT_S = 24 * 3600.0
MAX_TOP_LOGPROBS = 20
MAX_MESSAGES = 16384
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions

_BEGIN, _END = chat.SPECIAL_TOKENS[:2]


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What the rules need to know about the model that is served.

    Attributes:
      name: that clients give as ``model``.
      tokenizer: of the engine.
      vocab_size: token ids lie below it.
      max_length: tokens that a request may have, prompt included.
      widths: SEFP widths that requests may ask for, narrowest first; none if the weights aren't in SEFP.
    """

    name: str
    tokenizer: ByteTokenizer | FileTokenizer
    vocab_size: int
    max_length: int
    widths: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Choice:
    """One request to the engine.

    Attributes:
      prompt: token ids.
      sampling: how to go on.
      echo: text to give out before it.
    """

    prompt: Sequence[int]
    sampling: SamplingParams
    echo: str = ""


@dataclasses.dataclass(frozen=True)
class Job:
    """One HTTP request: its choices in order, ``n`` for every prompt.

    Attributes:
      choices: requests to the engine.
      n: how many for each prompt.
      stream: whether to answer in events.
      include_usage: whether the last event says how many tokens there were.
      priority: for the engine.
      timeout_s: for the engine.
      thinking: whether the prompt ended in the beginning of reasoning.
      tools: whether calls in the output are calls; otherwise they are text.
      enforced: whether the output is held to a form, and so calls are well-formed for certain.
      parallel_calls: whether there may be more than one.
    """

    choices: tuple[Choice, ...]
    n: int
    stream: bool
    include_usage: bool
    priority: int
    timeout_s: float | None
    thinking: bool = False
    tools: bool = False
    enforced: bool = False
    parallel_calls: bool = True


# -- what would be served wrong ----------------------------------------------------------------------

# Field -> (values that change nothing, what to do instead).
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "functions": (([],), "Use tools"),
    "function_call": (("none", "auto"), "Use tool_choice"),
    "audio": ((), "Only text is served"),
    "modalities": ((["text"],), "Only text is served"),
    "web_search_options": ((), "Leave it out"),
    "store": ((False,), "Nothing is stored; leave it out"),
    "reasoning_effort": ((), 'Use chat_template_kwargs {"thinking": true} or leave it out'),
    "suffix": (("",), "Leave it out"),
    "use_beam_search": ((False,), "Leave it out"),
    "length_penalty": ((1, 1.0), "Leave it out"),
    "min_tokens": ((0,), "Leave it out"),
    "prompt_logprobs": ((0,), "Leave it out"),
    "bad_words": (([],), "Use logit_bias"),
    "guided_json": ((), "Use response_format"),
    "guided_regex": ((), "Use response_format with a JSON schema"),
    "guided_choice": ((), "Use response_format with a JSON schema"),
    "guided_grammar": ((), "Use response_format with a JSON schema"),
    "structured_outputs": ((), "Use response_format"),
    "chat_template": ((), "The model's own format is used"),
    "continue_final_message": ((False,), "Leave it out"),
    "add_generation_prompt": ((True,), "Leave it out"),
    "truncate_prompt_tokens": ((), "Shorten the prompt"),
}


def _refuse(body: Mapping[str, Any]) -> None:
    for name, (harmless, advice) in _REFUSED.items():
        value = body.get(name)
        if value is not None and not any(type(value) is type(h) and value == h for h in harmless):
            raise unsupported(name, value, advice)


def check_model(body: Mapping[str, Any], info: ModelInfo) -> None:
    """Raises unless the body names the model that is served."""
    name = body.get("model")
    if not isinstance(name, str):
        raise bad("model", "must be a string", name, f"This server has {info.name!r}")
    if name != info.name:
        raise no_such_model(name, info)


def no_such_model(name: str, info: ModelInfo) -> ApiError:
    """A 404."""
    message = (
        f"model must be one that is served; got {name[:100]!r}. This server has {info.name!r}."
    )
    return ApiError(404, message, param="model", code="model_not_found")


# -- sampling ----------------------------------------------------------------------------------------


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    value = body.get("stop")
    texts = [value] if isinstance(value, str) else items(body, "stop", MAX_STOPS)
    for text in texts:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
            rule = f"must be texts of 1 to {MAX_STOP_LENGTH} characters"
            raise bad("stop", rule, text, "Leave it out if there are none")
    return tuple(texts)


def _token_ids(where: str, values: Sequence[Any], info: ModelInfo) -> list[int]:
    for value in values:
        if type(value) is not int or not 0 <= value < info.vocab_size:
            rule = f"must be token ids in [0, {info.vocab_size})"
            raise bad(where, rule, value, "Use the model's own tokenizer")
    return list(values)


def _logit_bias(body: Mapping[str, Any], info: ModelInfo) -> tuple[tuple[int, float], ...]:
    biases = mapping(body, "logit_bias") or {}
    pairs = []
    for key, bias in biases.items():
        # At most nine ASCII digits: int() would also take "１", "1_0" and any length.
        if not re.fullmatch("[0-9]{1,9}", key) or int(key) >= info.vocab_size:
            rule = f"must have token ids below {info.vocab_size} as keys"
            raise bad("logit_bias", rule, key, "Use the model's own tokenizer")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise bad(
                "logit_bias", "must have numbers in [-100, 100] as values", bias, "Correct it"
            )
        pairs.append((int(key), float(bias)))
    return tuple(pairs)


def _width(body: Mapping[str, Any], info: ModelInfo) -> int | None:
    """SEFP bits at which the weights are read."""
    value = body.get("width")
    if value is None:
        return None
    if not info.widths:
        raise unsupported("width", value, "Its weights are not in SEFP: leave it out")
    if type(value) is not int or value not in info.widths:
        rule = f"must be one of {', '.join(map(str, info.widths))}"
        raise bad("width", rule, value, "Leave it out for the default")
    return value


def _sampling(body: Mapping[str, Any], info: ModelInfo, logprobs: int | None) -> SamplingParams:
    """All but the number of tokens, which depends on the prompt, and the form."""
    stop_ids = items(body, "stop_token_ids", 64)
    values: dict[str, Any] = {
        "temperature": number(body, "temperature", 0, 100, 1.0),
        "top_p": number(body, "top_p", 0, 1, 1.0),
        # A cut at the whole vocabulary or beyond is none.
        "top_k": min(integer(body, "top_k", -1, 2**31 - 1, 0), info.vocab_size),
        "min_p": number(body, "min_p", 0, 1, 0.0),
        "repetition_penalty": number(body, "repetition_penalty", 1e-3, 1e3, 1.0),
        "presence_penalty": number(body, "presence_penalty", -2, 2, 0.0),
        "frequency_penalty": number(body, "frequency_penalty", -2, 2, 0.0),
        "logit_bias": _logit_bias(body, info),
        "logprobs": logprobs,
        "stop": _stops(body),
        "stop_token_ids": tuple(_token_ids("stop_token_ids", stop_ids, info)),
        "ignore_eos": boolean(body, "ignore_eos", False),
        "seed": integer(body, "seed", -(2**63), 2**63 - 1, None),
        "width": _width(body, info),
    }
    if values["top_p"] == 0:
        raise bad("top_p", "must be above 0", 0, "Use temperature 0 for greedy")
    values["top_k"] = max(values["top_k"], 0)  # -1 means all, too
    return checked(lambda: SamplingParams(**values))


def checked(make: Any) -> Any:
    """``make()``; its ValueError or TypeError becomes a 400 with the same line."""
    try:
        return make()
    except (ValueError, TypeError) as error:
        message = " ".join(str(error).split()) or "The request is invalid."
        named = re.match(r"[a-z_]+(\[\d+\])?(\.\w+(\[\d+\])?)*(?= )", message)
        raise ApiError(400, message, param=named.group() if named else None) from None


# -- the whole ---------------------------------------------------------------------------------------


def _limit(prompt: Sequence[int], asked: int | None, default: int | None, info: ModelInfo) -> int:
    """How many tokens may follow a prompt."""
    room = info.max_length - len(prompt)
    if not prompt:
        raise bad("prompt", "must have at least one token", "none", "Give some text")
    if room < 1 or (asked is not None and asked > room):
        what = f"{len(prompt)} tokens" + ("" if asked is None else f" and max_tokens {asked}")
        rule = f"must fit with its completion into {info.max_length} tokens"
        raise bad("prompt", rule, what, "Shorten one of them", "context_length_exceeded")
    return min(room, asked or default or room)


def _choices(
    prompts: Sequence[tuple[Sequence[int], str]],
    n: int,
    sampling: SamplingParams,
    limits: Sequence[int],
) -> tuple[Choice, ...]:
    if len(prompts) * n > MAX_CHOICES:
        rule = f"times prompts must be at most {MAX_CHOICES}"
        raise bad("n", rule, len(prompts) * n, "Send several requests")
    choices = []
    for (prompt, echo), limit in zip(prompts, limits, strict=True):
        for i in range(n):
            # Choices of one seed must differ, and the first be what n=1 gives.
            seed = sampling.seed
            if seed is not None and i:
                seed = (seed + i + 2**63) % 2**64 - 2**63
            own = dataclasses.replace(sampling, max_new_tokens=limit, seed=seed)
            choices.append(Choice(prompt, own, echo))
    return tuple(choices)


def _common(body: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ``Job`` that both endpoints share."""
    stream = boolean(body, "stream", False)
    options = mapping(body, "stream_options")
    if options is not None and not stream:
        rule = "may only be given with stream true"
        raise bad("stream_options", rule, dict(options), "Leave it out")
    timeout = number(body, "timeout", 0, MAX_TIMEOUT_S, None)
    if timeout == 0:
        raise bad("timeout", "must be above 0 seconds", 0, "Leave it out for none")
    return {
        "n": integer(body, "n", 1, MAX_CHOICES, 1),
        "stream": stream,
        "include_usage": boolean(options or {}, "include_usage", False),
        "priority": integer(body, "priority", -MAX_PRIORITY, MAX_PRIORITY, 0),
        "timeout_s": timeout,
    }


# -- /v1/completions ---------------------------------------------------------------------------------


def _prompts(body: Mapping[str, Any], info: ModelInfo) -> list[Any]:
    """Texts or lists of token ids."""
    value = body.get("prompt")
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        rule = "must be a text, a list of token ids, or a list of those"
        raise bad("prompt", rule, value, "Give some text")
    if isinstance(value[0], int):
        return [_token_ids("prompt", value, info)]
    if len(value) > MAX_CHOICES:
        rule = f"must be at most {MAX_CHOICES} prompts"
        raise bad("prompt", rule, len(value), "Send several requests")
    for i, one in enumerate(value):
        if isinstance(one, list):
            _token_ids(f"prompt[{i}]", one, info)
        elif not isinstance(one, str):
            raise bad(f"prompt[{i}]", "must be a text or a list of token ids", one, "Correct it")
    return value


def parse_completion(body: Mapping[str, Any], info: ModelInfo) -> Job:
    """A body of /v1/completions.

    Raises:
      ApiError: names the field, the rule, the value and a way out.
    """
    check_model(body, info)
    _refuse(body)
    common = _common(body)
    best_of = integer(body, "best_of", 1, MAX_CHOICES, None)
    if best_of not in (None, common["n"]):
        raise unsupported("best_of", best_of, "Leave it out and set n")
    logprobs = integer(body, "logprobs", 0, MAX_TOP_LOGPROBS, None)
    echo = boolean(body, "echo", False)
    if echo and logprobs is not None:
        raise unsupported("echo", True, "Log-probabilities of prompts are not served; set one")
    form = checked(lambda: answer_form(response_schema(body)))
    sampling = dataclasses.replace(_sampling(body, info, logprobs), form=form)
    asked = integer(body, "max_tokens", 1, 2**63, None)
    prompts = []
    for prompt in _prompts(body, info):
        ids = info.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        text = prompt if isinstance(prompt, str) else info.tokenizer.decode(ids)
        prompts.append((ids, text if echo else ""))
    limits = [_limit(ids, asked, COMPLETION_TOKENS, info) for ids, _ in prompts]
    return Job(_choices(prompts, common["n"], sampling, limits), **common)


# -- /v1/chat/completions ----------------------------------------------------------------------------

_MESSAGE_FIELDS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id")


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = []
    for i, message in enumerate(items(body, "messages", MAX_MESSAGES)):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise bad(where, "must be an object with role and content", message, "Correct it")
        for name, advice in (("function_call", "Use tool_calls"), ("audio", "Only text is served")):
            if message.get(name) is not None:
                raise unsupported(f"{where}.{name}", message[name], advice)
        messages.append({name: message[name] for name in _MESSAGE_FIELDS if name in message})
    if not messages:
        rule = "must be a list with at least one message"
        raise bad("messages", rule, body.get("messages"), "Give a user message")
    last = messages[-1].get("role")
    if last in ("assistant", "system"):
        # The format has no way to go on from these.
        rule = "must end in a user, developer or tool message"
        raise bad("messages", rule, f"{last} at the end", "Add a user message")
    return messages


def _thinking(body: Mapping[str, Any]) -> bool:
    options = mapping(body, "chat_template_kwargs") or {}
    unknown = next((name for name in options if name != "thinking"), None)
    if unknown is not None:
        where = f"chat_template_kwargs.{unknown}"
        raise unsupported(where, options[unknown], "The format knows only 'thinking'")
    return boolean(options, "thinking", False)


def _encode(text: str, tokenizer: ByteTokenizer | FileTokenizer) -> list[int]:
    """Ids of a conversation, with the begin token once. Bytes have an id for it, but no name."""
    if isinstance(tokenizer, ByteTokenizer):
        return tokenizer.encode(text, bos=True)
    return tokenizer.encode(_BEGIN + text, bos=False)


def parse_chat(body: Mapping[str, Any], info: ModelInfo) -> Job:
    """A body of /v1/chat/completions.

    Raises:
      ApiError: names the field, the rule, the value and a way out.
    """
    check_model(body, info)
    _refuse(body)
    common = _common(body)
    wanted = boolean(body, "logprobs", False)
    top = integer(body, "top_logprobs", 0, MAX_TOP_LOGPROBS, None)
    if top is not None and not wanted:
        raise bad("top_logprobs", "may only be given with logprobs true", top, "Set both")
    sampling = _sampling(body, info, (top or 0) if wanted else None)
    messages, tools, thinking = _messages(body), read_tools(body), _thinking(body)
    schema = response_schema(body)
    text = checked(
        lambda: chat.encode(
            messages, tools=tools.shown, response_schema=schema, thinking=thinking, add_bos=False
        )
    )
    form = checked(lambda: answer_form(schema, tools, thinking))
    # What ends a turn for a tokenizer that has no token for it. JSON and calls end by themselves, and may hold it.
    ends_itself = form is not None and (schema is not None or tools.forced)
    stop = sampling.stop if ends_itself else (*sampling.stop, _END)
    sampling = dataclasses.replace(sampling, stop=stop, form=form)
    prompt = _encode(text, info.tokenizer)
    asked = integer(body, "max_completion_tokens", 1, 2**63, None)
    asked = integer(body, "max_tokens", 1, 2**63, None) if asked is None else asked
    limit = _limit(prompt, asked, None, info)
    return Job(
        _choices([(prompt, "")], common["n"], sampling, [limit]),
        **common,
        thinking=thinking,
        tools=bool(tools.callable),
        enforced=form is not None,
        parallel_calls=tools.parallel,
    )
