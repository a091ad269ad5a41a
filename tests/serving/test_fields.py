"""What the rarer fields of a completion do to its answer, whole and streamed."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import pytest
from tokenizers import AddedToken, processors

from app.engine.interface import SampleSink
from app.engine.request import FinishReason, GenerationRequest, PromptLogprobsEvent, TokenEvent, TokenLogprobs
from app.serving.bad_words import bad_word_ids
from app.serving.completions import CompletionService
from app.serving.errors import ClientTooSlow, InvalidRequest, UnsupportedParameter
from app.serving.limits import ServingLimits
from app.serving.tokenizer import Tokenizer
from tests.fakes import FakeEngine, make_info
from tests.serving.completing import TOKENIZERS, Writes, chunks, complete, join, prepare, says
from tests.serving.conftest import EOS, make_byte_fallback, train_byte_level
from tests.serving.test_translate import parse

pytestmark = pytest.mark.anyio
BYTE_LEVEL = TOKENIZERS["byte_level"]
MakeService = Callable[..., CompletionService]


def ids_of(text: str) -> list[int]:
    return BYTE_LEVEL.encode(text)


async def test_token_ids(service: CompletionService, engine: FakeEngine) -> None:
    engine.script = says("a fox")
    fields: dict[str, Any] = {"prompt": ["the dog", "a"], "n": 2, "return_token_ids": True, "max_tokens": 20}
    choices = (await complete(service, **fields))["choices"]
    for choice in choices:
        assert choice["prompt_token_ids"] == ids_of(["the dog", "a"][choice["index"] // 2])
        # the end-of-text is one of them
        assert choice["token_ids"] == [*ids_of("a fox"), 0]
    parts = await chunks(service, **fields)
    for index in range(4):
        first, *others = [part["choices"][0] for part in parts if part["choices"][0]["index"] == index]
        assert first["prompt_token_ids"] == choices[index]["prompt_token_ids"]
        assert not any("prompt_token_ids" in other for other in others)
        assert sum((each["token_ids"] for each in (first, *others)), []) == choices[index]["token_ids"]


async def test_token_ids_are_told_though_their_text_is_held_back(service: CompletionService) -> None:
    parts = await chunks(service, stop="the dogs", max_tokens=2, return_token_ids=True)
    assert [part["choices"][0]["token_ids"] for part in parts] == [[token] for token in ids_of("the dog")]
    assert [part["choices"][0]["text"] for part in parts] == ["", "the dog"]


async def test_token_ids_with_a_stop_string(service: CompletionService) -> None:
    (choice,) = (await complete(service, stop="dog", max_tokens=9, return_token_ids=True))["choices"]
    assert (choice["text"], choice["token_ids"]) == ("the ", ids_of("the dog"))


async def test_log_probabilities_of_the_prompt(service: CompletionService) -> None:
    fields: dict[str, Any] = {"prompt": "the quick dog", "max_tokens": 1, "prompt_logprobs": 2}
    ids = ids_of("the quick dog")
    (choice,) = (await complete(service, **fields))["choices"]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    assert len(others) == len(ids) - 1
    for token_id, told in zip(ids[1:], others, strict=True):
        text_of = BYTE_LEVEL.id_to_token_text
        assert told == {
            str(token_id): {"logprob": -0.5, "rank": 1, "decoded_token": text_of(token_id)},
            str(token_id + 1): {"logprob": -1.0, "rank": 2, "decoded_token": text_of(token_id + 1)},
        }
    assert choice["logprobs"] is None
    echoed = (await complete(service, **fields, echo=True, logprobs=1))["choices"][0]
    assert echoed["prompt_logprobs"] == choice["prompt_logprobs"]
    assert [len(top) for top in echoed["logprobs"]["top_logprobs"][1:]] == [1] * len(ids)
    (alone,) = (await complete(service, **{**fields, "prompt": [5]}))["choices"]
    assert alone["prompt_logprobs"] == [None]


async def test_a_rank_that_nobody_told(service: CompletionService) -> None:
    (choice,) = (await complete(service, prompt_logprobs=0, max_tokens=1))["choices"]
    assert [each["rank"] for told in choice["prompt_logprobs"][1:] for each in told.values()] == [None]


def test_log_probabilities_of_the_prompt_are_not_streamed(service: CompletionService) -> None:
    with pytest.raises(InvalidRequest) as caught:
        prepare(service, prompt_logprobs=0, stream=True)
    assert caught.value.param == "prompt_logprobs"


async def test_tokens_named_by_their_ids(service: CompletionService) -> None:
    fields: dict[str, Any] = {"logprobs": 1, "max_tokens": 2, "echo": True, "return_tokens_as_token_ids": True}
    lists = (await complete(service, **fields))["choices"][0]["logprobs"]
    names = [f"token_id:{token}" for token in ids_of("the dog")]
    assert lists["tokens"] == names * 2
    assert [list(top) for top in lists["top_logprobs"][1:]] == [[name] for name in (names * 2)[1:]]
    assert join(await chunks(service, **fields), 1)[0]["logprobs"] == lists


async def test_the_best_of_several_samples(
    service: CompletionService, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {100: -3.0, 101: -1.0, 102: -2.0, 0: -1.0}
    monkeypatch.setattr("tests.fakes.fake_logprobs", lambda token, *_: TokenLogprobs(values[token]))
    engine.script = lambda _, sample: [100 + sample]
    answer = await complete(service, n=2, best_of=3, return_token_ids=True)
    assert [(choice["index"], choice["token_ids"]) for choice in answer["choices"]] == [(0, [101, 0]), (1, [102, 0])]
    assert answer["usage"]["completion_tokens"] == 6
    assert [choice["logprobs"] for choice in answer["choices"]] == [None, None]
    assert engine.requests[-1].n == 3


async def test_the_best_are_chosen_by_the_mean_and_for_each_prompt(
    service: CompletionService, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.fakes.fake_logprobs", lambda token, *_: TokenLogprobs(-1.0 if token == 9 else -1.5))
    # the longer sample is less likely as a whole, but more likely per token
    engine.script = lambda request, sample: [9] * 8 if sample == request.prompt_token_ids[0] % 2 else [8]
    answer = await complete(service, prompt=[[2], [3]], best_of=2, return_token_ids=True, logprobs=0)
    assert [choice["token_ids"] for choice in answer["choices"]] == [[9] * 8 + [0]] * 2
    assert [len(choice["logprobs"]["tokens"]) for choice in answer["choices"]] == [9, 9]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 9}, "best_of"),
        ({"n": 9, "best_of": 9}, "n"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
        ({"allowed_token_ids": [380]}, "allowed_token_ids"),
        ({"suffix": "x"}, "suffix"),
        ({"structured_outputs": {"regex": "(" * 5}}, "structured_outputs.regex"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"type": "no such type"}},
                }
            },
            "response_format.json_schema.schema",
        ),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"nothing_known": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs.structural_tag"),
    ],
)
def test_refusals(service: CompletionService, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        prepare(service, **fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_object", "schema": {"type": "object"}}}, "response_format.schema"),
        (
            {"structured_outputs": {"json": {"type": "object"}, "whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
        ),
    ],
)
def test_what_is_known_inside_of_a_field_is_refused_by_name(
    service: CompletionService, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        prepare(service, **fields)
    assert caught.value.param == param


def test_a_schema_keeps_the_order_of_its_properties(service: CompletionService) -> None:
    properties = {"zebra": {"type": "null"}, "ape": {"const": None}}
    grammar = prepare(service, guided_json={"properties": properties}).prompts[0].request.sampling.grammar
    assert grammar is not None
    assert list(json.loads(grammar.source)["properties"].items()) == list(properties.items())


def test_a_form_that_demands_nothing_goes_with_another(service: CompletionService) -> None:
    prepared = prepare(service, response_format={"type": "text"}, structured_outputs={"choice": ["a"], "regex": None})
    assert prepared.prompts[0].request.sampling.grammar is not None


def test_a_tokenizer_of_two_files_has_no_grammars(engine: FakeEngine, tmp_path: Path) -> None:
    backend = train_byte_level()
    backend.save(str(tmp_path / "whole.json"))
    backend.model.save(str(tmp_path))
    service = CompletionService(engine, Tokenizer.from_dir(tmp_path), ["fox"])
    assert prepare(service).prompts
    with pytest.raises(InvalidRequest, match="no tokenizer.json") as caught:
        prepare(service, response_format={"type": "json_object"})
    assert caught.value.param == "response_format"
    (tmp_path / "whole.json").rename(tmp_path / "tokenizer.json")
    service = CompletionService(engine, Tokenizer.from_dir(tmp_path), ["fox"])
    assert prepare(service, response_format={"type": "json_object"}).prompts


def test_a_grammar_is_checked_off_the_event_loop(service: CompletionService) -> None:
    assert service.job(parse()).is_short
    assert service.job(parse(response_format={"type": "text"})).is_short
    assert not service.job(parse(response_format={"type": "json_object"})).is_short
    assert not service.job(parse(bad_words=["x" * 250] * 20)).is_short
    assert not service.job(parse(suffix="x" * 5000)).is_short


async def test_nothing_stops_before_the_least_number_of_tokens(service: CompletionService) -> None:
    (choice,) = (await complete(service, stop="dog", min_tokens=2, max_tokens=9, return_token_ids=True))["choices"]
    # the first one is overlooked, the second one counts
    assert (choice["text"], choice["stop_reason"], len(choice["token_ids"])) == ("the dogthe ", "dog", 4)
    (plain,) = (await complete(service, stop="dog", min_tokens=1, max_tokens=9))["choices"]
    assert plain["text"] == "the "
    (whole,) = (await complete(service, stop="dog", min_tokens=5, max_tokens=5))["choices"]
    assert (whole["text"], whole["finish_reason"]) == ("the dogthe dogthe", "length")
    for min_tokens in (2, 5, 9):
        fields: dict[str, Any] = {"min_tokens": min_tokens, "stop": ["dog", "gt"], "max_tokens": 9}
        assert join(await chunks(service, **fields), 1) == (await complete(service, **fields))["choices"]


def test_bad_words_are_spelled_with_and_without_a_space_before() -> None:
    words = bad_word_ids(BYTE_LEVEL, ["dog", "dog", " fox"])
    assert words == tuple(tuple(ids_of(text)) for text in ("dog", " dog", "fox", " fox"))
    assert bad_word_ids(BYTE_LEVEL, []) == ()
    other = TOKENIZERS["byte_fallback"]
    assert bad_word_ids(other, ["dog"])[0] == tuple(other.encode("dog", add_special_tokens=False))


@pytest.mark.parametrize(
    ("keep", "expected"), [(1, " dog"), (2, " lazy dog"), (99, "the lazy dog"), (-1, "the lazy dog")]
)
async def test_a_prompt_that_is_cut_is_told_as_it_was_used(
    service: CompletionService, engine: FakeEngine, keep: int, expected: str
) -> None:
    answer = await complete(service, prompt="the lazy dog", truncate_prompt_tokens=keep, echo=True, max_tokens=0)
    kept = ids_of("the lazy dog")[-keep:] if keep > 0 else ids_of("the lazy dog")
    assert list(engine.requests[-1].prompt_token_ids) == kept
    assert answer["usage"]["prompt_tokens"] == len(kept)
    assert answer["choices"][0]["text"] == BYTE_LEVEL.decode(kept)
    assert BYTE_LEVEL.decode(kept).endswith("dog")
    assert keep != 99 or answer["choices"][0]["text"] == expected


def test_a_prompt_is_cut_to_the_limit_of_the_operator(make_service: MakeService) -> None:
    service = make_service(max_model_len=20)
    for max_tokens, num_kept in ((5, 15), (16, 4), (19, 1)):
        prepared = prepare(service, prompt=[3] * 50, truncate_prompt_tokens=-1, max_tokens=max_tokens)
        assert prepared.num_prompt_tokens == num_kept
    assert prepare(service, prompt=[3] * 50, truncate_prompt_tokens=-1).num_prompt_tokens == 4
    with pytest.raises(InvalidRequest):
        prepare(service, prompt=[3] * 50, truncate_prompt_tokens=16, max_tokens=5)


MARKERS = [
    (("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), "PpSsM"),
    (("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), "PpSsM"),
    (("<PRE>", "<SUF>", "<MID>"), "PpSsM"),
    (("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"), "PpSsM"),
    (("[PREFIX]", "[SUFFIX]", "[MIDDLE]"), "SsPp"),
]


@pytest.mark.parametrize(("markers", "order"), MARKERS)
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_a_suffix_stands_where_the_tokenizer_has_a_place_for_it(
    markers: Sequence[str], order: str, add_special_tokens: bool
) -> None:
    backend = train_byte_level()
    backend.add_special_tokens([AddedToken(text, special=True) for text in (*markers, "<s>", "<EOT>")])
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer = Tokenizer(backend)
    engine = FakeEngine(make_info(tokenizer.vocab_size, (0,), bos_token_id=bos))
    service = CompletionService(engine, tokenizer, ["fox"])
    prepared = prepare(service, prompt=["the", "a"], suffix=" dog", add_special_tokens=add_special_tokens)
    spelled: dict[str, list[int]] = dict(
        zip("PSM", ([tokenizer.find_added(text) or 0] for text in markers), strict=True)
    )
    for text, each in zip(("the", "a"), prepared.prompts, strict=True):
        parts = {**spelled, "p": ids_of(text), "s": ids_of(" dog")}
        expected = [bos] * add_special_tokens + [token for letter in order for token in parts[letter]]
        assert list(each.request.prompt_token_ids) == expected
    ends = frozenset((0, tokenizer.find_added("<EOT>")) if markers[0] == "<PRE>" else (0,))
    assert ends == set(prepared.prompts[0].request.stop_token_ids)
    assert ends == prepared.end_of_text_ids
    assert prepare(service, suffix="").prompts[0].request.prompt_token_ids == (bos, *ids_of("the dog"))
    others: list[dict[str, Any]] = [{"prompt": [5]}, {"prompt": [[5]]}, {"echo": True}, {"truncate_prompt_tokens": 5}]
    for fields in others:
        with pytest.raises(InvalidRequest) as caught:
            prepare(service, suffix="x", **fields)
        assert caught.value.param == "suffix"


def test_words_of_a_vocabulary_are_no_markers() -> None:
    service = CompletionService(FakeEngine(make_info(300, (0,))), Tokenizer(make_byte_fallback()), ["fox"])
    with pytest.raises(InvalidRequest, match="fill in the middle"):
        prepare(service, prompt="a", suffix="b")


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_what_evaluation_harnesses_ask(service: CompletionService, max_tokens: int) -> None:
    """Contexts and continuations as token ids, several in one request, of which the log-probabilities are summed."""
    contexts, continuations = ["the quick", "a", "the"], [" dog sleeps", " fox", " lazy dog, and"]
    prompts = [ids_of(a) + ids_of(b) for a, b in zip(contexts, continuations, strict=True)]
    answer = await complete(
        service, prompt=prompts, temperature=0, max_tokens=max_tokens, logprobs=1, seed=1234, echo=True
    )
    for index, (choice, ids) in enumerate(zip(answer["choices"], prompts, strict=True)):
        assert choice["index"] == index
        lists = choice["logprobs"]
        assert lists["tokens"][: len(ids)] == [BYTE_LEVEL.id_to_token_text(token) for token in ids]
        assert all(len(values) == len(ids) + max_tokens for values in lists.values())
        start = len(ids_of(contexts[index]))
        scored = lists["token_logprobs"][start : len(ids)]
        assert sum(scored) == -0.5 * len(ids_of(continuations[index]))
        tops = lists["top_logprobs"][start : len(ids)]
        assert all(
            max(top, key=top.__getitem__) == token for token, top in zip(lists["tokens"][start:], tops, strict=False)
        )


class Scorer(FakeEngine):
    """Scores prompts in slices of 256, and knows of nothing else."""

    def submit(self, request: GenerationRequest, sinks: Sequence[SampleSink]) -> None:
        async def play() -> None:
            for start in range(1, len(request.prompt_token_ids), 256):
                num_tokens = min(256, len(request.prompt_token_ids) - start)
                num_top = request.prompt_logprobs or 0
                top = [(number, -number / 7) for number in range(num_top)]
                event = PromptLogprobsEvent(
                    request.request_id, start, (TokenLogprobs(-1 / 3, tuple(top)),) * num_tokens
                )
                for sink in sinks:
                    sink.on_event(event)
                await anyio.sleep(0)
            for sample, sink in enumerate(sinks):
                sink.on_event(TokenEvent(request.request_id, sample, None, finish_reason=FinishReason.LENGTH))

        self.task = asyncio.get_running_loop().create_task(play())

    def abandon(self, _: str) -> None:
        self.task.cancel()


@pytest.fixture
def scorer() -> CompletionService:
    return CompletionService(Scorer(make_info(BYTE_LEVEL.vocab_size, (0,))), BYTE_LEVEL, ["fox"])


@pytest.mark.parametrize(("logprobs", "most_bytes"), [(0, 150), (1, 250), (5, 600)])
async def test_scores_of_a_long_prompt_take_little_more_than_their_answer(
    scorer: CompletionService, logprobs: int, most_bytes: int
) -> None:
    num_tokens = 20_000
    prepared = prepare(scorer, prompt=[5] * num_tokens, echo=True, max_tokens=0, logprobs=logprobs)
    tracemalloc.start()
    try:
        answer = await scorer.complete(prepared)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < most_bytes * num_tokens
    lists = json.loads(answer)["choices"][0]["logprobs"]
    assert {len(values) for values in lists.values()} == {num_tokens}


async def test_scores_of_a_stream_leave_as_they_come(scorer: CompletionService) -> None:
    class Forgetful(Writes):
        num_tokens = 0

        def write(self, chunks: bytes, *, is_last: bool) -> None:
            super().write(chunks, is_last=is_last)
            for batch in self.batches:
                for chunk in batch:
                    for choice in chunk["choices"]:
                        self.num_tokens += len((choice["logprobs"] or {"tokens": ()})["tokens"])
            self.batches.clear()

    num_tokens = 50_000
    prepared = prepare(scorer, prompt=[5] * num_tokens, echo=True, max_tokens=0, logprobs=5, stream=True)
    writes = Forgetful()
    tracemalloc.start()
    try:
        with closing(scorer.stream(prepared, writes)) as run:
            await run.done
            run.check()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert writes.num_tokens == num_tokens
    # the text of the prompt and one slice
    assert peak < 2_000_000


async def test_scores_that_nobody_reads_end_a_stream() -> None:
    engine = Scorer(make_info(BYTE_LEVEL.vocab_size, (0,)))
    service = CompletionService(engine, BYTE_LEVEL, ["fox"], ServingLimits(max_waiting_bytes=100_000))
    fields: dict[str, Any] = {"prompt": [5] * 5000, "echo": True, "max_tokens": 0, "logprobs": 1}
    writes = Writes(is_blocked=True)
    with closing(service.stream(prepare(service, **fields, stream=True), writes)) as run:
        while not run.is_over:
            await anyio.sleep(0)
        writes.is_blocked = False
        run.resume()
        await run.done
        with pytest.raises(ClientTooSlow):
            run.check()
    # one that reads, or waits for the whole, gets them
    await chunks(service, **fields)
    await complete(service, **fields)


async def test_all_offsets_of_a_stream_are_those_of_its_text(service: CompletionService) -> None:
    fields: dict[str, Any] = {
        "prompt": ["the \u2603 dog", "a fox"],
        "echo": True,
        "logprobs": 1,
        "max_tokens": 1,
    }
    for choice in join(await chunks(service, **fields), 2):
        starts = [*choice["logprobs"]["text_offset"], len(choice["text"])]
        for token, start, end in zip(choice["logprobs"]["tokens"], starts, starts[1:], strict=False):
            assert choice["text"][start:end] in (token, "\u2603", "")


async def test_special_tokens_are_named(service: CompletionService) -> None:
    (choice,) = (await complete(service, prompt=[0, 5], echo=True, prompt_logprobs=0, max_tokens=0))["choices"]
    assert EOS not in choice["text"]
    (shown,) = (await complete(service, prompt=[5, 0], prompt_logprobs=0, max_tokens=1))["choices"]
    assert shown["prompt_logprobs"][1]["0"]["decoded_token"] == EOS


async def test_no_alternatives_give_the_drawn_token_alone(service: CompletionService) -> None:
    (choice,) = (await complete(service, logprobs=0, max_tokens=2))["choices"]
    assert choice["logprobs"]["top_logprobs"] == [{"the": -0.5}, {" dog": -0.5}]


async def test_several_choices_without_chance_are_one_request(service: CompletionService, engine: FakeEngine) -> None:
    engine.script = says("a fox")
    answer = await complete(service, n=3, temperature=0)
    assert [choice["text"] for choice in answer["choices"]] == ["a fox"] * 3
    assert [(request.n, request.sampling.temperature) for request in engine.requests] == [(3, 0.0)]


async def test_an_answer_of_a_hundred_thousand_tokens(service: CompletionService, engine: FakeEngine) -> None:
    engine.burst = 1000
    answer = await complete(service, max_tokens=100_000)
    assert answer["usage"]["completion_tokens"] == 100_000
    assert answer["choices"][0]["text"] == "the dog" * 50_000
