"""``POST /v1/chat/completions``."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from app.api.completions import answer
from app.api.openapi import ERROR_RESPONSES, request_body
from app.schemas.chat import ChatCompletion, ChatRequest
from app.serving.completions import CompletionService

router = APIRouter(tags=["chat"])


@router.post(
    "/v1/chat/completions",
    summary="Go on with a conversation",
    response_model=ChatCompletion,
    responses=ERROR_RESPONSES,
    openapi_extra=request_body(ChatRequest),
)
async def create_chat_completion(request: Request) -> Response:
    """The whole answer as JSON, or with ``stream`` server-sent events that end with ``[DONE]``."""
    return await answer(request, ChatRequest, CompletionService.chat_job)
