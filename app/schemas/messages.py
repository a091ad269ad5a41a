"""Messages of a conversation, checked by hand: one pass over thousands of them, and one clear message."""

from __future__ import annotations

from typing import Any

from app.schemas.json import BodyError
from app.schemas.tools import check_tool_calls
from app.schemas.wire import WireModel

MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_MESSAGE_CHARACTERS = 16 * 2**20
MAX_NAME_CHARACTERS = 256

ROLES = ("system", "developer", "user", "assistant", "tool")
_PART = "text"
# what a message may carry beside these is ignored
_UNSUPPORTED = ("audio", "function_call")

Message = dict[str, Any]


def text_schema(*kinds: str) -> dict[str, Any]:
    """What ``check_text`` takes."""
    told = {"const": kinds[0]} if len(kinds) == 1 else {"enum": list(kinds)}
    part = {
        "type": "object",
        "required": ["type", "text"],
        "properties": {
            "type": {**told, "description": "text; no images, audio or files"},
            "text": {"type": "string", "description": "parts of one message are joined, each on a line of its own"},
        },
    }
    parts = {"type": "array", "minItems": 1, "maxItems": MAX_PARTS, "items": part}
    return {"anyOf": [{"type": "string"}, parts]}


_CALL_SCHEMA = {
    "type": "object",
    "required": ["id", "type", "function"],
    "properties": {
        "id": {"type": "string", "description": "what the answer of the tool refers to"},
        "type": {"const": "function", "description": "what kind of call"},
        "function": {
            "type": "object",
            "description": "name, and arguments as the text of a JSON object",
            "required": ["name", "arguments"],
            "properties": {
                "name": {"type": "string", "description": "of the function"},
                "arguments": {"type": "string", "description": "text of a JSON object"},
            },
        },
    },
}
MESSAGES_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_MESSAGES,
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": {"enum": list(ROLES), "description": "who speaks; `developer` is `system` for most templates"},
            "content": {
                "anyOf": [*text_schema(_PART)["anyOf"], {"type": "null"}],
                "description": "what is said; may be missing only where an assistant calls tools",
            },
            "name": {"type": "string", "description": "tells apart several of the same role, where a template does"},
            "tool_calls": {
                "type": "array",
                "items": _CALL_SCHEMA,
                "description": "of an assistant: calls that it made; an empty list is the same as none",
            },
            "tool_call_id": {"type": "string", "description": "of a tool, required: the call that this answers"},
            "reasoning_content": {"type": "string", "description": "of an assistant: thoughts, where a template asks"},
        },
    },
}


def check_ending(body: WireModel, *, opens: bool, continues: bool) -> None:
    """``add_generation_prompt`` is true where nobody says so, and gives way. Raises BodyError where a client does."""
    if opens and continues and "add_generation_prompt" in body.model_fields_set:
        what = "'continue_final_message' and 'add_generation_prompt' may not both be true"
        raise BodyError(what, "continue_final_message")


def check_messages(value: Any) -> list[Message]:
    """The messages with text parts joined and nothing in them that is not known. Raises BodyError."""
    if not isinstance(value, list):
        raise BodyError("'messages' should be a list of objects", "messages")
    if not 1 <= len(value) <= MAX_MESSAGES:
        raise BodyError(f"'messages' should hold 1 to {MAX_MESSAGES} messages", "messages")
    messages = [_check_message(message, f"messages[{i}]") for i, message in enumerate(value)]
    if sum(len(message["content"] or "") for message in messages) > MAX_MESSAGE_CHARACTERS:
        raise BodyError(f"'messages' should hold at most {MAX_MESSAGE_CHARACTERS} characters", "messages")
    return messages


def _check_message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise BodyError(f"'{where}' should be an object", where)
    value = {key: item for key, item in value.items() if item is not None}
    # what other servers answer where nothing is called, and clients send back
    if value.get("tool_calls") == []:
        del value["tool_calls"]
    role = value.get("role")
    if role not in ROLES:
        raise BodyError(f"'{where}.role' should be one of {', '.join(ROLES)}", f"{where}.role")
    for field in _UNSUPPORTED:
        if field in value:
            raise BodyError(f"'{where}.{field}' is not supported by this server; leave it out", f"{where}.{field}")
    message: Message = {"role": role, "content": _check_content(value, role, where)}
    _copy_text(value, message, "name", where, MAX_NAME_CHARACTERS)
    if role == "assistant":
        _copy_text(value, message, "reasoning_content", where, MAX_MESSAGE_CHARACTERS)
        if "tool_calls" in value:
            message["tool_calls"] = check_tool_calls(value["tool_calls"], f"{where}.tool_calls")
    elif role == "tool":
        _copy_text(value, message, "tool_call_id", where, MAX_NAME_CHARACTERS)
        if "tool_call_id" not in message:
            raise BodyError(f"'{where}.tool_call_id' is required", f"{where}.tool_call_id")
    return message


def _copy_text(value: Message, message: Message, field: str, where: str, most_characters: int) -> None:
    text = value.get(field)
    if text is None:
        return
    if not isinstance(text, str) or len(text) > most_characters:
        where += f".{field}"
        raise BodyError(f"'{where}' should be a string of at most {most_characters} characters", where)
    message[field] = text


def _check_content(value: Message, role: str, where: str) -> str | None:
    if value.get("content") is not None:
        return check_text(value["content"], f"{where}.content", _PART)
    if role == "assistant" and "tool_calls" in value:
        return None
    raise BodyError(f"'{where}.content' is required", f"{where}.content")


def check_text(value: Any, where: str, *kinds: str) -> str:
    """A string, or parts of these kinds, joined. ``where`` it stands is told by BodyError."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise BodyError(f"'{where}' should be a string or a list of text parts", where)
    if not 1 <= len(value) <= MAX_PARTS:
        raise BodyError(f"'{where}' should hold 1 to {MAX_PARTS} parts", where)
    return "\n".join([_part_text(part, f"{where}[{i}]", kinds) for i, part in enumerate(value)])


def _part_text(part: Any, where: str, kinds: tuple[str, ...]) -> str:
    if not isinstance(part, dict):
        raise BodyError(f"'{where}' should be an object", where)
    kind = part.get("type")
    if kind not in kinds:
        is_name = isinstance(kind, str) and kind.isidentifier() and len(kind) < 32
        told, known = f"a part of type '{kind}'" if is_name else "this", "' or '".join(kinds)
        raise BodyError(f"'{where}' should be of type '{known}'; {told} is not supported", where)
    text = part.get("text")
    if not isinstance(text, str):
        raise BodyError(f"'{where}.text' should be a string", f"{where}.text")
    return text
