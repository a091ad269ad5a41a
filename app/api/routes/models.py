"""``GET /v1/models`` and ``GET /v1/models/{id}``."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from app.api.dependencies import Context
from app.api.openapi import error_responses
from app.schemas.models import ModelCard, ModelList

router = APIRouter(tags=["models"])


@router.get("/v1/models", summary="What is served", responses=error_responses(401, 503))
async def list_models(context: Context) -> ModelList:
    return context.catalog.list()


@router.get(
    "/v1/models/{model:path}",
    summary="One of the names that are served",
    responses=error_responses(401, 404, 503),
)
async def get_model(model: Annotated[str, Path(description="a name that is served")], context: Context) -> ModelCard:
    return context.catalog.get(model)
