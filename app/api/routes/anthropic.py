"""``POST /v1/messages``."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from app.api.completions import answer
from app.api.openapi import ANTHROPICS_SECURITY, ERROR_RESPONSES, request_body
from app.schemas.anthropic import AnthropicMessage, MessagesRequest
from app.serving.anthropic import MessagesJob, as_chat

router = APIRouter(tags=["chat"])


@router.post(
    "/v1/messages",
    summary="Go on with a conversation, in Anthropic's form",
    response_model=AnthropicMessage,
    responses=ERROR_RESPONSES,
    openapi_extra={**request_body(MessagesRequest), **ANTHROPICS_SECURITY},
)
async def create_message(request: Request) -> Response:
    """Text only. The key may stand in `x-api-key` as well."""
    return await answer(
        request, MessagesRequest, lambda service, body: MessagesJob(as_chat(body), service.chat, service.find_target)
    )
