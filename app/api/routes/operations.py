"""What operators, probes and scrapers ask: alive, ready, counts, version. Never a generation."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from app import __version__
from app.api.dependencies import Context
from app.api.errors import HttpError, error_response
from app.api.openapi import error_responses
from app.metrics import CONTENT_TYPE
from app.schemas.operations import Health, Load, Version
from app.serving.errors import Unavailable

router = APIRouter(tags=["operations"])

_NOT_NOW = error_responses(503)
_TEXT: dict[int | str, dict[str, Any]] = {
    200: {"description": "One line per sample", "content": {"text/plain": {"schema": {"type": "string"}}}}
}


@router.get(
    "/livez", summary="Does the process answer, and does its engine move?", response_model=Health, responses=_NOT_NOW
)
async def live(context: Context) -> Response:
    """503 only when a restart is the remedy: a step has taken far too long."""
    if context.stuck_seconds() > 2 * context.settings.heartbeat_timeout:
        return error_response(Unavailable("the engine has been stuck for a long time"))
    return Response(b'{"status":"live"}', media_type="application/json")


@router.get("/readyz", summary="Would a request sent now be admitted?", response_model=Health, responses=_NOT_NOW)
@router.get("/health", summary="The same as /readyz", response_model=Health, responses=_NOT_NOW)
async def ready(context: Context) -> Response:
    """503 while loading, draining or without an engine; a full queue stays ready and answers 429."""
    obstacle = context.find_obstacle()
    if obstacle is not None:
        return error_response(obstacle)
    return Response(b'{"status":"ready"}', media_type="application/json")


@router.get("/metrics", summary="Counts in Prometheus' text format", responses={**_TEXT, **error_responses(401, 404)})
async def metrics(context: Context) -> Response:
    """Open unless the operator protects it; 404 where it is switched off."""
    if context.settings.disable_metrics:
        raise HttpError(404, "metrics are switched off")
    return Response(context.metrics.render(), media_type=CONTENT_TYPE)


@router.get("/version", summary="Version of the server", responses=error_responses(401))
async def version() -> Version:
    return Version(version=__version__)


@router.get("/load", summary="Live counts", responses=error_responses(401))
async def load(context: Context) -> Load:
    """Sequences that run and wait in the engine, requests open here, slots, and whether requests are admitted."""
    stats = context.engine.stats
    return Load(
        server_load=len(context.open_requests),
        phase=context.phase,
        ready=context.find_obstacle() is None,
        num_open_requests=len(context.open_requests),
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        num_slots_used=stats.num_slots_used,
        num_slots=stats.num_slots,
        num_engine_restarts=context.engine.num_restarts,
    )
