"""The form that an answer must have, from ``response_format``, the tools and thinking."""

import json
from collections.abc import Mapping
from typing import Any

from jaxmoe.chat import _dsml
from jaxmoe.engine.grammar import Chain, Form, Json, OneOf, Text
from jaxmoe.serve._body import bad, mapping
from jaxmoe.serve._tools import Tools, calls_form, calls_in_text_form

_NO_TOOLS = Tools()
_PARAM = "response_format.json_schema.schema"


def response_schema(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The schema that the response must satisfy, from a body's ``response_format``."""
    form = mapping(body, "response_format")
    if form is None or form.get("type") == "text":
        return None
    if form.get("type") == "json_object":
        return {"type": "object"}
    if form.get("type") != "json_schema":
        rule = "must be text, json_object or json_schema"
        raise bad("response_format.type", rule, form.get("type"), "Correct it")
    inner = form.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if not isinstance(schema, Mapping):
        raise bad(_PARAM, "must be an object", schema, "Give a JSON schema")
    return schema


def answer_form(
    schema: Mapping[str, Any] | None, tools: Tools = _NO_TOOLS, thinking: bool = False
) -> Form | None:
    """The form of an answer; None if it may be anything.

    With a schema, an answer that is no call satisfies it. The schema and the tools have no say in the reasoning.

    Args:
      schema: of ``response_format``.
      tools: which may be called.
      thinking: whether reasoning comes first.

    Raises:
      ApiError, ValueError: for a schema that cannot be enforced.
    """
    form: Form | None = None
    if tools.forced:
        form = calls_form(tools)
    elif schema is not None:
        form = Json(json.dumps(schema), _PARAM)
        form = OneOf((form, calls_form(tools))) if tools.callable else form
    elif tools.enforced:
        form = calls_in_text_form(tools)
    if form is None or not thinking:
        return form
    return Chain((Text(_dsml.END_THINK, without=_dsml.TURN_TOKENS), form))
