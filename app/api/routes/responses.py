"""``/v1/responses``: answers that are kept, and conversations that go on after them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from app.api.completions import answer
from app.api.dependencies import Context, context_of
from app.api.openapi import ERROR_RESPONSES, error_responses, request_body
from app.logging import current_notes
from app.schemas.responses import DeletedResponse, ResponseObject, ResponsesRequest
from app.serving.completions import CompletionService
from app.serving.errors import UnsupportedParameter
from app.serving.jobs import Job
from app.serving.responses import make_job

router = APIRouter(tags=["responses"])
stored_router = APIRouter(tags=["responses"])

_Id = Annotated[str, Path(description="id of a response that is kept")]
# what may be asked of a kept response elsewhere, with the values that change nothing
_UNSUPPORTED: dict[str, tuple[str, ...]] = {"stream": ("false",), "include": (), "starting_after": ()}
_ERRORS = error_responses(400, 401, 404)


@router.post(
    "/v1/responses",
    summary="Answer, and keep the answer to go on after it",
    response_model=ResponseObject,
    responses=ERROR_RESPONSES,
    openapi_extra=request_body(ResponsesRequest),
)
async def create_response(request: Request) -> Response:
    """The whole answer as JSON, or with ``stream`` OpenAI's typed events, without ``[DONE]``."""
    context = context_of(request)

    def job(service: CompletionService, body: ResponsesRequest) -> Job:
        return make_job(
            body,
            service.chat,
            service.find_target,
            context.responses,
            _owner(),
            has_length_limit=context.limits.max_model_len is not None,
        )

    return await answer(request, ResponsesRequest, job)


@stored_router.get(
    "/v1/responses/{response_id}",
    summary="A response that is kept",
    response_model=ResponseObject,
    responses=_ERRORS,
)
async def get_response(response_id: _Id, request: Request, context: Context) -> Response:
    """As it was answered. Only for the key that asked for it."""
    for name, value in request.query_params.items():
        if (field := name.removesuffix("[]")) in _UNSUPPORTED and value not in _UNSUPPORTED[field]:
            raise UnsupportedParameter(field)
    stored = context.responses.get(_owner(), response_id)
    return Response(stored.answer, media_type="application/json")


@stored_router.delete("/v1/responses/{response_id}", summary="Forget a response", responses=_ERRORS)
async def delete_response(response_id: _Id, context: Context) -> DeletedResponse:
    """Responses that went on after it stay, and still know all of the conversation."""
    context.responses.delete(_owner(), response_id)
    return DeletedResponse(id=response_id)


def _owner() -> str | None:
    """The name of the request's key, as the log has it; None where the server is open."""
    name: str | None = current_notes().get("key")
    return name
