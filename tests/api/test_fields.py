"""The contract of every request: each of its fields changes what the engine is asked or what is answered, or is refused
by its name, or says of itself that it has no effect. A field without an entry here fails.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from pydantic import BaseModel
from tokenizers import processors

from app.api.openapi import BODIES
from app.schemas.anthropic import CountTokensRequest, MessagesRequest
from app.schemas.chat import ChatRequest
from app.schemas.completions import CompletionRequest
from app.schemas.responses import ResponsesRequest
from app.schemas.tokens import DetokenizeRequest, TokenizeRequest
from app.schemas.wire import WireModel
from app.serving.tokenizer import Tokenizer
from tests.api.conftest import MODEL, Running, Serve, byte_backend
from tests.fakes import FakeEngine, make_info

BOS = 257
ALIAS = "acme/alias"


@dataclass(frozen=True)
class Changes:
    """With this value something is different. beside: what both requests say as well; without: what neither says."""

    value: Any
    beside: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()

    def base_of(self, kind: Kind) -> dict[str, Any]:
        """The request that says nothing of the field."""
        return {key: value for key, value in {**kind.base, **self.beside}.items() if key not in self.without}


@dataclass(frozen=True)
class Refused(Changes):
    """With this value the request is refused, and the field named."""


@dataclass(frozen=True)
class NoEffect(Changes):
    """Nothing is different, as the field's description says in these words."""

    words: str = "no effect"


@dataclass(frozen=True)
class Kind:
    """One kind of request. base: one that works, to which the entries add."""

    path: str
    base: dict[str, Any]
    fields: dict[str, Changes]


STREAM = {"stream": True}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
CONVERSATION = {"messages": [{"role": "user", "content": "hello"}]}
JSON_SCHEMA = {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}

TOOL = {"type": "function", "function": {"name": "f"}}
CALL = '<tool_call>{"name": "f"}</tool_call>'
# the fake says the prompt again
CALLING = {
    "messages": [{"role": "user", "content": CALL + CALL}],
    "tools": [TOOL],
    "ignore_eos": True,
    "max_tokens": 600,
}

# what all requests for tokens share
GENERATION: dict[str, Changes] = {
    "model": Changes(ALIAS),
    "temperature": Changes(0.5),
    "top_p": Changes(0.5),
    "top_k": Changes(5),
    "min_p": Changes(0.5),
    "n": Changes(2),
    "stream": Changes(True),
    "stream_options": Changes({"include_usage": True}, STREAM),
    "stream_options.include_usage": Changes(True, STREAM),
    "stream_options.continuous_usage_stats": Changes(True, USAGE),
    "stop": Changes("l"),
    "stop_token_ids": Changes([0]),
    "include_stop_str_in_output": Changes(True, {"stop": "l"}),
    "ignore_eos": Changes(True),
    "skip_special_tokens": Changes(False, {"ignore_eos": True}),
    "presence_penalty": Changes(1),
    "frequency_penalty": Changes(1),
    "repetition_penalty": Changes(2),
    "logit_bias": Changes({"5": 1}),
    "seed": Changes(2),
    "min_tokens": Changes(2),
    "allowed_token_ids": Changes([1, 2]),
    "bad_words": Changes(["word"]),
    "prompt_logprobs": Changes(1),
    "return_token_ids": Changes(True),
    "return_tokens_as_token_ids": Changes(True, {"logprobs": True}),
    "truncate_prompt_tokens": Changes(2),
    "priority": Changes(-1),
    "cache_salt": NoEffect("a"),
    "session_id": Changes("a"),
    "user": NoEffect("a", words="not interpreted"),
    "response_format": Changes({"type": "json_object"}),
    "response_format.type": Changes("json_object"),
    "response_format.json_schema": Changes(
        {"name": "a", "schema": {"type": "object", "maxProperties": 1}}, JSON_SCHEMA
    ),
    "response_format.json_schema.name": NoEffect("b", JSON_SCHEMA, words="not shown"),
    "response_format.json_schema.description": NoEffect("b", JSON_SCHEMA, words="not shown"),
    "response_format.json_schema.schema": Changes({"type": "array"}, JSON_SCHEMA),
    "response_format.json_schema.strict": NoEffect(True, JSON_SCHEMA),
    "structured_outputs": Changes({"regex": "a"}),
    "structured_outputs.json": Changes({"type": "array"}),
    "structured_outputs.regex": Changes("a+"),
    "structured_outputs.choice": Changes(["a", "b"]),
    "structured_outputs.grammar": Changes('root ::= "a"'),
    "structured_outputs.json_object": Changes(True),
    "guided_json": Changes({"type": "array"}),
    "guided_regex": Changes("a+"),
    "guided_choice": Changes(["a", "b"]),
    "guided_grammar": Changes('root ::= "a"'),
}

# of those, what responses have as well
RESPONSE_FIELDS = (
    *("model", "stream", "temperature", "top_p", "top_k", "min_p"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "priority", "session_id"),
)
RESPONSE_SCHEMA = {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}}}}

