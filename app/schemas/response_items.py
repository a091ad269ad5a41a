"""Items of a conversation in the Responses form, which become messages: checked by hand, as messages are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from app.schemas.json import BodyError
from app.schemas.messages import MAX_MESSAGES, Message, check_text, text_schema
from app.schemas.tools import check_tool_calls

_ROLES = ("system", "developer", "user", "assistant")
_PARTS = ("input_text", "output_text")

_ID_SCHEMA = {"type": "string", "description": "pairs a call with its output"}
INPUT_SCHEMA = {
    "anyOf": [
        {"type": "string", "description": "what the user says"},
        {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_MESSAGES,
            "items": {
                "anyOf": [
                    {
                        "type": "object",
                        "required": ["role", "content"],
                        "properties": {
                            "type": {"const": "message", "description": "may be left out"},
                            "role": {"enum": list(_ROLES), "description": "who speaks"},
                            "content": {**text_schema(*_PARTS), "description": "what is said"},
                        },
                    },
                    {
                        "type": "object",
                        "required": ["type", "call_id", "name", "arguments"],
                        "properties": {
                            "type": {"const": "function_call", "description": "a call that the model made"},
                            "call_id": _ID_SCHEMA,
                            "name": {"type": "string", "description": "of the function"},
                            "arguments": {"type": "string", "description": "text of a JSON object"},
                        },
                    },
                    {
                        "type": "object",
                        "required": ["type", "call_id", "output"],
                        "properties": {
                            "type": {"const": "function_call_output", "description": "what a call gave"},
                            "call_id": _ID_SCHEMA,
                            "output": {**text_schema(*_PARTS), "description": "for the model to read"},
                        },
                    },
                ]
            },
        },
    ]
}


def check_input(value: Any) -> list[Message]:
    """The messages that a string or a list of items says. Raises BodyError."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise BodyError("'input' should be a string or a list of items", "input")
    if not 1 <= len(value) <= MAX_MESSAGES:
        raise BodyError(f"'input' should hold 1 to {MAX_MESSAGES} items", "input")
    messages: list[Message] = []
    for i, item in enumerate(value):
        message = _check_item(item, f"input[{i}]")
        if "tool_calls" in message and messages and messages[-1]["role"] == "assistant":
            # what one turn says and calls is one message
            calls = [*messages[-1].get("tool_calls", ()), *message["tool_calls"]]
            messages[-1] = {**messages[-1], "tool_calls": calls}
        else:
            messages.append(message)
    return messages


def _check_item(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise BodyError(f"'{where}' should be an object", where)
    value = {key: item for key, item in value.items() if item is not None}
    kind = value.get("type", "message")
    check = _CHECKS.get(kind) if isinstance(kind, str) else None
    if check is None:
        names = ", ".join(_CHECKS)
        raise BodyError(f"'{where}.type' should be one of {names}; others are not supported", f"{where}.type")
    return check(value, where)


def _check_message(value: dict[str, Any], where: str) -> Message:
    role = value.get("role")
    if role not in _ROLES:
        raise BodyError(f"'{where}.role' should be one of {', '.join(_ROLES)}", f"{where}.role")
    return {"role": role, "content": check_text(value.get("content"), f"{where}.content", *_PARTS)}


def _check_call(value: dict[str, Any], where: str) -> Message:
    function = {"name": value.get("name"), "arguments": value.get("arguments")}
    call = {"id": _call_id(value, where), "type": "function", "function": function}
    try:
        calls = check_tool_calls([call], where)
    except BodyError as error:
        raise in_response_form(error, f"{where}[0]", where) from None
    return {"role": "assistant", "content": None, "tool_calls": calls}


def _check_output(value: dict[str, Any], where: str) -> Message:
    content = check_text(value.get("output"), f"{where}.output", *_PARTS)
    return {"role": "tool", "content": content, "tool_call_id": _call_id(value, where)}


def _call_id(value: dict[str, Any], where: str) -> str:
    call_id = value.get("call_id")
    if not isinstance(call_id, str) or not 1 <= len(call_id) <= 256:
        raise BodyError(f"'{where}.call_id' should be a string of 1 to 256 characters", f"{where}.call_id")
    return call_id


def in_response_form(error: BodyError, old: str = "", new: str = "") -> BodyError:
    """What is said of a function in the form of chats, whose fields stand one level deeper there."""

    def renamed(text: str) -> str:
        return (text.replace(old, new) if old else text).replace(".function", "")

    return BodyError(renamed(error.message), None if error.param is None else renamed(error.param))


_CHECKS: dict[str, Callable[[dict[str, Any], str], Message]] = {
    "message": _check_message,
    "function_call": _check_call,
    "function_call_output": _check_output,
}
