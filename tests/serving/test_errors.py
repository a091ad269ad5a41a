"""Every refusal has a status and a body in one shape."""

from __future__ import annotations

import pytest

from app.schemas.errors import ErrorBody
from app.serving import errors


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (errors.InvalidRequest("m", param="n"), 400, "invalid_request_error", None),
        (errors.UnsupportedParameter("tools"), 400, "invalid_request_error", "unsupported_parameter"),
        (errors.ContextLengthExceeded("m"), 400, "invalid_request_error", "context_length_exceeded"),
        (errors.ModelNotFound("m"), 404, "invalid_request_error", "model_not_found"),
        (errors.Overloaded("m", retry_after=2), 429, "rate_limit_error", "rate_limit_exceeded"),
        (errors.Unavailable("m"), 503, "service_unavailable_error", "server_is_unavailable"),
        (errors.ServerFailure("m"), 500, "server_error", "server_failure"),
    ],
)
def test_leaves(error: errors.RequestError, status: int, kind: str, code: str | None) -> None:
    body = ErrorBody.model_validate(error.body()).error
    assert (error.status, body.type, body.code) == (status, kind, code)
    assert (error.retry_after is not None) == (status in (429, 503))


def test_no_more_than_a_hundred_characters_come_back() -> None:
    message = errors.ModelNotFound("x" * 10_000).message
    assert message.count("x") <= errors.MAX_ECHOED_CHARACTERS
    assert "\n" not in errors.ModelNotFound("a\nb").message
