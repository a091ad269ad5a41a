"""Tools that a model may call, calls that it made, and which it is to choose."""

from __future__ import annotations

import json
import re
from typing import Any

from app.schemas.json import BodyError

MAX_TOOLS = 128
MAX_TOOL_CALLS = 128
MAX_TOOL_CHARACTERS = 256 * 1024
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MODES = ("none", "auto", "required")

_NAME_SCHEMA = {"type": "string", "pattern": f"^{_NAME.pattern}$", "description": "what a call says"}
TOOLS_SCHEMA = {
    "type": "array",
    "maxItems": MAX_TOOLS,
    "items": {
        "type": "object",
        "required": ["type", "function"],
        "properties": {
            "type": {"const": "function", "description": "the only kind there is"},
            "function": {
                "type": "object",
                "description": "what may be called",
                "required": ["name"],
                "properties": {
                    "name": _NAME_SCHEMA,
                    "description": {"type": "string", "description": "for the model: when to call it"},
                    "parameters": {"type": "object", "description": "JSON schema of its arguments"},
                    "strict": {"type": "boolean", "description": "no effect: arguments follow the schema if forced"},
                },
            },
        },
    },
}
TOOL_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": list(_MODES)},
        {
            "type": "object",
            "required": ["type", "function"],
            "properties": {
                "type": {"const": "function", "description": "the only kind there is"},
                "function": {
                    "type": "object",
                    "description": "one of `tools`, which is called",
                    "required": ["name"],
                    "properties": {"name": _NAME_SCHEMA},
                },
            },
        },
    ]
}

Tool = dict[str, Any]


def check_tools(value: Any) -> list[Tool]:
    """Functions, each ``{"type": "function", "function": {...}}``. Raises BodyError."""
    if not isinstance(value, list):
        raise BodyError("'tools' should be a list of objects", "tools")
    if len(value) > MAX_TOOLS:
        raise BodyError(f"'tools' should hold at most {MAX_TOOLS} tools", "tools")
    tools = [_check_tool(tool, f"tools[{i}]") for i, tool in enumerate(value)]
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise BodyError("'tools' holds the same name twice", "tools")
    if tools and len(json.dumps(tools)) > MAX_TOOL_CHARACTERS:
        raise BodyError(f"'tools' should take at most {MAX_TOOL_CHARACTERS} characters", "tools")
    return tools


def check_tool_choice(value: Any) -> str | Tool:
    """A mode, or ``{"type": "function", "function": {"name": ...}}``. Raises BodyError."""
    if isinstance(value, str) and value in _MODES:
        return value
    if isinstance(value, dict) and value.get("type") == "function" and isinstance(value.get("function"), dict):
        _check_name(value["function"].get("name"), "tool_choice.function.name")
        return value
    raise BodyError("'tool_choice' should be none, auto, required or an object that names a function", "tool_choice")


def check_tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Calls of an assistant, arguments as text. Raises BodyError."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_TOOL_CALLS:
        raise BodyError(f"'{where}' should be a list of 1 to {MAX_TOOL_CALLS} calls", where)
    return [_check_call(call, f"{where}[{i}]") for i, call in enumerate(value)]


def _check_call(value: Any, where: str) -> dict[str, Any]:
    function = _check_function(value, where)
    identifier, arguments = value.get("id"), function.get("arguments")
    if not isinstance(identifier, str) or not 1 <= len(identifier) <= 256:
        raise BodyError(f"'{where}.id' should be a string of 1 to 256 characters", f"{where}.id")
    if not isinstance(arguments, str):
        raise BodyError(f"'{where}.function.arguments' should be a string", f"{where}.function.arguments")
    if len(arguments) > MAX_TOOL_CHARACTERS:
        raise BodyError(
            f"'{where}.function.arguments' should be at most {MAX_TOOL_CHARACTERS} characters",
            f"{where}.function.arguments",
        )
    called = {"name": function["name"], "arguments": arguments}
    return {"id": identifier, "type": "function", "function": called}


def _check_tool(value: Any, where: str) -> Tool:
    function = {key: item for key, item in _check_function(value, where).items() if item is not None}
    for field, kind, told in (
        ("description", str, "a string"),
        ("parameters", dict, "an object"),
        ("strict", bool, "true or false"),
    ):
        if field in function and not isinstance(function[field], kind):
            raise BodyError(f"'{where}.function.{field}' should be {told}", f"{where}.function.{field}")
    known = ("name", "description", "parameters")
    return {"type": "function", "function": {field: function[field] for field in known if field in function}}


def _check_function(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BodyError(f"'{where}' should be an object", where)
    if value.get("type") != "function":
        raise BodyError(f"'{where}.type' should be 'function'; other kinds are not supported", f"{where}.type")
    function = value.get("function")
    if not isinstance(function, dict):
        raise BodyError(f"'{where}.function' should be an object", f"{where}.function")
    _check_name(function.get("name"), f"{where}.function.name")
    return function


def _check_name(value: Any, where: str) -> None:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise BodyError(f"'{where}' should be 1 to 64 letters, digits, '_', '-' or '.'", where)
