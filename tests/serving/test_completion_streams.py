"""Streams amount to the whole answer, chunk by chunk, and wait while nobody reads."""

from __future__ import annotations

import asyncio
import codecs
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.serving.completions import CompletionService
from tests.fakes import FakeEngine, make_info
from tests.serving.completing import TOKENIZERS, Writes, check_shape, chunks, complete, join, prepare
from tests.serving.test_stops import cut

pytestmark = pytest.mark.anyio


async def test_the_first_chunk_of_each_choice_starts_with_the_prompt(service: CompletionService) -> None:
    parts = await chunks(service, prompt=["the dog", "a fox"], echo=True, n=2, max_tokens=3)
    for index in range(4):
        first = next(part for part in parts if part["choices"][0]["index"] == index)
        assert first["choices"][0]["text"].startswith(["the dog", "a fox"][index // 2])


async def test_chunks_have_one_choice_and_the_head_of_the_answer(service: CompletionService) -> None:
    parts = await chunks(service, n=2, max_tokens=3)
    assert len(parts) == 6
    for part in parts:
        check_shape(part)
        assert len(part["choices"]) == 1
        assert set(part) == {"id", "object", "created", "model", "system_fingerprint", "choices"}
    assert len({(part["id"], part["created"], part["system_fingerprint"]) for part in parts}) == 1
    # choices interleave
    assert [part["choices"][0]["index"] for part in parts] == [0, 1] * 3


async def test_tokens_that_wait_come_in_one_chunk(service: CompletionService, engine: FakeEngine) -> None:
    engine.burst = 4
    parts = await chunks(service, max_tokens=8)
    assert [part["choices"][0]["text"] for part in parts] == ["the dogthe dog"] * 2


async def test_usage_in_streams(service: CompletionService) -> None:
    *parts, last = await chunks(service, n=2, max_tokens=2, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"] == (await complete(service, n=2, max_tokens=2))["usage"]
    assert not any("usage" in part for part in parts)
    options = {"include_usage": True, "continuous_usage_stats": True}
    every = await chunks(service, max_tokens=3, stream_options=options)
    assert [part["usage"]["completion_tokens"] for part in every] == [1, 2, 3, 3]
    without = await chunks(service, max_tokens=3, stream_options={"continuous_usage_stats": True})
    assert not any("usage" in part for part in without)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(TOKENIZERS)),
    prompt=st.text("ab \u20ac\U0001f642", min_size=1, max_size=5)
    | st.lists(st.integers(3, 290), min_size=1, max_size=5),
    outputs=st.lists(
        st.lists(st.integers(0, 290), max_size=12) | st.text("ab \u20ac", max_size=12), min_size=1, max_size=3
    ),
    stops=st.lists(st.text("ab \u20ac\ufffd", min_size=1, max_size=3), max_size=3),
    burst=st.integers(1, 4),
    logprobs=st.none() | st.integers(0, 2),
    echo=st.booleans(),
    include=st.booleans(),
    skip=st.booleans(),
    twice=st.booleans(),
)
def test_a_stream_amounts_to_the_whole_answer(
    kind: str,
    prompt: str | list[int],
    outputs: list[list[int] | str],
    stops: list[str],
    burst: int,
    logprobs: int | None,
    echo: bool,
    include: bool,
    skip: bool,
    twice: bool,
) -> None:
    tokenizer = TOKENIZERS[kind]
    eos = max(tokenizer.special_ids)
    scripts = [tokenizer.encode(output) if isinstance(output, str) else output for output in outputs]
    engine = FakeEngine(make_info(tokenizer.vocab_size, (eos,)), lambda _, k: scripts[k])
    service = CompletionService(engine, tokenizer, ["fox"])
    prompts = [prompt, prompt] if twice else prompt
    fields = {
        "prompt": prompts,
        "n": len(outputs),
        "max_tokens": 10,
        "stop": stops,
        "logprobs": logprobs,
        "echo": echo,
        "include_stop_str_in_output": include,
        "skip_special_tokens": skip,
    }

    async def run() -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
        unstopped = await complete(service, **{**fields, "stop": []})
        whole = await complete(service, **fields)
        engine.burst = burst
        return whole, await chunks(service, **fields), unstopped

    whole, parts, unstopped = asyncio.run(run())
    assert join(parts, len(whole["choices"])) == whole["choices"]
    assert not engine.live
    for choice, full in zip(whole["choices"], unstopped["choices"], strict=True):
        start = len(prepare(service, **fields).prompts[0].echo_text)
        if not (include and full["finish_reason"] == "stop"):
            text, stop = cut(full["text"][start:], stops, include=include)
            assert choice["text"][start:] == text
            assert choice["stop_reason"] == stop
        check_offsets(choice)
        if kind == "byte_level" and isinstance(prompt, str) and not include:
            script = scripts[choice["index"] % len(scripts)][:10]
            ids = script[: script.index(eos)] if eos in script else script
            assert tokenizer.token_bytes is not None
            data = b"".join(tokenizer.token_bytes[token] for token in ids)
            # the beginning of a character at the end is no text
            assert full["text"][start:] == codecs.getincrementaldecoder("utf-8")("replace").decode(data)


def check_offsets(choice: dict[str, Any]) -> None:
    if choice["logprobs"] is None:
        return
    lists = choice["logprobs"]
    assert len({len(values) for values in lists.values()}) == 1
    offsets = [*lists["text_offset"], len(choice["text"])]
    assert offsets == sorted(offsets)


async def test_text_waits_while_the_outlet_is_blocked(service: CompletionService, engine: FakeEngine) -> None:
    writes = Writes(is_blocked=True)
    run = service.stream(prepare(service, max_tokens=6, n=2, stream=True), writes)
    while engine.live:
        await anyio.sleep(0.001)
    assert not writes.batches
    assert not run.done.done()
    writes.is_blocked = False
    run.resume()
    assert writes.texts == ["the dog" * 3, " dogthe" * 3]
    assert [len(batch) for batch in writes.batches] == [2]
    assert writes.is_complete
    assert run.done.done()
    run.close()
