"""The contract of what stands inside messages, tools and items, which are checked by hand."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
from pydantic import BaseModel

from app.api.app import document
from app.api.openapi import BODIES
from app.serving.chat_template import ChatTemplate, TemplateSource
from scripts.json_schema import fields_of
from tests.api.conftest import Serve
from tests.api.test_fields import KINDS, Changes, NoEffect, Refused, ask

# writes down everything that it is given
TEMPLATE = ChatTemplate(
    TemplateSource(
        {
            "default": "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
            "{% for m in messages %}[{{ m.role }}|{{ m.name }}|{{ m.tool_call_id }}|{{ m.reasoning_content }}]"
            "{{ m.content or '' }}{% for call in m.tool_calls or [] %}"
            "{{ call.id }}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}"
        }
    )
)

FUNCTION = {"name": "f", "description": "a", "parameters": {"type": "object"}, "strict": False}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
MESSAGES = [
    {"role": "user", "content": [{"type": "text", "text": "a"}], "name": "me"},
    {"role": "assistant", "content": "b", "tool_calls": [CALL], "reasoning_content": "c"},
    {"role": "tool", "content": "d", "tool_call_id": "a"},
]
ITEMS = [
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
    {"type": "function_call", "call_id": "a", "name": "f", "arguments": '{"a": 1}'},
    {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "a"}]},
]

# what is put in the place of the first field of this name
MESSAGE_FIELDS: dict[str, Changes] = {
    "messages[].role": Changes("system"),
    "messages[].content": Changes("other"),
    "messages[].content[].type": Refused("image_url"),
    "messages[].content[].text": Changes("other"),
    "messages[].name": Changes("other"),
    "messages[].tool_calls": Changes([CALL, CALL]),
    "messages[].tool_calls[].id": Changes("other"),
    "messages[].tool_calls[].type": Refused("other"),
    "messages[].tool_calls[].function": Changes({"name": "g", "arguments": "{}"}),
    "messages[].tool_calls[].function.name": Changes("other"),
    "messages[].tool_calls[].function.arguments": Changes('{"a": 200}'),
    "messages[].tool_call_id": Changes("other"),
    "messages[].reasoning_content": Changes("other"),
}
FUNCTION_FIELDS: dict[str, Changes] = {
    "name": Changes("other"),
    "description": Changes("other"),
    "parameters": Changes({"type": "object", "properties": {}}),
    "strict": NoEffect(True),
}
TOOL_FIELDS: dict[str, Changes] = {
    "tools[].type": Refused("other"),
    "tools[].function": Changes({"name": "g"}),
    **{f"tools[].function.{name}": case for name, case in FUNCTION_FIELDS.items()},
}
TOOL = {"type": "function", "function": FUNCTION}
TOOLS = [TOOL, {"type": "function", "function": {"name": "other"}}]
RESPONSE_TOOLS = [{"type": "function", **tool["function"]} for tool in TOOLS]  # type: ignore[dict-item]

# of each kind of request: one that has all of them, and what stands in their places
INNER: dict[str, tuple[dict[str, Any], dict[str, Changes]]] = {
    "ChatRequest": (
        {"messages": MESSAGES, "tools": [TOOL], "max_tokens": 8, "seed": 1},
        {**MESSAGE_FIELDS, **TOOL_FIELDS},
    ),
    "ResponsesRequest": (
        {"input": ITEMS, "tools": RESPONSE_TOOLS[:1], "max_output_tokens": 8, "seed": 1},
        {
            "input[].type": Refused("other"),
            "input[].role": Changes("system"),
            "input[].content": Changes("other"),
            "input[].content[].type": Refused("input_image"),
            "input[].content[].text": Changes("other"),
            "input[].call_id": Changes("other"),
            "input[].name": Changes("other"),
            "input[].arguments": Changes('{"a": 2}'),
            "input[].output": Changes("other"),
            "input[].output[].type": Refused("input_image"),
            "input[].output[].text": Changes("other"),
            "tools[].type": Refused("other"),
            **{f"tools[].{name}": case for name, case in FUNCTION_FIELDS.items()},
            # told in the answer
            "tools[].strict": Changes(True),
        },
    ),
    "MessagesRequest": (
        {"messages": MESSAGES, "system": [{"type": "text", "text": "a"}], "max_tokens": 8},
        {**MESSAGE_FIELDS, "system[].type": Refused("image"), "system[].text": Changes("other")},
    ),
    "CountTokensRequest": (
        {"messages": MESSAGES, "system": [{"type": "text", "text": "a"}]},
        {**MESSAGE_FIELDS, "system[].type": Refused("image"), "system[].text": Changes("other words")},
    ),
    "TokenizeRequest": ({"messages": MESSAGES, "tools": [TOOL]}, {**MESSAGE_FIELDS, **TOOL_FIELDS}),
}
# which of two tools is to be called
CHOICES: dict[str, tuple[dict[str, Any], dict[str, Changes]]] = {
    "ChatRequest": (
        {
            "messages": MESSAGES[:1],
            "tools": TOOLS,
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "max_tokens": 8,
            "seed": 1,
        },
        {
            "tool_choice.type": Refused("other"),
            "tool_choice.function": Changes({"name": "other"}),
            "tool_choice.function.name": Changes("other"),
        },
    ),
    "ResponsesRequest": (
        {
            "input": "a",
            "tools": RESPONSE_TOOLS,
            "tool_choice": {"type": "function", "name": "f"},
            "max_output_tokens": 8,
            "seed": 1,
        },
        {"tool_choice.type": Refused("other"), "tool_choice.name": Changes("other")},
    ),
}
CASES = [(model, *entry) for table in (INNER, CHOICES) for model, entry in table.items()]
PATHS = {model.__name__: kind.path for model, kind in KINDS.items()}


def put(place: Any, name: str, value: Any) -> bool:
    """Put the value in the first place where ``messages[].content[].text`` stands; whether there is one."""
    key, _, rest = name.partition(".")
    inner = place.get(key.removesuffix("[]")) if isinstance(place, dict) else None
    if inner is None:
        return False
    if not rest:
        place[key] = value
        return True
    if not key.endswith("[]"):
        return put(inner, rest, value)
    return isinstance(inner, list) and any(put(item, rest, value) for item in inner)


@pytest.mark.parametrize("model", BODIES, ids=lambda model: model.__name__)
def test_every_inner_field_is_here(app_schemas: dict[str, Any], model: type[BaseModel]) -> None:
    told = {field.name for field in fields_of(app_schemas[model.__name__], app_schemas)} - set(KINDS[model].fields)
    tables = [table[model.__name__][1] for table in (INNER, CHOICES) if model.__name__ in table]
    assert {name for table in tables for name in table} == told


@pytest.mark.anyio
@pytest.mark.parametrize(("model", "body", "cases"), CASES, ids=[model for model, *_ in CASES])
async def test_inner_fields_do_what_they_say(
    serve: Serve, app_schemas: dict[str, Any], model: str, body: dict[str, Any], cases: dict[str, Changes]
) -> None:
    meanings = {field.name: field.description for field in fields_of(app_schemas[model], app_schemas)}
    async with serve(template=TEMPLATE) as server:
        status, *plain = await ask(server, PATHS[model], body)
        assert status == 200, plain
        assert await ask(server, PATHS[model], body) == (200, *plain)
        for name, case in cases.items():
            changed_body = copy.deepcopy(body)
            assert put(changed_body, name, case.value), name
            status, *changed = await ask(server, PATHS[model], changed_body)
            if isinstance(case, Refused):
                assert status == 400, name
                place = re.split(r"[.\[]", name)[0]
                assert re.match(rf"{place}\b", json.loads(changed[0][0])["error"]["param"]), name
                continue
            assert status == 200, (name, changed)
            if isinstance(case, NoEffect):
                assert changed == plain, name
                assert case.words in meanings[name]
            else:
                assert changed != plain, name


@pytest.fixture(scope="module")
def app_schemas() -> dict[str, Any]:
    schemas: dict[str, Any] = document()["components"]["schemas"]
    return schemas
