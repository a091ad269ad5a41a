"""Answers to browsers' questions whether a page of another origin may call this server."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from app.api.errors import HttpError, error_response

# what a page may read of an answer beside its body
EXPOSED_HEADERS = ("X-Request-Id", "X-Session-ID", "Retry-After")


class Cors(CORSMiddleware):
    """Starlette's, with refusals in the body that all errors have."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """The answer to a preflight, which carries no key and reaches no route."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        headers = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        message = bytes(response.body).decode("ascii")
        return error_response(HttpError(response.status_code, message, headers=headers))
