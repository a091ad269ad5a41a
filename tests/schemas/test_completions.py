"""The bad-input matrix of the completion request: what is refused, and under which name."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from app.schemas.completions import Completion, CompletionRequest
from app.schemas.json import BodyError
from app.schemas.wire import parse_body

LARGE = 10**9


def parse(**fields: Any) -> CompletionRequest:
    return parse_body(CompletionRequest, json.dumps({"prompt": "a", **fields}).encode())


BAD = [
    *[("prompt", value) for value in ([], [[]], [[1], []], "", [""], ["a", ""], [[[1]]], {}, 5, True, None)],
    *[("prompt", value) for value in ([1, "a"], ["a", 1], [True], [1, True], [1.0], [1.5], [-1], [[1], [-1]], [None])],
    *[("prompt", value) for value in ([2**31], [[1], 2], [[1], "a"], [[1, "a"]], [{}])],
    *[("max_tokens", value) for value in (0, -1, True, "5", 1.0, 1.5, 2**31, 2**63, 10**400, [], {})],
    *[("temperature", value) for value in (-0.1, 2.1, 1e308, True, "0.5", "NaN", [])],
    *[("top_p", value) for value in (0, 0.0, 1.1, -1, True, "1")],
    *[("top_k", value) for value in (-2, 1.5, 1.0, True, "1", 2**63)],
    *[("min_p", value) for value in (-0.1, 1.1, True)],
    *[("n", value) for value in (0, -1, 1.0, True, "1", 2**63)],
    *[("stream", value) for value in ("true", "yes", 1, 0, [])],
    *[("echo", value) for value in ("true", 1)],
    *[("logprobs", value) for value in (-1, 21, 10**6, "5", True, 1.0)],
    *[("stop", value) for value in ("", [""], [5], 5, ["a"] * 5, "x" * 257, ["a", None], {}, True, [["a"]])],
    *[("stop_token_ids", value) for value in ([-1], [True], ["1"], [1.0], 5, "5", [2**31], [1] * 65)],
    *[("presence_penalty", value) for value in (-2.1, 2.1, True, "1")],
    *[("frequency_penalty", value) for value in (-2.1, 2.1, True)],
    *[("repetition_penalty", value) for value in (0, -1, 1e300, 1e-300, True)],
    *[("logit_bias", {key: 1}) for key in ("abc", "-1", "1.0", "01", " 1", "+1", "1_0", "\u0661", "9" * 50, "")],
    *[("logit_bias", {"1": value}) for value in (101, -100.5, True, "1", None, [])],
    ("logit_bias", [1]),
    ("logit_bias", {str(i): 1 for i in range(100_000)}),
    *[("seed", value) for value in (2**63, -(2**63) - 1, 2**64, 1.0, True, "1")],
    *[("model", value) for value in ("", "a\nb", "x" * 1_000_000, 5, ["a"], True)],
    *[("user", value) for value in (5, True, [])],
    *[("min_tokens", value) for value in (-1, 1.0, True, "1", 2**31)],
    *[("allowed_token_ids", value) for value in ([], [-1], [True], ["1"], [1.0], 5, {}, [2**31], [1] * 65_537)],
    *[("bad_words", value) for value in ("a", [1], [""], [" "], ["\n"], ["x" * 257], ["a"] * 129, {}, 5, [None])],
    *[("prompt_logprobs", value) for value in (-1, 21, True, "1", 1.0)],
    *[("truncate_prompt_tokens", value) for value in (0, -2, 1.0, True, "1", 2**31)],
    *[("priority", value) for value in (0.0, True, "1", 2**31, -(2**31) - 1)],
    *[("cache_salt", value) for value in ("", 5, [], "x" * 257)],
    *[("session_id", value) for value in ("", 5, "x" * 257, "a\nb", "\u00e9", "\0")],
    *[("best_of", value) for value in (0, -1, 1.0, True, "1", 2**31)],
    *[("suffix", value) for value in (5, [], True)],
    *[("response_format", value) for value in (5, "text", [], True)],
    *[("structured_outputs", value) for value in (5, {}, [], {"regex": None}, {"regex": "a", "grammar": "b"})],
    *[("guided_json", value) for value in (5, "", {}, [], True)],
    *[("guided_choice", value) for value in ([], [""], [1], "a", ["a"] * 10_001)],
    *[(name, value) for name in ("guided_regex", "guided_grammar") for value in ("", 5, [], {})],
    *[
        (name, value)
        for name in (
            "include_stop_str_in_output",
            "ignore_eos",
            "skip_special_tokens",
            "add_special_tokens",
            "return_token_ids",
            "return_tokens_as_token_ids",
        )
        for value in (1, "true")
    ],
]


@pytest.mark.parametrize(("field", "value"), BAD, ids=lambda value: str(value)[:24])
def test_a_wrong_value_is_refused_by_the_name_of_its_field(field: str, value: Any) -> None:
    if isinstance(value, int) and value > LARGE**9:
        body = f'{{"prompt": "a", "{field}": {value}}}'.encode()
    else:
        body = json.dumps({"prompt": "a", field: value}).encode()
    with pytest.raises(BodyError) as caught:
        parse_body(CompletionRequest, body)
    assert caught.value.param == field
    assert len(caught.value.message) <= 200


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "frequency_penalty", "repetition_penalty", "unknown"])
def test_no_number_that_is_none(field: str, number: str) -> None:
    with pytest.raises(BodyError):
        parse_body(CompletionRequest, f'{{"prompt": "a", "{field}": {number}}}'.encode())


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"include_usage": 1}, "stream_options.include_usage"),
        ({"continuous_usage_stats": "yes"}, "stream_options.continuous_usage_stats"),
        ([], "stream_options"),
        (True, "stream_options"),
    ],
)
def test_stream_options_have_their_types(options: Any, param: str) -> None:
    with pytest.raises(BodyError) as caught:
        parse(stream=True, stream_options=options)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "json"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "text", "json_schema": {"name": "a"}}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": []}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object"),
        ({"guided_regex": "a", "guided_json": "{}"}, "guided_regex"),
    ],
)
def test_forms_of_outputs_have_their_types(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BodyError) as caught:
        parse(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize("stream", [{}, {"stream": False}, {"stream": None}])
def test_stream_options_need_a_stream(stream: dict[str, Any]) -> None:
    with pytest.raises(BodyError) as caught:
        parse(stream_options={"include_usage": True}, **stream)
    assert caught.value.param == "stream_options"


def test_a_prompt_is_required() -> None:
    with pytest.raises(BodyError, match="required") as caught:
        parse_body(CompletionRequest, b'{"model": "a"}')
    assert caught.value.param == "prompt"


def test_no_tokens_only_with_echo() -> None:
    assert parse(max_tokens=0, echo=True).max_tokens == 0
    with pytest.raises(BodyError):
        parse(max_tokens=0, echo=False)


def test_null_means_left_out() -> None:
    fields = [name for name in CompletionRequest.model_fields if name != "prompt"]
    assert parse(**dict.fromkeys(fields)) == parse()
    assert parse(stream=True, stream_options={"include_usage": None}).stream_options is not None


@pytest.mark.parametrize("prompt", ["a", "\0", ["a", "b"], ["1"], [0], [0, 5], [[1], [2, 3]]])
def test_four_forms_of_a_prompt(prompt: Any) -> None:
    assert parse(prompt=prompt).prompt == prompt


def test_the_edges_of_every_range_are_inside() -> None:
    for field, values in {
        "temperature": (0, 2, 2.0, 1e-9),
        "top_p": (1, 1e-9),
        "top_k": (-1, 0, 2**31 - 1),
        "min_p": (0, 1),
        "logprobs": (0, 20),
        "presence_penalty": (-2, 2),
        "seed": (-(2**63), 2**63 - 1),
        "max_tokens": (1, 2**31 - 1),
        "stop": ("x" * 256, ["a"] * 4, []),
        "logit_bias": ({"0": -100, "5": 100}, {}),
        "stop_token_ids": ([], [0] * 64),
        "truncate_prompt_tokens": (-1, 1, 2**31 - 1),
        "priority": (-(2**31), 2**31 - 1),
        "prompt_logprobs": (0, 20),
        "bad_words": ([], ["x" * 256] * 128),
        "allowed_token_ids": ([0], [1] * 65_536),
        "session_id": ("x", "~" * 256),
        "best_of": (1, 2**31 - 1),
    }.items():
        for value in values:
            parse(**{field: value})


def test_unknown_fields_are_kept_aside() -> None:
    assert parse(no_such_field={"a": [1]}).model_extra == {"no_such_field": {"a": [1]}}


def test_half_a_million_stop_strings_cost_little() -> None:
    body = json.dumps({"prompt": "a", "stop": ["a"] * 500_000}).encode()
    started = time.perf_counter()
    with pytest.raises(BodyError):
        parse_body(CompletionRequest, body)
    assert time.perf_counter() - started < 5.0


def test_every_field_is_documented() -> None:
    schema = CompletionRequest.model_json_schema()
    assert set(schema["properties"]) == set(CompletionRequest.model_fields)
    for properties in (schema["properties"], *(inner["properties"] for inner in schema["$defs"].values())):
        for name, entry in properties.items():
            assert entry.get("description"), name
    assert Completion.model_json_schema()["properties"]["usage"]
