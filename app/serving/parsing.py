"""From the bytes of a body to a checked request."""

from __future__ import annotations

from app.schemas.json import BodyError
from app.schemas.wire import Body, parse_body
from app.serving.errors import InvalidRequest


def parse_request(model: type[Body], raw: bytes) -> Body:
    """The request that a body holds. Raises InvalidRequest."""
    try:
        return parse_body(model, raw)
    except BodyError as error:
        raise InvalidRequest(error.message, param=error.param) from None