# register a new body here
KINDS: dict[type[BaseModel], Kind] = {
    CompletionRequest: Kind(
        "/v1/completions",
        {"prompt": "hello", "seed": 1, "max_tokens": 8},
        {
            **GENERATION,
            "return_tokens_as_token_ids": Changes(True, {"logprobs": 0}),
            "prompt": Changes("hullo"),
            "max_tokens": Changes(3),
            "logprobs": Changes(1),
            "echo": Changes(True),
            "best_of": Changes(2),
            "suffix": Changes(" world"),
            "add_special_tokens": Changes(False),
        },
    ),
    ChatRequest: Kind(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "hello"}], "seed": 1, "max_tokens": 8},
        {
            **GENERATION,
            "stop": Changes("_"),
            "include_stop_str_in_output": Changes(True, {"stop": "_"}),
            "skip_special_tokens": Changes(False, {"ignore_eos": True, "add_special_tokens": True}),
            "messages": Changes([{"role": "user", "content": "hullo"}]),
            "max_completion_tokens": Changes(3),
            "max_tokens": Changes(3),
            "logprobs": Changes(True),
            "top_logprobs": Changes(1, {"logprobs": True}),
            "tools": Changes([TOOL]),
            "tool_choice": Changes("none", {"tools": [TOOL]}),
            "parallel_tool_calls": Changes(False, CALLING),
            "add_generation_prompt": Changes(False),
            "continue_final_message": Changes(True),
            "add_special_tokens": Changes(True),
            "chat_template_kwargs": Refused({"a": 1}),
        },
    ),
    ResponsesRequest: Kind(
        "/v1/responses",
        {"input": "hello", "seed": 1, "max_output_tokens": 8},
        {
            **{name: GENERATION[name] for name in RESPONSE_FIELDS},
            "input": Changes("hullo"),
            "instructions": Changes("be short"),
            "previous_response_id": Refused("resp_none"),
            "store": Changes(False),
            "max_output_tokens": Changes(3),
            "text": Changes({"format": {"type": "json_object"}}),
            "text.format": Changes({"type": "json_object"}),
            "text.format.type": Changes("json_object"),
            "text.format.name": Changes("b", RESPONSE_SCHEMA),
            "text.format.description": Changes("b", RESPONSE_SCHEMA),
            "text.format.schema": Changes({"type": "array"}, RESPONSE_SCHEMA),
            "text.format.strict": Changes(True, RESPONSE_SCHEMA),
            "tools": Changes([{"type": "function", "name": "f"}]),
            "tool_choice": Changes("none", {"tools": [{"type": "function", "name": "f"}]}),
            "parallel_tool_calls": Changes(False),
            "include": Changes(["message.output_text.logprobs"]),
            "top_logprobs": Changes(1, {"include": ["message.output_text.logprobs"]}),
            "truncation": Changes("auto"),
            "metadata": Changes({"a": "b"}),
            "user": Changes("a"),
        },
    ),
    MessagesRequest: Kind(
        "/v1/messages",
        {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8},
        {
            **{name: GENERATION[name] for name in ("model", "stream", "temperature", "top_p", "top_k")},
            "messages": Changes([{"role": "user", "content": "hullo"}]),
            "system": Changes("be short"),
            "max_tokens": Changes(3),
            "stop_sequences": Changes(["_"]),
        },
    ),
    CountTokensRequest: Kind(
        "/v1/messages/count_tokens",
        {"messages": [{"role": "user", "content": "hello"}]},
        {
            "model": Refused("no-such-model"),
            "messages": Changes([{"role": "user", "content": "hello there"}]),
            "system": Changes("be short"),
        },
    ),
    TokenizeRequest: Kind(
        "/tokenize",
        {"prompt": "hello"},
        {
            "model": Refused("no-such-model"),
            "prompt": Changes("hullo"),
            "messages": Changes([{"role": "user", "content": "hullo"}], CONVERSATION, ("prompt",)),
            "add_special_tokens": Changes(False),
            "return_token_strs": Changes(True),
            "add_generation_prompt": Changes(False, CONVERSATION, ("prompt",)),
            "continue_final_message": Changes(True, CONVERSATION, ("prompt",)),
            "tools": Changes([TOOL], CONVERSATION, ("prompt",)),
            "chat_template_kwargs": Refused({"a": 1}, CONVERSATION, ("prompt",)),
        },
    ),
    DetokenizeRequest: Kind(
        "/detokenize", {"tokens": [72, 73]}, {"model": Refused("no-such-model"), "tokens": Changes([74])}
    ),
}
CASES = [(model, name) for model, kind in KINDS.items() for name in kind.fields]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One that adds a token to a text by itself, and that has tokens to fill in the middle."""
    backend = byte_backend()
    backend.add_special_tokens(["<s>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return Tokenizer(backend)


@pytest.fixture
def engine(tokenizer: Tokenizer) -> FakeEngine:
    return FakeEngine(make_info(tokenizer.vocab_size, (256,), bos_token_id=BOS))


def field_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Names of all fields as a client writes them, those of objects inside of it included."""
    for name, info in model.model_fields.items():
        path = prefix + (info.alias or name)
        yield path
        for inner in models_in(info.annotation):
            yield from field_names(inner, path + ".")


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, WireModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from models_in(argument)


