"""Completions over a scripted engine: whole answers, streams, ends, failures, and rows that are always freed."""

from __future__ import annotations

import asyncio
import codecs
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.engine.interface import EngineStatus, SampleSink
from app.engine.request import GenerationRequest, TokenLogprobs
from app.schemas.completions import Completion, CompletionRequest
from app.serving.completions import CompletionService
from app.serving.errors import RequestError, ServerFailure, Unavailable
from app.serving.logprobs import LogprobEntry, logprobs_object
from app.serving.parsing import parse_request
from app.serving.prepared import PreparedCompletion
from app.serving.tokenizer import Tokenizer
from tests.fakes import FakeEngine, make_info
from tests.serving.conftest import EOS, make_byte_fallback, train_byte_level
from tests.serving.test_stops import cut

pytestmark = pytest.mark.anyio
TOKENIZERS = {"byte_level": Tokenizer(train_byte_level()), "byte_fallback": Tokenizer(make_byte_fallback())}


def prepare(service: CompletionService, **fields: Any) -> PreparedCompletion:
    return service.job(parse_request(CompletionRequest, json.dumps({"prompt": "the dog", **fields}).encode())).prepare(
        "r"
    )


async def complete(service: CompletionService, observer: Any = None, **fields: Any) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(await service.complete(prepare(service, **fields), observer))
    check_shape(answer)
    return answer


def check_shape(answer: dict[str, Any]) -> None:
    """An answer has the documented fields and no others."""
    assert Completion.model_validate(answer, strict=True).model_dump(exclude_unset=True) == answer


@dataclass
class Writes:
    """An outlet that keeps what was written."""

    frame: tuple[bytes, bytes] = (b"chunk ", b"\n")
    is_blocked: bool = False
    is_complete: bool = False
    batches: list[list[dict[str, Any]]] = field(default_factory=list)

    def write(self, chunks: bytes, *, is_last: bool) -> None:
        assert not self.is_blocked
        assert not self.is_complete
        self.is_complete = is_last
        # JSON escapes line breaks
        *lines, rest = chunks.split(b"\n")
        assert lines
        assert rest == b""
        assert all(line.startswith(b"chunk {") for line in lines)
        self.batches.append([json.loads(line.removeprefix(b"chunk ")) for line in lines])

    @property
    def chunks(self) -> list[dict[str, Any]]:
        return [chunk for batch in self.batches for chunk in batch]

    @property
    def texts(self) -> list[str]:
        return [choice["text"] for chunk in self.chunks for choice in chunk["choices"]]


async def stream(service: CompletionService, writes: Writes, observer: Any = None, **fields: Any) -> None:
    """Write a stream to its end. Raises what it ends with."""
    with closing(service.stream(prepare(service, stream=True, **fields), writes, observer)) as run:
        await run.done
        run.check()
        assert writes.is_complete


async def chunks(service: CompletionService, **fields: Any) -> list[dict[str, Any]]:
    writes = Writes()
    await stream(service, writes, **fields)
    return writes.chunks


def join(parts: Iterable[dict[str, Any]], num_choices: int) -> list[dict[str, Any]]:
    """The choices of the whole answer that a stream amounts to."""
    choices: list[dict[str, Any]] = [{"index": i, "text": "", "logprobs": None} for i in range(num_choices)]
    for part in parts:
        for piece in part["choices"]:
            choice = choices[piece["index"]]
            assert choice.get("finish_reason") is None, "a chunk after the end"
            choice["text"] += piece["text"]
            for name, values in (piece["logprobs"] or {}).items():
                choice["logprobs"] = choice["logprobs"] or {}
                choice["logprobs"][name] = choice["logprobs"].get(name, []) + values
            choice |= {"finish_reason": piece["finish_reason"], "stop_reason": piece["stop_reason"]}
    return choices


def says(*texts: str) -> Callable[[GenerationRequest, int], list[int]]:
    """A script: sample k says text k and then ends."""
    return lambda _, sample: TOKENIZERS["byte_level"].encode(texts[sample % len(texts)])


