"""``POST /v1/completions``."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from app.api.completions import answer
from app.api.openapi import ERROR_RESPONSES, request_body
from app.schemas.completions import Completion, CompletionRequest
from app.serving.completions import CompletionService

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
    return await answer(request, CompletionRequest, CompletionService.job)