def description_of(model: type[BaseModel], name: str) -> str:
    first, _, rest = name.partition(".")
    info = next(info for key, info in model.model_fields.items() if (info.alias or key) == first)
    if not rest:
        return info.description or ""
    return next(description_of(inner, rest) for inner in models_in(info.annotation))


def with_value(body: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A body in which the field of a dotted name has this value."""
    changed = copy.deepcopy(body)
    *outer, last = name.split(".")
    place = changed
    for key in outer:
        place = place.setdefault(key, {})
    place[last] = value
    return changed


async def ask(server: Running, path: str, body: dict[str, Any]) -> tuple[int, Any, list[Any]]:
    """Status, everything that was answered, and what the engine was asked, without what differs every time."""
    num_before = len(server.engine.requests)
    response = await server.client.post(path, json=body)
    text = re.sub(r'"(id|created|created_at|item_id|call_id)":("[^"]*"|\d+)', "", response.text)
    asked = [dataclasses.replace(request, request_id="") for request in server.engine.requests[num_before:]]
    if "seed" not in body:
        # one is drawn
        asked = [dataclasses.replace(each, sampling=dataclasses.replace(each.sampling, seed=0)) for each in asked]
    return response.status_code, (text, response.headers.get("x-session-id")), asked


def test_every_body_is_here() -> None:
    assert set(KINDS) == set(BODIES)


@pytest.mark.parametrize("model", KINDS, ids=lambda model: model.__name__)
def test_every_field_is_here(model: type[BaseModel]) -> None:
    assert set(KINDS[model].fields) == set(field_names(model))


@pytest.mark.anyio
@pytest.mark.parametrize(("model", "name"), CASES, ids=[f"{model.__name__}-{name}" for model, name in CASES])
async def test_a_field_does_what_it_says(serve: Serve, model: type[BaseModel], name: str) -> None:
    kind = KINDS[model]
    case = kind.fields[name]
    base = case.base_of(kind)
    async with serve(served_model_name=[MODEL, ALIAS]) as server:
        status, *changed = await ask(server, kind.path, with_value(base, name, case.value))
        if isinstance(case, Refused):
            assert 400 <= status < 500, changed
            assert f'"param":"{name}' in changed[0][0]
            return
        assert status == 200, changed
        status, *plain = await ask(server, kind.path, base)
        if isinstance(case, NoEffect):
            assert changed == plain
            assert case.words in description_of(model, name)
        else:
            assert changed != plain
            assert status == 200, plain


@pytest.mark.anyio
async def test_the_same_request_makes_no_difference(serve: Serve) -> None:
    async with serve() as server:
        for kind in KINDS.values():
            for body in (kind.base, kind.base | STREAM) if "stream" in kind.fields else (kind.base,):
                assert await ask(server, kind.path, body) == await ask(server, kind.path, body), kind.path


@pytest.mark.anyio
@pytest.mark.parametrize("model", KINDS, ids=lambda model: model.__name__)
async def test_a_wrong_type_is_refused_by_the_name_of_its_field(serve: Serve, model: type[BaseModel]) -> None:
    kind = KINDS[model]
    async with serve() as server:
        for name, case in kind.fields.items():
            base = case.base_of(kind)
            is_object = isinstance(case.value, dict) or name.endswith(("json", "guided_json"))
            wrong = 5 if is_object else {"no": "such"}
            status, (text, _), asked = await ask(server, kind.path, with_value(base, name, wrong))
            assert (status, asked) == (400, []), name
            assert f'"param":"{name}' in text, (name, text)


@pytest.mark.anyio
async def test_a_session_is_named_by_body_or_header(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "app.access")
    async with serve() as server:
        for stream in (False, True):
            for body, header, expected in (("a b", "c", "a b"), (None, "c", "c"), (None, None, None)):
                caplog.clear()
                response = await server.client.post(
                    "/v1/completions",
                    json={"prompt": "hello", "session_id": body, "stream": stream},
                    headers={"x-session-id": header} if header else {},
                )
                assert response.status_code == 200
                assert response.headers.get("x-session-id") == expected
                await server.is_idle()
                (record,) = [record for record in caplog.records if record.name == "app.access"]
                assert getattr(record, "session", None) == expected
        response = await server.client.post(
            "/v1/completions", json={"prompt": "hello"}, headers={"x-session-id": "x" * 257}
        )
        assert (response.status_code, response.json()["error"]["param"]) == (400, "X-Session-ID")
