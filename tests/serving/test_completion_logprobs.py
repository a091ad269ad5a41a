"""Log-probabilities of prompts and answers, as the form of completions has them."""

from __future__ import annotations

import pytest

from app.engine.request import TokenLogprobs
from app.serving.completions import CompletionService
from app.serving.logprobs import LogprobEntry, logprobs_object
from tests.fakes import FakeEngine
from tests.serving.completing import TOKENIZERS, chunks, complete, join, prepare

pytestmark = pytest.mark.anyio


async def test_logprobs(service: CompletionService) -> None:
    (choice,) = (await complete(service, logprobs=2, max_tokens=2))["choices"]
    after = [
        TOKENIZERS["byte_level"].id_to_token_text(token + 1)
        for token in prepare(service).prompts[0].request.prompt_token_ids
    ]
    assert choice["logprobs"] == {
        "tokens": ["the", " dog"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"the": -0.5, after[0]: -1.0}, {" dog": -0.5, after[1]: -1.0}],
        "text_offset": [0, 3],
    }


async def test_minus_infinity_and_a_drawn_token_beyond_the_likeliest(
    service: CompletionService, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    logprobs = TokenLogprobs(float("-inf"), ((5, -0.1),))
    monkeypatch.setattr("tests.fakes.fake_logprobs", lambda *_: logprobs)
    engine.script = lambda *_: [6, 6]
    (choice,) = (await complete(service, logprobs=1, max_tokens=1))["choices"]
    text_of = TOKENIZERS["byte_level"].id_to_token_text
    assert choice["logprobs"]["token_logprobs"] == [-9999.0]
    assert choice["logprobs"]["top_logprobs"] == [{text_of(5): -0.1, text_of(6): -9999.0}]


def test_of_tokens_that_look_alike_the_likeliest_is_shown() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    (letter,) = (token for token in range(259, tokenizer.vocab_size) if tokenizer.id_to_token_text(token) == "a")
    byte = 3 + ord("a")
    entry = LogprobEntry(byte, 0, TokenLogprobs(-3.0, ((letter, -0.1), (byte, -3.0))))
    assert logprobs_object([entry], tokenizer.id_to_token_text, 1)["top_logprobs"] == [{"a": -0.1}]


async def test_scoring_a_prompt(service: CompletionService) -> None:
    answer = await complete(service, prompt="a \u2603 dog", echo=True, max_tokens=0, logprobs=1, n=2)
    ids = TOKENIZERS["byte_level"].encode("a \u2603 dog")
    for choice in answer["choices"]:
        assert (choice["text"], choice["finish_reason"]) == ("a \u2603 dog", "length")
        logprobs = choice["logprobs"]
        assert logprobs["tokens"] == [TOKENIZERS["byte_level"].id_to_token_text(token) for token in ids]
        assert logprobs["token_logprobs"] == [None] + [-0.5] * (len(ids) - 1)
        assert logprobs["top_logprobs"][0] is None
        assert all(logprobs["top_logprobs"][1:])
        assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    assert answer["usage"]["completion_tokens"] == 0


async def test_log_probabilities_wait_for_text_that_is_held_back(service: CompletionService) -> None:
    fields = {"stop": "the dogs", "logprobs": 0, "max_tokens": 4}
    parts = await chunks(service, **fields)
    assert [part["choices"][0]["text"] for part in parts] == ["the dog", "the dog"]
    assert [part["choices"][0]["logprobs"]["text_offset"] for part in parts] == [[0, 3], [7, 10]]
    assert join(parts, 1) == (await complete(service, **fields))["choices"]
