"""The OpenAPI document: recorded, whole, and true where that can be asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from app.api.app import document
from app.api.middleware import PROBE_PATHS
from app.api.openapi import BODIES
from app.schemas.wire import parse_body
from scripts.openapi import RECORDED, render
from tests.api.conftest import Serve

LOWEST, HIGHEST = {"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"}
REQUESTS = [model.__name__ for model in BODIES]


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return document()


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every object within a document."""
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nodes(item)


def operations(schema: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def test_it_is_the_recorded_one() -> None:
    assert render() == RECORDED.read_text(encoding="utf-8"), "run `make docs` if this is what you want"


@pytest.mark.anyio
async def test_it_is_what_a_server_tells(serve: Serve, schema: dict[str, Any]) -> None:
    async with serve() as server:
        assert (await server.client.get("/openapi.json")).json() == json.loads(json.dumps(schema))


def test_every_reference_leads_somewhere(schema: dict[str, Any]) -> None:
    references = {node["$ref"] for node in nodes(schema) if "$ref" in node}
    assert len(references) > 10
    assert references <= {f"#/components/schemas/{name}" for name in schema["components"]["schemas"]}


def test_every_field_tells_its_meaning(schema: dict[str, Any]) -> None:
    models = schema["components"]["schemas"]
    assert set(REQUESTS) <= set(models)
    silent = [
        f"{name}.{field}"
        for name, model in models.items()
        for field, content in model.get("properties", {}).items()
        if not content.get("description")
    ]
    assert silent == []
    assert [name for name, model in models.items() if not model.get("description")] == []


@pytest.mark.parametrize("model", BODIES, ids=REQUESTS)
def test_every_field_of_a_request_tells_its_range_and_default(schema: dict[str, Any], model: type[BaseModel]) -> None:
    told = schema["components"]["schemas"][model.__name__]
    fields = told["properties"]
    assert set(told.get("required", ())) == {name for name, field in model.model_fields.items() if field.is_required()}
    optional = {name: field.default for name, field in model.model_fields.items() if not field.is_required()}
    # a field that is null when left out has no default to tell
    defaults = {name: default for name, default in optional.items() if default is not None}
    assert {name: field["default"] for name, field in fields.items() if "default" in field} == defaults
    for field, content in fields.items():
        for node in nodes(content):
            if node.get("type") in ("integer", "number"):
                assert LOWEST & set(node), field
                # ids of tokens end with the vocabulary
                assert HIGHEST & set(node) or "token id" in content["description"] or field == "prompt", field
            if node.get("type") == "array":
                assert "items" in node, field


def test_no_default_is_null(schema: dict[str, Any]) -> None:
    # most types have no null, and tools that read the document refuse a default that its own schema refuses
    assert [node for node in nodes(schema) if node.get("default", ...) is None] == []


def test_the_metrics_page_is_text(schema: dict[str, Any]) -> None:
    assert set(schema["paths"]["/metrics"]["get"]["responses"]["200"]["content"]) == {"text/plain"}


def test_every_route_tells_its_errors(schema: dict[str, Any]) -> None:
    error = {"$ref": "#/components/schemas/ErrorBody"}
    for path, method, operation in operations(schema):
        told = operation["responses"]
        assert "422" not in told, path
        expected = {"500"}
        if path not in PROBE_PATHS:
            expected |= {"401"}
        if method == "post":
            expected |= {"400", "401", "404", "408", "413", "415", "429", "503"}
        assert expected <= set(told), path
        for status, response in told.items():
            assert response["description"]
            assert "X-Request-Id" in response["headers"]
            if not status.startswith("2"):
                assert response["content"]["application/json"]["schema"] == error
            if status in ("429", "503") and method == "post":
                assert "Retry-After" in response["headers"]


def test_every_route_says_what_it_is_for(schema: dict[str, Any]) -> None:
    identifiers = [operation["operationId"] for _, _, operation in operations(schema)]
    assert len(set(identifiers)) == len(identifiers)
    for path, _, operation in operations(schema):
        assert operation["summary"], path
        assert operation["tags"], path
        for parameter in operation["parameters"]:
            assert parameter["description"], path
        assert (operation.get("security") == []) == (path in PROBE_PATHS - {"/metrics"})


def test_keys_stand_where_each_route_takes_them(schema: dict[str, Any]) -> None:
    assert set(schema["components"]["securitySchemes"]) == {"key", "x-api-key"}
    assert schema["security"] == [{"key": []}, {}]
    own = {path: operation["security"] for path, _, operation in operations(schema) if operation.get("security")}
    assert own == dict.fromkeys(("/v1/messages", "/v1/messages/count_tokens"), [{"key": []}, {"x-api-key": []}, {}])


def test_what_streams_says_so(schema: dict[str, Any]) -> None:
    content = schema["paths"]["/v1/completions"]["post"]["responses"]["200"]["content"]
    assert set(content) == {"application/json", "text/event-stream"}


@pytest.mark.parametrize("model", BODIES, ids=REQUESTS)
def test_examples_are_valid(model: type[Any]) -> None:
    assert issubclass(model, BaseModel)
    assert not parse_body(model, json.dumps(BODIES[model]).encode()).model_extra


@pytest.mark.anyio
async def test_examples_work(serve: Serve, schema: dict[str, Any]) -> None:
    async with serve() as server:
        for path, method, operation in operations(schema):
            if method == "post":
                example = operation["requestBody"]["content"]["application/json"]["example"]
                response = await server.client.post(path, json=example)
                assert response.status_code == 200, path


def test_keys_change_nothing(app_of: Callable[..., Any], schema: dict[str, Any]) -> None:
    assert app_of(api_key=["sk-one"]).openapi() == schema
