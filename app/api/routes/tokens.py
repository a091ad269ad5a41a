"""``POST /tokenize``, ``POST /detokenize`` and ``POST /v1/messages/count_tokens``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fastapi import APIRouter, Request, Response

from app.api.body import read_json_body
from app.api.dependencies import context_of
from app.api.openapi import ANTHROPICS_SECURITY, ERROR_RESPONSES, request_body
from app.schemas.anthropic import CountTokensRequest, TokenCount
from app.schemas.tokens import DetokenizedText, DetokenizeRequest, TokenizeRequest, Tokens
from app.schemas.wire import Body
from app.serving.parsing import parse_request
from app.serving.tokens import TokenService

# the work on this many bytes takes some two milliseconds, for which no thread is worth its while
_BYTES_IN_LOOP = 16 * 1024
# a chat template may take as long as the work on this many
_BYTES_OF_A_TEMPLATE = 1024 * 1024

router = APIRouter(tags=["tokens"])


@router.post(
    "/tokenize",
    summary="Token ids of a text or a conversation",
    response_model=Tokens,
    responses=ERROR_RESPONSES,
    openapi_extra=request_body(TokenizeRequest),
)
async def tokenize(request: Request) -> Response:
    """What the model would read, without asking it."""
    return await _answer(request, TokenizeRequest, TokenService.tokenize, lambda body: body.messages is not None)


@router.post(
    "/detokenize",
    summary="The text of token ids",
    response_model=DetokenizedText,
    responses=ERROR_RESPONSES,
    openapi_extra=request_body(DetokenizeRequest),
)
async def detokenize(request: Request) -> Response:
    """Special tokens stand in it as they are written."""
    return await _answer(request, DetokenizeRequest, TokenService.detokenize, lambda _: False)


@router.post(
    "/v1/messages/count_tokens",
    summary="How many tokens a conversation has, in Anthropic's form",
    response_model=TokenCount,
    responses=ERROR_RESPONSES,
    openapi_extra={**request_body(CountTokensRequest), **ANTHROPICS_SECURITY},
)
async def count_tokens(request: Request) -> Response:
    """What the model would read, without asking it. The key may stand in `x-api-key` as well."""
    return await _answer(request, CountTokensRequest, TokenService.count, lambda _: True)


async def _answer(
    request: Request,
    model: type[Body],
    work: Callable[[TokenService, Body], bytes],
    is_slow: Callable[[Body], bool],
) -> Response:
    context = context_of(request)
    # refused before a byte of the body is read, and once more when all of it is here
    context.require_tokens()
    context.token_work.check()
    settings = context.settings
    raw = await read_json_body(request.scope, request.receive, settings.max_body_size, settings.body_timeout)
    service = context.require_tokens()
    is_short = len(raw) <= _BYTES_IN_LOOP
    with context.token_work.hold(len(raw)):
        body = parse_request(model, raw) if is_short else await asyncio.to_thread(parse_request, model, raw)
    num_bytes = max(len(raw), _BYTES_OF_A_TEMPLATE) if is_slow(body) else len(raw)
    with context.token_work.hold(num_bytes):
        is_quick = is_short and not is_slow(body)
        content = work(service, body) if is_quick else await asyncio.to_thread(work, service, body)
    return Response(content, media_type="application/json")
