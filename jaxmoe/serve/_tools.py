"""Which tools a model may call, and the form its calls must have: V3.2's markup around values of the tools' schemas."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxmoe.chat import _dsml
from jaxmoe.engine.grammar import Chain, Form, Json, Literal, OneOf, Repeat, Text
from jaxmoe.serve._body import bad, boolean, items, mapping, show

MAX_TOOLS = 1024

# Keywords that say nothing about which values are valid.
_NOTES = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
_NOTES |= {"$schema", "$id", "$comment", "$defs", "definitions"}
_OF_ARGUMENTS = _NOTES | {"type", "properties", "required", "additionalProperties"}
_OF_RAW_TEXT = _NOTES | {"type", "enum", "const", "minLength", "maxLength"}
_LONGEST = 1 << 16  # characters of a raw text whose length is bounded


@dataclass(frozen=True)
class Tools:
    """The tools of a request.

    Attributes:
      shown: as OpenAI has them, for the prompt.
      callable: positions in ``shown`` of those that may be called.
      forced: whether one must be called.
      enforced: whether calls must have the right form.
      parallel: whether there may be more than one call.
    """

    shown: tuple[Mapping[str, Any], ...] = ()
    callable: tuple[int, ...] = ()
    forced: bool = False
    enforced: bool = False
    parallel: bool = True


# -- reading -----------------------------------------------------------------------------------------


def read_tools(body: Mapping[str, Any]) -> Tools:
    """``tools``, ``tool_choice`` and ``parallel_tool_calls`` of a body; no tools for tool_choice none."""
    tools = tuple(items(body, "tools", MAX_TOOLS))
    strict = False
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type") != "function":
            rule = "must be of type 'function' and hold a function"
            raise bad(where, rule, tool, "Give its name, description and parameters")
        strict |= boolean(function, "strict", False)
    parallel = boolean(body, "parallel_tool_calls", True)
    choice = body.get("tool_choice")
    if choice not in (None, "none", "auto") and not tools:
        raise bad("tool_choice", "may only be given with tools", choice, "Give tools")
    if choice == "none":
        return Tools()
    everything = tuple(range(len(tools)))
    if choice in (None, "auto"):
        return Tools(tools, everything, enforced=strict, parallel=parallel)
    if choice == "required":
        return Tools(tools, everything, True, True, parallel)
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    if kind == "function":
        return Tools(tools, _named(tools, [choice], "tool_choice"), True, True, parallel=False)
    if kind == "allowed_tools":
        allowed = mapping(choice, "allowed_tools") or {}
        mode = allowed.get("mode", "auto")
        if mode not in ("auto", "required"):
            raise bad("tool_choice.allowed_tools.mode", "must be auto or required", mode, "Set one")
        names = items(allowed, "tools", MAX_TOOLS)
        named = _named(tools, names, "tool_choice.allowed_tools.tools")
        return Tools(tools, named, mode == "required", True, parallel)
    rule = "must be none, auto, required, a function or allowed_tools"
    raise bad("tool_choice", rule, choice, 'A function: {"type": "function", "function": {"name"}}')


def _named(tools: tuple[Mapping[str, Any], ...], choices: Any, where: str) -> tuple[int, ...]:
    """Positions of the tools that are named."""
    names = [tool["function"].get("name") for tool in tools]
    found = []
    for choice in choices:
        function = choice.get("function") if isinstance(choice, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if name is None or name not in names:
            rule = "must name a function of tools"
            raise bad(where, rule, name or choice, f"There are {show(names)}")
        found.append(names.index(name))
    if not found:
        raise bad(where, "must name a function of tools", "none", f"There are {show(names)}")
    return tuple(sorted(set(found)))


# -- the form ----------------------------------------------------------------------------------------


def calls_form(tools: Tools) -> Form:
    """Of a block of calls, the blank line before it included.

    Arguments come in the order of the schema's properties, and there are no others.

    Raises:
      ApiError: for a schema that cannot be enforced.
    """
    return Chain((Literal(f"\n\n{_dsml.CALLS}\n"), _after_opening(tools)))


def calls_in_text_form(tools: Tools) -> Form:
    """Of any text with or without a block of calls at its end."""
    opening = f"\n\n{_dsml.CALLS}"
    calls = Chain((Text(f"{opening}\n"), _after_opening(tools)))
    return OneOf((calls, Text(None, without=(opening[:-1],))))


def _after_opening(tools: Tools) -> Form:
    """Of a block behind its first line."""
    call = OneOf(tuple(_call_form(i, tools.shown[i]["function"]) for i in tools.callable))
    return Chain((Repeat(call) if tools.parallel else call, Literal(_dsml.END_CALLS)))


def _call_form(index: int, function: Mapping[str, Any]) -> Form:
    where = f"tools[{index}].function.parameters"
    parameters = function.get("parameters") or {}
    if not isinstance(parameters, Mapping):
        raise bad(where, "must be an object", parameters, "Give a JSON schema")
    schema = _resolved(parameters, parameters)
    unknown = [key for key in schema if key not in _OF_ARGUMENTS]
    if unknown or schema.get("type", "object") != "object":
        rule = "must describe an object by its properties alone to be enforced"
        given = unknown[0] if unknown else schema["type"]
        raise bad(where, rule, given, "Use properties, required and $defs, or tool_choice 'auto'")
    properties = mapping(schema, "properties") or {}
    required = list(items(schema, "required", 1 << 16))
    if not all(isinstance(name, str) for name in required):
        raise bad(where, "must have names in required", required, "Correct it")
    parts: list[Form] = [Literal(f'{_dsml.INVOKE}{function["name"]}">\n')]
    others = schema.get("additionalProperties", True)
    for name in dict.fromkeys([*properties, *required]):
        if name not in properties and others is False:
            rule = "must have all required names in properties if additionalProperties is false"
            raise bad(where, rule, name, "Add it to properties, or take it out of required")
        argument = _argument_form(where, name, properties.get(name, others), parameters)
        parts.append(argument if name in required else OneOf((argument, Literal(""))))
    if len(parts) == 1:
        parts.append(Literal("\n"))  # As the released encoder does.
    return Chain((*parts, Literal(_dsml.END_INVOKE)))


def _argument_form(where: str, name: Any, schema: Any, root: Mapping[str, Any]) -> Form:
    if not isinstance(name, str) or '"' in name or not _dsml.is_plain(name):
        rule = "must have names without quotes and special tokens to be enforced"
        raise bad(f"{where}.properties", rule, name, "Rename it")
    where = f"{where}.properties.{name}" if re.fullmatch(r"\w{1,64}", name) else where
    if not isinstance(schema, Mapping | bool):
        raise bad(where, "must be an object", schema, "Give a JSON schema")
    value = Json(_document(where, schema, root), where, spaced=True)
    ways = [
        *(Chain((Literal('true">'), raw)) for raw in _raw_forms(schema, root)),
        Chain((Literal('false">'), value, Literal(_dsml.END_PARAMETER + "\n"))),
    ]
    head = Literal(f'{_dsml.PARAMETER}{name}" string="')
    return Chain((head, OneOf(tuple(ways))))


def _document(where: str, schema: Any, root: Mapping[str, Any]) -> str:
    """A property's schema as one that stands alone."""
    text = json.dumps(schema)
    if '"$ref"' not in text or not isinstance(schema, Mapping):
        return text
    shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
    for target in _references([schema, *shared.values()]):
        if not isinstance(target, str) or not target.startswith(("#/$defs/", "#/definitions/")):
            rule = "must refer into $defs or definitions of the parameters to be enforced"
            raise bad(where, rule, target, "Move what it refers to there")
    return json.dumps({**schema, **shared})


