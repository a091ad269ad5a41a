"""What ends a completion: end-of-text, stop tokens, stop strings; and what of them is shown."""

from __future__ import annotations

import pytest

from app.serving.completions import CompletionService
from tests.fakes import FakeEngine
from tests.serving.completing import TOKENIZERS, chunks, complete, join, says
from tests.serving.conftest import EOS

pytestmark = pytest.mark.anyio


async def test_end_of_text_is_no_stop_reason(service: CompletionService, engine: FakeEngine) -> None:
    engine.script = says("a fox")
    answer = await complete(service, logprobs=0)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("a fox", "stop", None)
    assert choice["logprobs"]["tokens"][-1] == EOS
    assert choice["logprobs"]["text_offset"][-1] == len("a fox")
    assert answer["usage"]["completion_tokens"] == len(choice["logprobs"]["tokens"])


async def test_end_of_text_can_be_ignored_and_shown(service: CompletionService, engine: FakeEngine) -> None:
    engine.script = says("a fox")
    fields = {"max_tokens": 8, "ignore_eos": True}
    assert (await complete(service, **fields))["choices"][0]["text"] == "a fox"
    (choice,) = (await complete(service, **fields, skip_special_tokens=False))["choices"]
    assert choice["text"].startswith("a fox" + EOS)
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize(("include", "text"), [(False, "the"), (True, "the dog")])
async def test_a_stop_token_is_cut_unless_wanted(service: CompletionService, include: bool, text: str) -> None:
    stop = TOKENIZERS["byte_level"].encode(" dog")
    assert len(stop) == 1
    answer = await complete(service, stop_token_ids=stop, include_stop_str_in_output=include)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text, "stop", stop[0])
    assert answer["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(("include", "text"), [(False, "th"), (True, "the do")])
async def test_a_stop_string_across_tokens(
    service: CompletionService, engine: FakeEngine, include: bool, text: str
) -> None:
    answer = await complete(service, stop=["e do", "zzz"], include_stop_str_in_output=include, logprobs=1, max_tokens=9)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text, "stop", "e do")
    assert answer["usage"]["completion_tokens"] == 2
    assert choice["logprobs"]["text_offset"] == [0, min(3, len(text))]
    assert not engine.live
    assert {sample for _, sample in engine.aborted} == {0}


async def test_a_stop_string_ends_one_sample_alone(service: CompletionService, engine: FakeEngine) -> None:
    engine.script = says("the quick brown fox", "over the lazy dog")
    answer = await complete(service, n=2, stop="quick", max_tokens=30)
    assert [choice["text"] for choice in answer["choices"]] == ["the ", "over the lazy dog"]
    assert [sample for _, sample in engine.aborted] == [0]


async def test_a_stop_string_that_ends_with_the_last_token_aborts_nothing(
    service: CompletionService, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    aborted: list[int] = []
    monkeypatch.setattr(engine, "abort_sample", lambda _, sample: aborted.append(sample))
    (choice,) = (await complete(service, stop="dog", max_tokens=2))["choices"]
    assert (choice["text"], choice["finish_reason"], aborted) == ("the ", "stop", [])
    await complete(service, stop="dog", max_tokens=3)
    assert aborted == [0]


async def test_a_held_back_end_is_given_in_the_end(service: CompletionService, engine: FakeEngine) -> None:
    engine.script = says("a fox")
    assert (await complete(service, stop="foxes"))["choices"][0]["text"] == "a fox"
    parts = await chunks(service, stop="foxes")
    assert join(parts, 1)[0]["text"] == "a fox"
    assert "x" not in "".join(part["choices"][0]["text"] for part in parts[:-1])


async def test_a_stop_string_in_the_prompt_does_not_count(service: CompletionService) -> None:
    (choice,) = (await complete(service, echo=True, stop="dogthe", max_tokens=5))["choices"]
    # "dog" ends the prompt and "the" begins the output
    assert (choice["text"], choice["finish_reason"]) == ("the dogthe ", "stop")


async def test_events_after_the_end_change_nothing(service: CompletionService, engine: FakeEngine) -> None:
    # the engine goes on until it hears that a stop string was found
    engine.burst = 50
    answer = await complete(service, stop="dog", max_tokens=40)
    assert answer["choices"][0]["text"] == "the "
    assert answer["usage"]["completion_tokens"] == 2
