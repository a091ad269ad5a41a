"""Every field of the request has an effect on what is run, or is refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, cast

import pytest
from tokenizers import normalizers, processors

from app.engine.interface import EngineUnavailable
from app.engine.request import GenerationRequest, Grammar, SamplingParams
from app.schemas.completions import CompletionRequest
from app.serving.completions import CompletionService
from app.serving.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelNotFound,
    RequestError,
    Unavailable,
    UnsupportedParameter,
)
from app.serving.models import ModelCatalog
from app.serving.parsing import parse_request
from app.serving.prepared import PreparedCompletion
from app.serving.tokenizer import Tokenizer
from app.serving.translate import num_sequences
from app.serving.unsupported import COMPLETION_FIELDS
from tests.fakes import FakeEngine
from tests.serving.conftest import EOS, train_byte_level

Prepare = Callable[..., PreparedCompletion]


def parse(**fields: Any) -> CompletionRequest:
    return parse_request(CompletionRequest, json.dumps({"prompt": "the dog", **fields}).encode())


@pytest.fixture
def prepare(service: CompletionService) -> Prepare:
    return lambda **fields: service.job(parse(**fields)).prepare("r")


def request_of(prepared: PreparedCompletion) -> GenerationRequest:
    (prompt,) = prepared.prompts
    return prompt.request


# field -> a value that is not its default, and what it does: a place in the request or the preparation
EFFECTS: dict[str, tuple[Any, Callable[[PreparedCompletion], Any], Any]] = {
    "model": ("wolf", lambda p: p.form.head.model, "wolf"),
    "prompt": ([5, 6], lambda p: request_of(p).prompt_token_ids, (5, 6)),
    "max_tokens": (7, lambda p: request_of(p).max_tokens, 7),
    "temperature": (0.5, lambda p: request_of(p).sampling.temperature, 0.5),
    "top_p": (0.5, lambda p: request_of(p).sampling.top_p, 0.5),
    "top_k": (5, lambda p: request_of(p).sampling.top_k, 5),
    "min_p": (0.25, lambda p: request_of(p).sampling.min_p, 0.25),
    "n": (3, lambda p: (p.n, request_of(p).n), (3, 3)),
    "stream": (True, lambda p: p.is_stream, True),
    "stream_options": (
        {"include_usage": True, "continuous_usage_stats": True},
        lambda p: (p.form.has_usage_chunk, p.has_continuous_usage),
        (True, True),
    ),
    "logprobs": (2, lambda p: (p.logprobs, request_of(p).sampling.logprobs), (2, 2)),
    "echo": (True, lambda p: p.prompts[0].echo_text, "the dog"),
    "stop": ("x", lambda p: p.stops, ("x",)),
    "stop_token_ids": ([9], lambda p: request_of(p).stop_token_ids, (9, 0)),
    "include_stop_str_in_output": (True, lambda p: p.is_stop_included, True),
    "ignore_eos": (True, lambda p: request_of(p).stop_token_ids, ()),
    "skip_special_tokens": (False, lambda p: p.is_special_skipped, False),
    "add_special_tokens": (False, lambda p: len(request_of(p).prompt_token_ids), 2),
    "presence_penalty": (1.5, lambda p: request_of(p).sampling.presence_penalty, 1.5),
    "frequency_penalty": (-1.5, lambda p: request_of(p).sampling.frequency_penalty, -1.5),
    "repetition_penalty": (1.2, lambda p: request_of(p).sampling.repetition_penalty, 1.2),
    "logit_bias": ({"5": 2, "7": -100}, lambda p: request_of(p).sampling.logit_bias, ((5, 2.0), (7, -100.0))),
    "min_tokens": (3, lambda p: (request_of(p).sampling.min_tokens, p.min_tokens), (3, 3)),
    "allowed_token_ids": ([7, 5, 7], lambda p: request_of(p).sampling.allowed_token_ids, (7, 5)),
    "bad_words": (["dog"], lambda p: len(request_of(p).sampling.bad_words), 2),
    "prompt_logprobs": (2, lambda p: (p.prompt_logprobs, request_of(p).prompt_logprobs), (2, 2)),
    "return_token_ids": (True, lambda p: (p.has_token_ids, p.form.has_token_ids), (True, True)),
    "return_tokens_as_token_ids": (True, lambda p: (p.names_ids, p.form.name(7)), (True, "token_id:7")),
    "truncate_prompt_tokens": (1, lambda p: len(request_of(p).prompt_token_ids), 1),
    "priority": (-3, lambda p: request_of(p).priority, -3),
    "best_of": (3, lambda p: (p.n, p.num_best, request_of(p).n, request_of(p).sampling.logprobs), (3, 1, 3, 0)),
    "response_format": (
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object", "title": "\u00e9"}}},
        lambda p: request_of(p).sampling.grammar,
        Grammar("json_schema", '{"type":"object","title":"\u00e9"}'),
    ),
    "structured_outputs": ({"regex": "a+"}, lambda p: request_of(p).sampling.grammar, Grammar("regex", "a+")),
    "guided_json": (
        {"type": "null"},
        lambda p: request_of(p).sampling.grammar,
        Grammar("json_schema", '{"type":"null"}'),
    ),
    "guided_regex": ("a", lambda p: request_of(p).sampling.grammar, Grammar("regex", "a")),
    "guided_choice": (["a", "b"], lambda p: request_of(p).sampling.grammar, Grammar("choice", '["a","b"]')),
    "guided_grammar": ('root ::= "a"', lambda p: request_of(p).sampling.grammar, Grammar("grammar", 'root ::= "a"')),
    "seed": (-5, lambda p: request_of(p).sampling.seed, -5),
}
WITHOUT_EFFECT = {"user", "cache_salt"}
# tested where they have their effect: in a tokenizer with markers, and over HTTP
ELSEWHERE = {"suffix", "session_id"}


def test_no_field_is_forgotten() -> None:
    assert set(EFFECTS) | WITHOUT_EFFECT | ELSEWHERE == set(CompletionRequest.model_fields)
    assert {field.name for field in dataclasses.fields(SamplingParams)} <= {*EFFECTS, "grammar"}


@pytest.mark.parametrize("field", sorted(EFFECTS))
def test_a_field_has_its_effect(prepare: Prepare, field: str) -> None:
    value, look, expected = EFFECTS[field]
    extra = {"stream": True} if field == "stream_options" else {}
    assert look(prepare(**{field: value}, **extra)) == expected
    # and the default would be something else, so that the test could fail
    assert field == "add_special_tokens" or look(prepare(**extra)) != expected


def test_special_tokens_are_added_when_asked_for(engine: FakeEngine) -> None:
    backend = train_byte_level()
    backend.post_processor = processors.TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, 0)])
    service = CompletionService(engine, Tokenizer(backend), ["fox"])
    with_one = request_of(service.job(parse()).prepare("r")).prompt_token_ids
    without = request_of(service.job(parse(add_special_tokens=False)).prepare("r")).prompt_token_ids
    assert with_one == (0, *without)


@pytest.mark.parametrize("temperature", [0, 1e-6])
def test_tiny_temperatures_are_greedy(prepare: Prepare, temperature: float) -> None:
    assert request_of(prepare(temperature=temperature)).sampling.temperature == 0.0


@pytest.mark.parametrize("top_k", [-1, 0, 10**6])
def test_top_k_that_cuts_nothing_is_off(prepare: Prepare, top_k: int) -> None:
    assert request_of(prepare(top_k=top_k)).sampling.top_k == 0


def test_a_seed_is_drawn_for_each_prompt(prepare: Prepare) -> None:
    prepared = [prepare(prompt=["a", "b"]) for _ in range(2)]
    seeds = {prompt.request.sampling.seed for each in prepared for prompt in each.prompts}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(("prompt", "num_prompts"), [("a", 1), (["a", "b"], 2), ([1, 2], 1), ([[1], [2], [3]], 3)])
def test_four_forms_of_a_prompt(prepare: Prepare, prompt: Any, num_prompts: int) -> None:
    prepared = prepare(prompt=prompt, n=2)
    assert len(prepared.prompts) == num_prompts
    assert prepared.num_sequences == num_sequences(parse(prompt=prompt, n=2)) == num_prompts * 2
    assert prepared.num_prompt_tokens == sum(len(each.request.prompt_token_ids) for each in prepared.prompts)


def test_engine_ids_are_unique_though_request_ids_are_not(prepare: Prepare) -> None:
    ids = [prompt.request.request_id for _ in range(3) for prompt in prepare(prompt=["a", "b"]).prompts]
    assert len(set(ids)) == 6
    assert prepare().form.head.id == "cmpl-r"


def test_the_served_name_is_the_default(prepare: Prepare) -> None:
    assert prepare().form.head.model == "fox"
    with pytest.raises(ModelNotFound) as caught:
        prepare(model="cat")
    assert caught.value.param == "model"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", [380]),
        ("prompt", [[1], [10**6]]),
        ("stop_token_ids", [380]),
        ("logit_bias", {"380": 1}),
        ("logit_bias", {"999999": 1}),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(prepare: Prepare, field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match="vocabulary ends at 379") as caught:
        prepare(**{field: value})
    assert caught.value.param == field


def test_a_prompt_that_tokenizes_to_nothing_is_refused(engine: FakeEngine) -> None:
    backend = train_byte_level()
    backend.normalizer = normalizers.Strip()
    service = CompletionService(engine, Tokenizer(backend), ["fox"])
    with pytest.raises(InvalidRequest, match="no token") as caught:
        service.job(parse(prompt="   ")).prepare("r")
    assert caught.value.param == "prompt"


def test_limits(make_service: Callable[..., CompletionService]) -> None:
    service = make_service(max_prompts=2, max_n=3, max_model_len=20, max_prompt_logprobs=30)
    accepted = [{"prompt": ["a", "b"]}, {"n": 3}, {"prompt": [1] * 4}, {"prompt": [1] * 5, "echo": True, "logprobs": 5}]
    for fields in accepted:
        service.job(parse(**{"max_tokens": 15, **fields})).prepare("r")
    refused: list[tuple[dict[str, Any], str]] = [
        ({"prompt": ["a", "b", "c"]}, "prompt"),
        ({"n": 4}, "n"),
        ({"prompt": [1] * 6}, "max_tokens"),
        ({"prompt": [[1], [1] * 21]}, "prompt"),
        ({"prompt": [1] * 5, "echo": True, "logprobs": 6}, "logprobs"),
        ({"prompt": [1] * 5, "echo": True, "logprobs": 5, "n": 2}, "logprobs"),
    ]
    for fields, param in refused:
        with pytest.raises(InvalidRequest) as caught:
            service.job(parse(**{"max_tokens": 15, **fields})).prepare("r")
        assert caught.value.param == param


def test_the_limit_of_length_tells_both_numbers(make_service: Callable[..., CompletionService]) -> None:
    with pytest.raises(ContextLengthExceeded, match=r"10 .* 20 .* 5 .* 15") as caught:
        make_service(max_model_len=10).job(parse(prompt=[1] * 5, max_tokens=15)).prepare("r")
    assert caught.value.code == "context_length_exceeded"


def test_a_default_of_max_tokens_gives_way_to_the_limit(make_service: Callable[..., CompletionService]) -> None:
    service = make_service(max_model_len=10)
    assert request_of(service.job(parse(prompt=[1] * 7)).prepare("r")).max_tokens == 3
    assert request_of(service.job(parse(prompt=[1] * 7, max_tokens=None)).prepare("r")).max_tokens == 3
    with pytest.raises(ContextLengthExceeded):
        service.job(parse(prompt=[1] * 7, max_tokens=16)).prepare("r")
    with pytest.raises(ContextLengthExceeded):
        service.job(parse(prompt=[1] * 10)).prepare("r")


def test_a_model_that_is_not_loaded_yet_is_unavailable(byte_level: Tokenizer) -> None:
    class Loading:
        @property
        def info(self) -> None:
            raise EngineUnavailable

    loading = cast("FakeEngine", Loading())
    with pytest.raises(Unavailable):
        CompletionService(loading, byte_level, ["fox"]).job(parse()).prepare("r")
    with pytest.raises(Unavailable):
        ModelCatalog(loading, ["fox"]).list()


def test_without_a_limit_length_is_free(prepare: Prepare) -> None:
    assert len(request_of(prepare(prompt=[1] * 100_000, max_tokens=10**6)).prompt_token_ids) == 100_000


REFUSED: dict[str, Any] = {
    "tools": [{"type": "function"}],
    "prompt_embeds": "AAAA",
    "chat_template": "{{ x }}",
    "chat_template_kwargs": {"a": 1},
    "messages": [{"role": "user", "content": "a"}],
    "use_beam_search": True,
    "length_penalty": 0.5,
    "spaces_between_special_tokens": False,
    "tool_choice": "required",
}


@pytest.mark.parametrize("field", sorted(COMPLETION_FIELDS))
def test_known_fields_without_support_are_refused_by_name(prepare: Prepare, field: str) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        prepare(**{field: REFUSED.get(field, {"some": "value"})})
    assert (caught.value.param, caught.value.code, caught.value.status) == (field, "unsupported_parameter", 400)


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in COMPLETION_FIELDS.items() for value in (*values, None)]
    + [
        ("best_of", 1),
        ("suffix", ""),
        ("response_format", {"type": "text"}),
        ("no_such_field", {"a": 1}),
        ("return_hidden_states", False),
    ],
)
def test_what_would_change_nothing_is_accepted(prepare: Prepare, field: str, value: Any) -> None:
    assert request_of(prepare(**{field: value})).n == 1


@pytest.mark.parametrize(("field", "value"), [("min_new_tokens", False), ("best_of", True), ("priority", 0.0)])
def test_a_value_of_another_type_is_not_the_default(prepare: Prepare, field: str, value: Any) -> None:
    with pytest.raises(RequestError):
        prepare(**{field: value})


def test_offsets_of_an_echo(prepare: Prepare, byte_level: Tokenizer) -> None:
    (prompt,) = prepare(prompt="the \u2603 dog", echo=True, logprobs=0).prompts
    texts = [byte_level.decode([token]) for token in prompt.request.prompt_token_ids]
    ends = [*prompt.echo_offsets[1:], len(prompt.echo_text)]
    for text, start, end in zip(texts, prompt.echo_offsets, ends, strict=True):
        # a token that completes a character has its text, the others none
        assert prompt.echo_text[start:end] in (text, "\u2603", "")
    assert prompt.request.prompt_logprobs == 0
    assert prompt.echo_text == "the \u2603 dog"


def test_scoring_alone_is_asked_of_the_engine_as_such(prepare: Prepare) -> None:
    scored = request_of(prepare(echo=True, max_tokens=0, logprobs=2))
    assert (scored.max_tokens, scored.prompt_logprobs) == (0, 2)
    echoed = request_of(prepare(echo=True, max_tokens=0))
    assert echoed.prompt_logprobs == 0
    assert request_of(prepare(echo=True)).prompt_logprobs is None
    assert request_of(prepare(logprobs=2)).prompt_logprobs is None


def test_continuations_that_have_no_slots_are_refused(engine: FakeEngine, make_service: Callable[..., Any]) -> None:
    service, slots = make_service(max_n=64), engine.info.max_num_seqs
    service.job(parse(n=slots)).prepare("r")
    with pytest.raises(InvalidRequest, match=f"at most {slots}") as caught:
        service.job(parse(n=slots + 1)).prepare("r")
    assert caught.value.param == "n"
