"""From the bytes of a body to a checked request."""

from __future__ import annotations

from app.schemas.completions import CompletionRequest, parse_completion
from app.schemas.json import BodyError
from app.serving.errors import InvalidRequest


def parse_completion_request(raw: bytes) -> CompletionRequest:
    """The completion request that a body holds. Raises InvalidRequest."""
    try:
        return parse_completion(raw)
    except BodyError as error:
        raise InvalidRequest(error.message, param=error.param) from None
