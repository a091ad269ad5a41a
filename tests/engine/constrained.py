"""Requests that may not draw every token, and whether their samples have obeyed."""

from __future__ import annotations

import json
import re
import time

from app.engine.engine import Engine
from app.engine.request import FinishReason, GenerationRequest, Grammar
from tests.engine.fakes import Transcript, make_request
from tests.engine.fakes import run as run_all
from tests.engine.spelling import END, regex, spell

PERSON = {
    "type": "object",
    "properties": {"ab": {"type": "integer", "maximum": 9999}, "c": {"enum": ["x", "yz"]}, "d": {"type": "boolean"}},
    "required": ["ab", "c", "d"],
    "additionalProperties": False,
}
SCHEMA = Grammar("json_schema", json.dumps(PERSON))


def run(engine: Engine, *requests: GenerationRequest) -> Transcript:
    """As ``fakes.run``, waiting for grammars as well."""
    transcript = run_all(engine, *requests)
    while engine.is_compiling:
        time.sleep(0.001)
        while engine.has_work:
            transcript.add(engine.step())
            engine.check_integrity()
    return transcript


def crowd() -> list[GenerationRequest]:
    """Every way of drawing, and every rule."""
    ways: list[dict[str, object]] = [
        {},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 3.0, "top_k": 5, "seed": 2},
        {"temperature": 3.0, "top_p": 0.8, "min_p": 0.01, "seed": 3},
        {"temperature": 1.0, "frequency_penalty": 1.5, "repetition_penalty": 1.3, "seed": 4},
        {"temperature": 2.0, "logit_bias": ((5, 3.0), (END, -5.0)), "seed": 5},
        {"temperature": 2.0, "logprobs": 2, "seed": 6},
    ]
    rules: list[dict[str, object]] = [
        {},
        {"grammar": SCHEMA, "stop": [END]},
        {"grammar": regex("(ab|c[0-9]){2,6}"), "stop": [END], "n": 2},
        {"grammar": regex("[ab]{12}")},
        {"min_tokens": 6, "stop": range(30)},
        {"allowed_token_ids": tuple(range(10, 20)), "bad_words": ((12,), (13, 14), (1, 2, 3, 17))},
    ]
    pairs = [(i, j) for i in range(len(ways)) for j in range(len(rules))]
    return [
        make_request(f"r{i}-{j}", [1 + i, 2, 3 + j], 60 if "grammar" in rules[j] else 15, **ways[i] | rules[j])  # type: ignore[arg-type]
        for i, j in pairs
    ]


def assert_obeyed(requests: list[GenerationRequest], transcript: Transcript) -> None:
    for request in requests:
        for sample in range(request.n):
            tokens = transcript.tokens[request.request_id, sample]
            end = transcript.ends[request.request_id, sample]
            assert end.finish_reason in (FinishReason.STOP, FinishReason.LENGTH), end
            sampling = request.sampling
            if sampling.min_tokens:
                assert not set(tokens[: sampling.min_tokens]) & set(request.stop_token_ids)
            if sampling.allowed_token_ids is not None:
                assert set(tokens) <= set(sampling.allowed_token_ids) - {12}
                assert (13, 14) not in zip(tokens, tokens[1:], strict=False)
            if sampling.grammar is not None and end.finish_reason is FinishReason.STOP:
                assert_matches(sampling.grammar, spell(tokens))


def assert_matches(grammar: Grammar, text: str) -> None:
    if grammar.kind == "regex":
        assert re.fullmatch(grammar.source, text), text
        return
    value = json.loads(text)
    assert value["c"] in ("x", "yz")
    assert value["ab"] <= 9999
    assert value["d"] in (True, False)
    assert value.keys() == {"ab", "c", "d"}
