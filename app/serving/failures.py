"""What the engine fails at, in the words of the API."""

from __future__ import annotations

from app.engine.interface import EngineDied, EngineError, EngineUnavailable
from app.engine.request import FinishReason, TokenEvent
from app.serving.errors import InvalidRequest, RequestError, ServerFailure, Unavailable


def request_error(error: EngineError) -> RequestError:
    """What a client is told of an engine that is not there or has gone."""
    if isinstance(error, EngineUnavailable):
        return Unavailable("the model is not ready to take requests")
    if isinstance(error, EngineDied):
        return Unavailable("the engine was lost while it worked on this request; it is started again")
    return ServerFailure("the engine failed on this request")


def token_failure(event: TokenEvent) -> RequestError | None:
    """Why a sample ended without an end of its own, if it did."""
    if event.finish_reason is FinishReason.INVALID:
        return InvalidRequest(event.error or "what the request demands of its output cannot be had")
    if event.error is not None or event.finish_reason is FinishReason.ERROR:
        return ServerFailure(event.error or "the model failed on this request")
    if event.finish_reason is FinishReason.ABORT:
        return Unavailable("the server stopped this request before its end")
    return None
