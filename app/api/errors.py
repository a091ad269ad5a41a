"""Failures as HTTP answers: one body for every status, and the same one inside a stream.

RequestError             what serving refuses or fails at (its tree stands in app.serving.errors)
  HttpError              what HTTP itself refuses: 401, 404, 405, 408, 413, 415, 431
anything else            500, whose cause only the log tells
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import orjson
from fastapi import Response

from app.engine.interface import EngineError
from app.serving.errors import RequestError, ServerFailure, Unavailable


class HttpError(RequestError):
    """A request that HTTP refuses before serving sees it."""

    type = "invalid_request_error"

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, code=code)
        self.status = status
        self.type = type or self.type
        self.headers = dict(headers or {})


def as_request_error(error: Exception) -> RequestError:
    """What a client is told of any exception."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, EngineError):
        return Unavailable("the engine went away while it held this request; try again")
    return ServerFailure("the server failed to answer; its log tells why, under the id of this request")


def error_bytes(error: RequestError) -> bytes:
    """The JSON body."""
    return orjson.dumps(error.body())


def error_response(error: RequestError) -> Response:
    """The answer to a request of which nothing has been answered yet."""
    headers = dict(error.headers) if isinstance(error, HttpError) else {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == 503:
        # whoever asks again should find another server, or this one once it is back
        headers["Connection"] = "close"
    return Response(error_bytes(error), error.status, headers=headers, media_type="application/json")
