"""What a chat request may say, and how it is told what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from app.schemas.chat import ChatRequest
from app.schemas.json import BodyError
from app.schemas.messages import MAX_MESSAGES, MAX_PARTS
from app.schemas.tools import MAX_TOOL_CHARACTERS, MAX_TOOLS
from app.schemas.wire import parse_body

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def parse(**fields: Any) -> ChatRequest:
    return parse_body(ChatRequest, json.dumps({"messages": [USER], **fields}).encode())


def test_defaults() -> None:
    body = parse()
    assert body.messages == [USER]
    assert (body.max_tokens, body.max_completion_tokens, body.logprobs, body.n) == (None, None, False, 1)
    assert body.add_generation_prompt
    assert not body.continue_final_message


def test_messages_in_one_form() -> None:
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "n"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "audio": None, "other": 1},
        {"role": "tool", "content": "x", "tool_call_id": "c"},
        {"role": "developer", "content": ""},
        {"role": "assistant", "content": "y", "tool_calls": []},
    ]
    assert parse(messages=messages).messages == [
        {"role": "system", "content": "a\nb", "name": "n"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "x", "tool_call_id": "c"},
        {"role": "developer", "content": ""},
        {"role": "assistant", "content": "y"},
    ]


def image(url: str = "https://x") -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}


@pytest.mark.parametrize(
    ("messages", "param", "words"),
    [
        ([], "messages", "1 to"),
        ("hi", "messages", "list of objects"),
        ([USER] * (MAX_MESSAGES + 1), "messages", "1 to"),
        (["hi"], "messages[0]", "an object"),
        ([USER, {"content": "a"}], "messages[1].role", "one of system"),
        ([{"role": "robot", "content": "a"}], "messages[0].role", "one of system"),
        ([{"role": ["user"], "content": "a"}], "messages[0].role", "one of system"),
        ([{"role": "user"}], "messages[0].content", "required"),
        ([{"role": "user", "content": None}], "messages[0].content", "required"),
        ([{"role": "assistant", "content": None}], "messages[0].content", "required"),
        ([{"role": "user", "content": 5}], "messages[0].content", "list of text parts"),
        ([{"role": "user", "content": []}], "messages[0].content", "1 to"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}] * (MAX_PARTS + 1)}],
            "messages[0].content",
            "1 to",
        ),
        ([{"role": "user", "content": ["a"]}], "messages[0].content[0]", "an object"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text", "a string"),
        ([image()], "messages[0].content[0]", "'image_url' is not supported"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "messages[0].content[0]", "'input_audio' is not"),
        ([{"role": "user", "content": [{"type": "<b>" * 99}]}], "messages[0].content[0]", "this is not supported"),
        ([{"role": "tool", "content": "a"}], "messages[0].tool_call_id", "required"),
        ([{"role": "tool", "content": "a", "tool_call_id": 5}], "messages[0].tool_call_id", "a string"),
        ([{"role": "user", "content": "a", "name": "x" * 257}], "messages[0].name", "at most 256"),
        ([{"role": "assistant", "content": "a", "function_call": {}}], "messages[0].function_call", "not supported"),
        ([{"role": "assistant", "content": "a", "audio": {"id": "x"}}], "messages[0].audio", "not supported"),
        ([{"role": "assistant", "tool_calls": []}], "messages[0].content", "required"),
        ([{"role": "assistant", "tool_calls": {}}], "messages[0].tool_calls", "1 to"),
        ([{"role": "assistant", "tool_calls": [{**CALL, "id": ""}]}], "messages[0].tool_calls[0].id", "1 to"),
        ([{"role": "assistant", "tool_calls": [{**CALL, "type": "x"}]}], "messages[0].tool_calls[0].type", "function"),
        (
            [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {}}}]}],
            "messages[0].tool_calls[0].function.arguments",
            "a string",
        ),
    ],
)
def test_messages_that_are_wrong(messages: Any, param: str, words: str) -> None:
    with pytest.raises(BodyError, match="^'messages") as error:
        parse(messages=messages)
    assert error.value.param == param
    assert words in error.value.message
    assert len(error.value.message) < 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL] * (MAX_TOOLS + 1)}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": 1}}]}, "tools[0].function.strict"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "description": "x" * MAX_TOOL_CHARACTERS}}]},
            "tools",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "any", "tools": [TOOL]}, "tool_choice"),
        ({"tool_choice": {"type": "function"}, "tools": [TOOL]}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]}, "tool_choice"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"messages": None}, "messages"),
    ],
)
def test_fields_that_are_wrong(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BodyError) as error:
        parse(**fields)
    assert error.value.param == param


def test_tools_that_may_be_called() -> None:
    tools = parse(tools=[{"type": "function", "function": {"name": "f", "description": None, "strict": True, "x": 1}}])
    assert tools.offered_tools == [{"type": "function", "function": {"name": "f"}}]
    assert parse(tools=[TOOL], tool_choice="none").offered_tools == []
    assert parse(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "f"}}).named_tool == "f"
    assert parse(tools=[], tool_choice="auto").named_tool is None
    assert parse(continue_final_message=True).continue_final_message
