"""Reading JSON bodies. Every mistake is an ``ApiError`` that names the field, the rule, the value and a way out."""

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmoe.chat._dsml import load_json

MAX_DEPTH = 64  # of nested lists and objects: what recurses over a schema later stays far from Python's limit

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = _shown.maxlong = 60


class ApiError(Exception):
    """An answer in OpenAI's error envelope.

    Attributes:
      status: of HTTP.
      message: one line.
      param: the field at fault, if one is.
      code: a stable name of the mistake, if it has one.
      headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def envelope(self) -> dict[str, Any]:
        """The body."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, kind)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def show(value: Any) -> str:
    """A value for a message: short, one line."""
    return _shown.repr(value).replace("\n", " ")


def bad(param: str, rule: str, value: Any, advice: str, code: str | None = None) -> ApiError:
    """A 400 in the house's form."""
    return ApiError(400, f"{param} {rule}; got {show(value)}. {advice}.", param=param, code=code)


def unsupported(param: str, value: Any, advice: str) -> ApiError:
    """A 400 for what OpenAI's API has, and this server would silently serve wrong."""
    rule = "is not supported by this server"
    return bad(param, rule, value, advice, code="unsupported_parameter")


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return False
    return any(isinstance(node, dict | list) for node in level)


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a request's body."""

    def wrong(rule: str) -> ApiError:
        return ApiError(400, f"The body {rule}. Send one JSON object.", code="invalid_json")

    try:
        value = load_json(body.decode())
    except UnicodeDecodeError as error:
        raise wrong(f"must be UTF-8; byte {error.start} is not") from None
    except ValueError as error:
        raise wrong(f"must be JSON ({str(error).splitlines()[0][:200]})") from None
    if not isinstance(value, dict):
        raise wrong(f"must be a JSON object; got {show(value)}")
    if _deeper_than(value, MAX_DEPTH):
        raise wrong(f"must not be nested deeper than {MAX_DEPTH} levels")
    if b"\\u" in body:  # Only an escape can spell a lone surrogate, which no tokenizer can encode.
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise wrong("must not contain lone surrogates (\\ud800 to \\udfff)") from None
    return value


# -- fields ------------------------------------------------------------------------------------------
# null means absent, as in OpenAI's API. bool is no number, although Python says so.


def number(
    body: Mapping[str, Any], name: str, low: float, high: float, default: float | None
) -> float | None:
    """A number in [low, high]."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise bad(name, f"must be a number in [{low:g}, {high:g}]", value, "Correct it")
    return float(value)


def integer(
    body: Mapping[str, Any], name: str, low: int, high: int, default: int | None
) -> int | None:
    """An integer in [low, high]."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise bad(name, f"must be an integer in [{low}, {high}]", value, "Correct it")
    return value


def boolean(body: Mapping[str, Any], name: str, default: bool) -> bool:
    """true or false."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise bad(name, "must be true or false", value, "Correct it")
    return value


def mapping(body: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """An object."""
    value = body.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise bad(name, "must be an object", value, "Leave it out if there is none")
    return value


def items(body: Mapping[str, Any], name: str, most: int) -> Sequence[Any]:
    """A list of at most ``most``."""
    value = body.get(name)
    if value is None:
        return ()
    if not isinstance(value, list):
        raise bad(name, "must be a list", value, "Leave it out if there are none")
    if len(value) > most:
        raise bad(name, f"must have at most {most} entries", len(value), "Shorten it")
    return value
