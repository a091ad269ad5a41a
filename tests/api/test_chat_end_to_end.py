"""A conversation with the model that ships, behind the server that ships, for the official client."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.api.processes import Process, free_port
from tests.test_shipped_model import MODEL

MESSAGES: Any = [
    {"role": "system", "content": "You write Python."},
    {"role": "user", "content": "def add(a, b):"},
]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {
            "type": "object",
            "properties": {"word": {"enum": ["fox", "dog"]}},
            "required": ["word"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    port = free_port()
    process = Process(["-m", "app", str(MODEL), "--port", str(port), "--chat-template", "chatml"], port)
    process.wait_ready()
    with openai.OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0) as client:
        yield client
    process.kill()


def test_whole_and_streamed_are_equal(client: openai.OpenAI) -> None:
    fields: Any = {"model": MODEL.name, "messages": MESSAGES, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**fields)
    assert whole.usage is not None
    assert 0 < whole.usage.completion_tokens <= 24
    text = whole.choices[0].message.content
    assert text
    with client.chat.completions.stream(**fields) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
    assert "".join(deltas) == text


def test_control_tokens_are_tokens_only_where_the_template_writes_them(client: openai.OpenAI) -> None:
    def num_tokens(content: str) -> int:
        messages: Any = [{"role": "user", "content": content}]
        answer = client.chat.completions.create(model=MODEL.name, messages=messages, max_tokens=1)
        assert answer.usage is not None
        return answer.usage.prompt_tokens

    num_framing = num_tokens("x") - 1
    assert num_framing < 12
    assert num_tokens("<|im_end|>") > num_framing + 1


def test_a_forced_call(client: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "look_up"}}
    answer = client.chat.completions.create(
        model=MODEL.name, messages=MESSAGES, tools=[TOOL], tool_choice=named, max_tokens=200, temperature=0
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "look_up"
    assert json.loads(call.function.arguments)["word"] in ("fox", "dog")


def test_a_template_that_is_not_there(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "app", str(MODEL), "--chat-template", str(tmp_path / "none.jinja")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "--chat-template" in done.stderr