@dataclass
class Notes:
    """An observer that keeps what it was told."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def on_first_token(self, seconds: float) -> None:
        assert seconds >= 0
        self.calls.append(("first",))

    def on_gaps(self, num_gaps: int, seconds: float) -> None:
        assert seconds > 0
        self.calls.append(("gaps", num_gaps))

    def on_finish(self, reason: str, prompt_tokens: int, generated_tokens: int, seconds: float) -> None:
        assert seconds >= 0
        self.calls.append(("finish", reason, prompt_tokens, generated_tokens))


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


async def test_echo_without_output(service: CompletionService) -> None:
    (choice,) = (await complete(service, echo=True, max_tokens=0))["choices"]
    assert (choice["text"], choice["logprobs"]) == ("the dog", None)


@pytest.mark.parametrize("num_tokens", [1, 2])
async def test_echo_of_a_short_prompt_of_ids(service: CompletionService, num_tokens: int) -> None:
    ids = TOKENIZERS["byte_level"].encode("the dog")[:num_tokens]
    (choice,) = (await complete(service, prompt=ids, echo=True, max_tokens=1, logprobs=0))["choices"]
    assert choice["text"] == ["thethe", "the dogthe"][num_tokens - 1]
    assert choice["logprobs"]["token_logprobs"] == [None] + [-0.5] * num_tokens


async def test_log_probabilities_wait_for_text_that_is_held_back(service: CompletionService) -> None:
    fields = {"stop": "the dogs", "logprobs": 0, "max_tokens": 4}
    parts = await chunks(service, **fields)
    assert [part["choices"][0]["text"] for part in parts] == ["the dog", "the dog"]
    assert [part["choices"][0]["logprobs"]["text_offset"] for part in parts] == [[0, 3], [7, 10]]
    assert join(parts, 1) == (await complete(service, **fields))["choices"]


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


@pytest.mark.parametrize(("failure", "kind"), [("error", ServerFailure), ("abort", Unavailable), ("died", Unavailable)])
async def test_a_failure_is_not_followed_by_usage(
    service: CompletionService, engine: FakeEngine, failure: str, kind: type[RequestError]
) -> None:
    engine.fail_at, engine.failure = 2, failure
    writes = Writes()
    with pytest.raises(kind):
        await stream(service, writes, prompt="the dog", stream_options={"include_usage": True})
    assert not any("usage" in chunk for chunk in writes.chunks)


@pytest.mark.parametrize(("failure", "kind"), [("error", ServerFailure), ("abort", Unavailable), ("died", Unavailable)])
async def test_failures_come_after_the_text_before_them(
    service: CompletionService, engine: FakeEngine, failure: str, kind: type[RequestError]
) -> None:
    notes = Notes()
    engine.fail_at, engine.failure = 2, failure
    writes = Writes()
    with pytest.raises(kind):
        await stream(service, writes, notes, prompt=["the dog", "a fox"])
    assert "the" in writes.texts
    with pytest.raises(kind):
        await complete(service, notes)
    assert not engine.live
    assert [call[:2] for call in notes.calls if call[0] == "finish"] == [("finish", "error")] * 2


async def test_an_engine_that_takes_no_requests(service: CompletionService, engine: FakeEngine) -> None:
    prepared = prepare(service)
    engine.status = EngineStatus.RESTARTING
    with pytest.raises(Unavailable) as caught:
        await service.complete(prepared)
    assert caught.value.retry_after is not None
    with pytest.raises(Unavailable):
        service.stream(prepared, Writes())


async def test_an_engine_that_takes_only_the_first_prompt(
    service: CompletionService, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = engine.submit

    def submit_once(request: GenerationRequest, sinks: Sequence[SampleSink]) -> None:
        submit(request, sinks)
        engine.status = EngineStatus.RESTARTING

    monkeypatch.setattr(engine, "submit", submit_once)
    with pytest.raises(Unavailable):
        service.stream(prepare(service, prompt=["a", "b"]), Writes())
    assert not engine.live


@pytest.mark.parametrize("prompt", ["the dog", ["the dog", "a fox"]])
async def test_cancelling_frees_the_rows(service: CompletionService, engine: FakeEngine, prompt: Any) -> None:
    notes = Notes()
    engine.delay = 0.005
    for is_stream in (False, True):
        with anyio.move_on_after(0.05) as scope:
            if is_stream:
                await stream(service, Writes(), notes, prompt=prompt, max_tokens=10**6)
            else:
                await complete(service, notes, prompt=prompt, max_tokens=10**6)
        assert scope.cancelled_caught
        assert not engine.live
    assert [call[1] for call in notes.calls if call[0] == "finish"] == ["abort", "abort"]


async def test_a_stream_closed_at_once_frees_its_rows(service: CompletionService, engine: FakeEngine) -> None:
    writes = Writes()
    run = service.stream(prepare(service, prompt=["a", "b"], n=2, stream=True), writes)
    assert len(engine.live) == 2
    run.close()
    run.close()
    assert not engine.live
    await anyio.sleep(0.01)
    assert not writes.batches


async def test_nothing_is_written_after_a_stream_was_closed(service: CompletionService, engine: FakeEngine) -> None:
    writes = Writes()
    run = service.stream(prepare(service, prompt=["the dog", "a fox"], max_tokens=10**9, stream=True), writes)
    while not writes.batches:
        await anyio.sleep(0)
    # a turn that was begun before meets a run that is closed
    run.close()
    num_batches = len(writes.batches)
    await anyio.sleep(0.01)
    run.resume()
    assert len(writes.batches) == num_batches
    assert not engine.live


async def test_a_dead_engine_is_noticed_while_waiting(service: CompletionService, engine: FakeEngine) -> None:
    engine.delay = 0.01
    task = asyncio.create_task(complete(service, prompt=["a", "b"], max_tokens=10**6))
    await asyncio.sleep(0.03)
    engine.die()
    with pytest.raises(Unavailable):
        await task


async def test_what_observers_hear(make_service: Callable[..., CompletionService], engine: FakeEngine) -> None:
    notes = Notes()
    service = make_service(notes)
    engine.burst = 2
    await complete(service, notes, n=2, max_tokens=3)
    assert notes.calls == [("first",), ("finish", "length", 2, 6), ("gaps", 1)]
    notes.calls.clear()
    await complete(service, notes, echo=True, max_tokens=0, logprobs=0)
    assert notes.calls == [("finish", "length", 2, 0)]
    notes.calls.clear()
    engine.script = says("a")
    await complete(service, notes)
    assert notes.calls == [("first",), ("finish", "stop", 2, 2)]


async def test_gaps_of_all_streams_are_counted(
    make_service: Callable[..., CompletionService], engine: FakeEngine
) -> None:
    notes = Notes()
    service = make_service(notes)
    engine.delay = 0.002
    await asyncio.gather(*(complete(service, max_tokens=number + 1) for number in range(5)))
    assert sum(num_gaps for _, num_gaps in notes.calls) == 0 + 1 + 2 + 3 + 4


async def test_one_stream_that_breaks_is_alone(service: CompletionService, engine: FakeEngine) -> None:
    class Broken(Writes):
        def write(self, *_: object, **__: object) -> None:
            raise RuntimeError("no paper")

    engine.delay = 0.005
    writes = Writes()
    broken, whole = await asyncio.gather(
        stream(service, Broken(), max_tokens=5), stream(service, writes, max_tokens=5), return_exceptions=True
    )
    assert isinstance(broken, ServerFailure)
    assert "paper" not in broken.message
    assert whole is None
    assert "".join(writes.texts) == "the dogthe dogthe"
    assert not engine.live


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


async def test_events_after_the_end_change_nothing(service: CompletionService, engine: FakeEngine) -> None:
    # the engine goes on until it hears that a stop string was found
    engine.burst = 50
    answer = await complete(service, stop="dog", max_tokens=40)
    assert answer["choices"][0]["text"] == "the "
    assert answer["usage"]["completion_tokens"] == 2


async def test_many_requests_do_not_mix(service: CompletionService, engine: FakeEngine) -> None:
    words = ["the", "dog", "fox", "lazy", "quick"]
    answers = await asyncio.gather(*(complete(service, prompt=word, max_tokens=20) for word in words))
    for word, answer in zip(words, answers, strict=True):
        assert answer["choices"][0]["text"].startswith(word)
    assert len({request.request_id for request in engine.requests}) == len(words)
