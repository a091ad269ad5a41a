"""What is wrong with a body, told in the words of JSON: pydantic's own name classes and are about Python."""

from __future__ import annotations

from typing import Any

import pytest

from app.schemas.anthropic import MessagesRequest
from app.schemas.completions import CompletionRequest
from app.schemas.json import BodyError
from app.schemas.responses import ResponsesRequest
from app.schemas.wire import WireModel, check_body

NEEDED: dict[type[WireModel], dict[str, Any]] = {
    CompletionRequest: {"prompt": "x"},
    ResponsesRequest: {"input": "x"},
    MessagesRequest: {"max_tokens": 1, "messages": [{"role": "user", "content": "x"}]},
}


@pytest.mark.parametrize(
    ("model", "field", "value", "message"),
    [
        (ResponsesRequest, "text", "json", "'text' should be an object"),
        (ResponsesRequest, "text", {"format": []}, "'text.format' should be an object"),
        (ResponsesRequest, "previous_response_id", "", "'previous_response_id' should have at least 1 character"),
        (CompletionRequest, "stream_options", 1, "'stream_options' should be an object"),
        (CompletionRequest, "response_format", "json", "'response_format' should be an object"),
        (CompletionRequest, "cache_salt", "x" * 257, "'cache_salt' should have at most 256 characters"),
        (CompletionRequest, "temperature", "0", "'temperature' should be a valid number"),
        (MessagesRequest, "stop_sequences", ["a"] * 5, "'stop_sequences' should have at most 4 items"),
        (MessagesRequest, "stop_sequences", ["a", ""], "'stop_sequences[1]' should have at least 1 character"),
    ],
)
def test_the_message_is_about_json(model: type[WireModel], field: str, value: Any, message: str) -> None:
    with pytest.raises(BodyError) as caught:
        check_body(model, {**NEEDED[model], field: value})
    assert caught.value.message == message
    assert caught.value.param == message.split("'")[1]
