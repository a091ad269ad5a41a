"""What /openapi.json says of bodies that routes read by themselves."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from app.schemas.completions import CompletionRequest
from app.schemas.errors import ErrorBody

_REFERENCE = "#/components/schemas/{model}"
_STATUSES = {
    400: "The request is wrong; the message names the field",
    401: "No valid API key",
    404: "No such model",
    408: "The body took too long to arrive",
    413: "The body is too large",
    415: "The body is not JSON, or compressed",
    429: "The server is full; try again after `Retry-After` seconds",
    500: "The server failed; the next request works",
    503: "Loading, draining or without an engine; try again after `Retry-After` seconds",
}
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text} for status, text in _STATUSES.items()
}


def request_body(model: type[BaseModel]) -> dict[str, Any]:
    """A route's ``openapi_extra``: its body is JSON of this model."""
    schema = {"$ref": _REFERENCE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe_bodies(app: FastAPI) -> None:
    """Add the models of such bodies to the components that the app tells of."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _, definitions = models_json_schema([(CompletionRequest, "validation")], ref_template=_REFERENCE)
            schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
