"""Whole answers over a scripted engine: their fields, their choices, the prompt before them."""

from __future__ import annotations

import asyncio

import pytest

from app.serving.completions import CompletionService
from tests.fakes import FakeEngine
from tests.serving.completing import TOKENIZERS, complete

pytestmark = pytest.mark.anyio


async def test_a_whole_answer(service: CompletionService, engine: FakeEngine) -> None:
    answer = await complete(service, max_tokens=5)
    assert answer["id"] == "cmpl-r"
    assert answer["object"] == "text_completion"
    assert answer["model"] == "fox"
    assert answer["system_fingerprint"].startswith("fp_")
    assert answer["choices"] == [
        {
            "index": 0,
            "text": "the dogthe dogthe",
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 5,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert not engine.live


async def test_choices_are_ordered_by_prompt_and_sample(service: CompletionService) -> None:
    answer = await complete(service, prompt=["the dog", "a fox"], n=2, max_tokens=1)
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "the"),
        (1, " dog"),
        (2, "a"),
        (3, " fox"),
    ]
    assert answer["usage"]["prompt_tokens"] == 2 + len(TOKENIZERS["byte_level"].encode("a fox"))
    assert answer["usage"]["completion_tokens"] == 4


async def test_echo_without_output(service: CompletionService) -> None:
    (choice,) = (await complete(service, echo=True, max_tokens=0))["choices"]
    assert (choice["text"], choice["logprobs"]) == ("the dog", None)


@pytest.mark.parametrize("num_tokens", [1, 2])
async def test_echo_of_a_short_prompt_of_ids(service: CompletionService, num_tokens: int) -> None:
    ids = TOKENIZERS["byte_level"].encode("the dog")[:num_tokens]
    (choice,) = (await complete(service, prompt=ids, echo=True, max_tokens=1, logprobs=0))["choices"]
    assert choice["text"] == ["thethe", "the dogthe"][num_tokens - 1]
    assert choice["logprobs"]["token_logprobs"] == [None] + [-0.5] * num_tokens


async def test_many_requests_do_not_mix(service: CompletionService, engine: FakeEngine) -> None:
    words = ["the", "dog", "fox", "lazy", "quick"]
    answers = await asyncio.gather(*(complete(service, prompt=word, max_tokens=20) for word in words))
    for word, answer in zip(words, answers, strict=True):
        assert answer["choices"][0]["text"].startswith(word)
    assert len({request.request_id for request in engine.requests}) == len(words)
