"""Tools and their choice in the Responses form: as in chats, one level less deep."""

from __future__ import annotations

from typing import Any

from app.schemas.json import BodyError
from app.schemas.response_items import in_response_form
from app.schemas.tools import MAX_TOOLS, TOOLS_SCHEMA, Tool, check_tool_choice, check_tools

_FIELDS = ("name", "description", "parameters", "strict")
_FUNCTION_SCHEMA: dict[str, Any] = TOOLS_SCHEMA["items"]["properties"]["function"]["properties"]  # type: ignore[index]

RESPONSE_TOOLS_SCHEMA = {
    "type": "array",
    "maxItems": MAX_TOOLS,
    "items": {
        "type": "object",
        "required": ["type", "name"],
        "properties": {"type": {"const": "function", "description": "the only kind there is"}, **_FUNCTION_SCHEMA},
    },
}
RESPONSE_TOOL_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        {
            "type": "object",
            "required": ["type", "name"],
            "properties": {
                "type": {"const": "function", "description": "the only kind there is"},
                "name": _FUNCTION_SCHEMA["name"],
            },
        },
    ]
}


def check_response_tools(value: Any) -> list[Tool]:
    """Functions, each ``{"type": "function", "name": ...}``. Raises BodyError."""
    if not isinstance(value, list):
        raise BodyError("'tools' should be a list of objects", "tools")
    try:
        check_tools([chat_tool(tool) for tool in value])
    except BodyError as error:
        raise in_response_form(error) from None
    return [{"type": "function", **{field: tool.get(field) for field in _FIELDS}} for tool in value]


def check_response_tool_choice(value: Any) -> str | Tool:
    """A mode, or ``{"type": "function", "name": ...}``. Raises BodyError."""
    try:
        check_tool_choice(chat_tool(value))
    except BodyError as error:
        raise in_response_form(error) from None
    return {"type": "function", "name": value["name"]} if isinstance(value, dict) else str(value)


def chat_tool(value: Any) -> Any:
    """The same in the form of chats; what is no object stays as it is."""
    if not isinstance(value, dict):
        return value
    return {"type": value.get("type"), "function": {field: value[field] for field in _FIELDS if field in value}}
