"""What /openapi.json says beside what FastAPI reads off the routes: bodies, errors, headers, keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from app.schemas.anthropic import CountTokensRequest, MessagesRequest
from app.schemas.chat import ChatRequest
from app.schemas.completions import CompletionRequest
from app.schemas.errors import ErrorBody
from app.schemas.responses import ResponsesRequest
from app.schemas.token_rules import MAX_SESSION_CHARACTERS
from app.schemas.tokens import DetokenizeRequest, TokenizeRequest

# bodies that routes read by themselves, each with one that works
BODIES: dict[type[BaseModel], dict[str, Any]] = {
    CompletionRequest: {"prompt": "def fibonacci(n):", "max_tokens": 32, "temperature": 0},
    ChatRequest: {
        "messages": [{"role": "user", "content": "Write a function that adds two numbers."}],
        "max_completion_tokens": 64,
    },
    ResponsesRequest: {"input": "Write a function that adds two numbers.", "max_output_tokens": 64},
    MessagesRequest: {"messages": [{"role": "user", "content": "Write a function that adds two numbers."}]}
    | {"max_tokens": 64},
    CountTokensRequest: {"messages": [{"role": "user", "content": "Write a function that adds two numbers."}]},
    TokenizeRequest: {"prompt": "def fibonacci(n):", "return_token_strs": True},
    DetokenizeRequest: {"tokens": [1, 2, 3]},
}
_REFERENCE = "#/components/schemas/{model}"
_STATUSES = {
    400: "The request is wrong; the message names the field",
    401: "No valid API key",
    404: "No such model, or nothing of that name",
    408: "The body took too long to arrive, or the request longer than its limit",
    413: "The body is too large",
    415: "The body is not JSON, or compressed",
    429: "The server is full, or a limit of the key is reached; try again after `Retry-After` seconds",
    500: "The server failed; the next request works",
    503: "Loading, draining or without an engine; try again after `Retry-After` seconds",
}
_OPEN_PATHS = ("/livez", "/readyz", "/health")
_WHEN = "needed where the operator has set API keys"
_KEY_SCHEMES = {
    "key": {"type": "http", "scheme": "bearer", "description": _WHEN},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": f"{_WHEN}; for two routes"},
}
# of routes in Anthropic's form: either key, or none
ANTHROPICS_SECURITY: dict[str, Any] = {"security": [{"key": []}, {"x-api-key": []}, {}]}
_ANSWERED_ID = {
    "description": "id of the request, as the server's log has it; the client's own, if it sent one",
    "schema": {"type": "string"},
}
_RETRY_AFTER = {"description": "seconds after which trying again makes sense", "schema": {"type": "integer"}}
_REQUEST_ID = {
    "name": "X-Request-Id",
    "in": "header",
    "required": False,
    "description": "a name for this request in the server's log; up to 128 characters of it are kept",
    "schema": {"type": "string"},
}
_REQUEST_TIMEOUT = {
    "name": "X-Request-Timeout",
    "in": "header",
    "required": False,
    "description": "seconds after which the request is given up with 408, or with an error event in a stream that has "
    "begun; the operator's limit holds where it is lower",
    "schema": {"type": "number", "exclusiveMinimum": 0},
}
_SESSION_ID = {
    "name": "X-Session-ID",
    "in": "header",
    "required": False,
    "description": "name of the conversation that the request is a part of, answered in a header of the same name; "
    "`session_id` in the body wins",
    "schema": {"type": "string", "minLength": 1, "maxLength": MAX_SESSION_CHARACTERS},
}
_EVENTS = {
    "text/event-stream": {
        "schema": {
            "type": "string",
            "description": "with `stream`: events up to `[DONE]`, or up to the last of those with types",
        }
    }
}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """A route's ``responses``: what it answers beside its result; 500 is always among them."""
    return {status: {"model": ErrorBody, "description": _STATUSES[status]} for status in sorted({*statuses, 500})}


# of a route that takes a body
ERROR_RESPONSES = error_responses(*_STATUSES)


def request_body(model: type[BaseModel]) -> dict[str, Any]:
    """A route's ``openapi_extra``: its body is JSON of this model, which has to be one of ``BODIES``."""
    content = {"schema": {"$ref": _REFERENCE.format(model=model.__name__)}, "example": BODIES[model]}
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def describe(app: FastAPI) -> None:
    """Have the app tell of everything that holds for its routes."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = make_schema(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def make_schema(app: FastAPI) -> dict[str, Any]:
    """The whole document."""
    schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, definitions = models_json_schema([(model, "validation") for model in BODIES], ref_template=_REFERENCE)
    components = schema.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas.update(definitions["$defs"])
    # errors of validation are 400 here, in the body of all errors
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    components["securitySchemes"] = _KEY_SCHEMES
    schema["security"] = [{"key": []}, {}]
    for path, operation in _operations(schema):
        _complete(path, operation, schemas)
    _drop_null_defaults(schemas)
    return schema


def _drop_null_defaults(node: Any) -> None:
    """Null is how a field is left out, and most types do not have it: a default that is no value of its field."""
    if isinstance(node, dict):
        if node.get("default", ...) is None:
            del node["default"]
        for child in node.values():
            _drop_null_defaults(child)
    elif isinstance(node, list):
        for child in node:
            _drop_null_defaults(child)


def _operations(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            yield path, operation


def _complete(path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    for status, response in responses.items():
        response["headers"] = {"X-Request-Id": _ANSWERED_ID}
        if status in ("429", "503"):
            response["headers"]["Retry-After"] = _RETRY_AFTER
    operation.setdefault("parameters", []).append(_REQUEST_ID)
    if path in _OPEN_PATHS:
        operation["security"] = []
    content = responses["200"]["content"]
    if "text/plain" in content:
        # the framework tells of JSON on every route
        del content["application/json"]
    fields = _body_fields(operation, schemas)
    if "stream" in fields:
        operation["parameters"] += [_REQUEST_TIMEOUT, _SESSION_ID]
        content |= _EVENTS


def _body_fields(operation: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    content = operation.get("requestBody", {}).get("content", {})
    name = content.get("application/json", {}).get("schema", {}).get("$ref", "").rpartition("/")[2]
    fields: dict[str, Any] = schemas.get(name, {}).get("properties", {})
    return fields
