"""The markup of V3.2's messages (post-training spec, 3.2): its tokens and tags, JSON, and calls to text.

What a model writes after the prompt, thinking or not::

    message = [reasoning "</think>"] content [block] "<｜end▁of▁sentence｜>"
    block   = "\\n\\n<｜DSML｜function_calls>\\n" call+ "</｜DSML｜function_calls>"
    call    = '<｜DSML｜invoke name="' name '">\\n' (argument+ | ["\\n"]) "</｜DSML｜invoke>\\n"
    argument = '<｜DSML｜parameter name="' key '" string="true|false">' value "</｜DSML｜parameter>\\n"
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
DSML = "｜DSML｜"

TURN_TOKENS = (BEGIN, END, USER, ASSISTANT)
SPECIAL_TOKENS = (*TURN_TOKENS, THINK, END_THINK, DSML)

CALLS, END_CALLS = f"<{DSML}function_calls>", f"</{DSML}function_calls>"
BLOCK = f"\n\n<{DSML}function_calls"  # without ">": what follows must be right, or is an error
INVOKE, END_INVOKE = f'<{DSML}invoke name="', f"</{DSML}invoke>\n"
PARAMETER, END_PARAMETER = f'<{DSML}parameter name="', f"</{DSML}parameter>"
# The released decoder ends a value at the last of these, its tag without brackets.
NEVER_RAW = (*TURN_TOKENS, END_PARAMETER[1:-1])
STRING, JSON = '" string="true">', '" string="false">'

# -- JSON --------------------------------------------------------------------------------------------


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    return number if abs(number) != float("inf") else _refuse_number(text)


def load_json(text: str) -> Any:
    """``json.loads``, but raises ValueError also for NaN, infinities, overflow and excessive depth."""
    try:
        return json.loads(text, parse_constant=_refuse_number, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def dump_json(value: Any) -> str:
    """JSON on one line; pure ASCII where characters as they are could be read as markup or not at all.

    Raises:
      ValueError: for numbers that are not finite and for excessive depth.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return text if is_plain(text) else json.dumps(value)


def is_plain(text: str) -> bool:
    """Whether ``text`` is encodable and holds nothing that would end a turn or an argument."""
    try:
        text.encode()
    except UnicodeEncodeError:  # A lone surrogate, which JSON can spell and UTF-8 cannot.
        return False
    return not any(token in text for token in NEVER_RAW)


# -- calls to text -----------------------------------------------------------------------------------


def render_calls(calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """The call block of (name, arguments) pairs, without the blank line before it.

    The format has no escape for strings. One that holds a turn token or ``/｜DSML｜parameter``, and so
    would end the message or the argument early, is written as an ASCII JSON string with string="false",
    which every decoder gives back unchanged.
    """
    lines = [CALLS]
    for name, arguments in calls:
        lines.append(f'{INVOKE}{name}">')
        for key, value in arguments.items():
            raw = isinstance(value, str) and is_plain(value)
            text = value if raw else dump_json(value)
            lines.append(f"{PARAMETER}{key}{STRING if raw else JSON}{text}{END_PARAMETER}")
        if not arguments:
            lines.append("")  # As the released encoder does.
        lines.append(END_INVOKE.rstrip())
    return "\n".join([*lines, END_CALLS])
