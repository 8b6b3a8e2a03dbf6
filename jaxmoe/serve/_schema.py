"""The JSON schema of a response, and limits on what a stranger may have compiled.

The grammar library is native code that recurses: on schemas beyond these limits it has been seen to overflow its stack,
which ends the process. (Integer constants of -2^63; chains of references: 1000 levels passed, 2000 did not.)
"""

import json
from collections.abc import Mapping
from typing import Any

from jaxmoe.serve._body import bad, mapping

MAX_SCHEMA_LENGTH = 1 << 16  # characters
MAX_SCHEMA_NUMBER = 2**53  # beyond it JSON's numbers are not the same everywhere anyway
MAX_SCHEMA_LEVELS = 1024  # of nesting, if every reference went through all of it

_PARAM = "response_format.json_schema.schema"
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")


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
    _check_limits(schema)
    return schema


def _check_limits(schema: Mapping[str, Any]) -> None:
    length = len(json.dumps(schema))
    if length > MAX_SCHEMA_LENGTH:
        rule = f"must have at most {MAX_SCHEMA_LENGTH} characters"
        raise bad(_PARAM, rule, length, "Simplify it")
    depth, references, level = 0, 0, [schema]
    while level:
        depth += 1
        references += sum(
            name in node for node in level if isinstance(node, dict) for name in _REFERENCES
        )
        below = []
        for node in level:
            if isinstance(node, dict | list):
                below += node.values() if isinstance(node, dict) else node
            elif isinstance(node, int | float) and abs(node) > MAX_SCHEMA_NUMBER:
                rule = "must have no numbers beyond 2^53"
                raise bad(_PARAM, rule, node, "Leave the bound out")
        level = below
    if depth * (references + 1) > MAX_SCHEMA_LEVELS:
        rule = f"must have at most {MAX_SCHEMA_LEVELS} levels, counted as depth x (references + 1)"
        raise bad(_PARAM, rule, f"{depth} x {references + 1}", "Simplify it")