def _references(nodes: list[Any]) -> list[Any]:
    """Where all references below ``nodes`` point."""
    found = []
    while nodes:
        node = nodes.pop()
        if isinstance(node, Mapping):
            found += [node["$ref"]] if "$ref" in node else []
            nodes.extend(node.values())
        elif isinstance(node, list):
            nodes.extend(node)
    return found


def _resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """``schema``, or what it refers to if it is a reference and nothing else."""
    for _ in range(32):
        target = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(target, str) or set(schema) - _NOTES != {"$ref"}:
            return schema
        parts = target.split("/")
        if len(parts) != 3 or parts[:2] not in (["#", "$defs"], ["#", "definitions"]):
            return schema
        known = root.get(parts[1])
        if not isinstance(known, Mapping) or parts[2] not in known:
            return schema
        schema = known[parts[2]]
    return schema


def _raw_forms(schema: Any, root: Mapping[str, Any]) -> list[Form]:
    """How strings that satisfy ``schema`` look as raw text, end included. May leave out some that do."""
    schema = _resolved(schema, root)
    if not isinstance(schema, Mapping):
        return [_raw_text(0, None)] if schema is True else []
    keys = set(schema) - _NOTES
    if keys == {"anyOf"} and isinstance(schema["anyOf"], list):
        found = [form for part in schema["anyOf"] for form in _raw_forms(part, root)]
        return list(dict.fromkeys(found))
    types = schema.get("type", "string")
    types = types if isinstance(types, list) else [types]
    if not keys <= _OF_RAW_TEXT or "string" not in types:
        return []
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if "enum" not in keys and "const" not in keys:
        return [_raw_text(least, most)] if _is_range(least, most) else []
    if {"minLength", "maxLength"} & keys or {"enum", "const"} <= keys:
        return []
    values = [schema["const"]] if "const" in keys else schema["enum"]
    return [
        Literal(value + _dsml.END_PARAMETER + "\n")
        for value in (values if isinstance(values, list) else [])
        if isinstance(value, str) and _dsml.is_plain(value)
    ]


def _is_range(least: Any, most: Any) -> bool:
    if type(least) is not int or not 0 <= least <= _LONGEST:
        return False
    return most is None or (type(most) is int and least <= most <= _LONGEST)


def _raw_text(least: int, most: int | None) -> Form:
    return Text(_dsml.END_PARAMETER + "\n", _dsml.NEVER_RAW, least, most)
