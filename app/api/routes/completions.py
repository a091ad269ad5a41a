"""``POST /v1/completions``."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from app.api.body import read_json_body
from app.api.completions import CompletionAnswer
from app.api.dependencies import context_of
from app.api.openapi import ERROR_RESPONSES, request_body
from app.schemas.completions import Completion, CompletionRequest
from app.serving.parsing import parse_completion_request

# parsing this many bytes takes about a millisecond, for which no thread is worth its while
_BYTES_IN_LOOP = 64 * 1024

router = APIRouter(tags=["completions"])


@router.post(
    "/v1/completions",
    summary="Continue a text",
    response_model=Completion,
    responses=ERROR_RESPONSES,
    openapi_extra=request_body(CompletionRequest),
)
async def create_completion(request: Request) -> Response:
    """The whole answer as JSON, or with ``stream`` server-sent events that end with ``[DONE]``."""
    context = context_of(request)
    # refused before a byte of the body is read, and once more when all of it is here
    context.require_service()
    context.check_queue()
    settings = context.settings
    raw = await read_json_body(request.scope, request.receive, settings.max_body_size, settings.body_timeout)
    parse = parse_completion_request
    body = parse(raw) if len(raw) <= _BYTES_IN_LOOP else await asyncio.to_thread(parse, raw)
    return CompletionAnswer(context, context.require_service(), body)


def route() -> APIRoute:
    """The route that takes the short way."""
    (only,) = router.routes
    assert isinstance(only, APIRoute)
    return only
