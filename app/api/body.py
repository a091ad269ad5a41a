"""The raw body of a JSON request, read with a limit of size and of time."""

from __future__ import annotations

import asyncio

from starlette.types import Receive, Scope

from app.api.connection import find_connection
from app.api.errors import HttpError
from app.api.headers import find_header, header_values
from app.api.open_requests import ClientGone

_JSON = "application/json"
_CHARSETS = ("", "charset=utf-8", 'charset="utf-8"')


async def read_json_body(scope: Scope, receive: Receive, max_bytes: int, timeout: float) -> bytes:
    """All bytes of a body that says it is JSON. Raises HttpError 408, 413, 415, and ClientGone.

    A body that is too large is not read beyond its limit, and not at all when Content-Length tells.
    """
    _check_form(scope)
    if _declared_length(scope) > max_bytes:
        raise _too_large(max_bytes)
    connection = find_connection(scope)
    if connection is not None and connection.has_body:
        # there is nothing to wait for, and a clock costs half of what checking the fields of a short body does
        return await _read(receive, max_bytes)
    try:
        async with asyncio.timeout(timeout):
            return await _read(receive, max_bytes)
    except TimeoutError:
        raise HttpError(408, "the body of the request took too long to arrive", type="timeout_error") from None


async def _read(receive: Receive, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    num_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        num_bytes += len(part)
        if num_bytes > max_bytes:
            raise _too_large(max_bytes)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _check_form(scope: Scope) -> None:
    content_types = header_values(scope, b"content-type")
    media_type, _, parameter = content_types[0].partition(";") if len(content_types) == 1 else ("", "", "")
    if media_type.strip().lower() != _JSON or parameter.strip().lower() not in _CHARSETS:
        raise HttpError(415, f"the Content-Type of the request should be {_JSON}, in UTF-8")
    encoding = find_header(scope, b"content-encoding")
    if encoding is not None and encoding.lower() != "identity":
        raise HttpError(415, "the body of the request should not be compressed")


def _declared_length(scope: Scope) -> int:
    length = find_header(scope, b"content-length") or "0"
    return int(length) if length.isascii() and length.isdecimal() else 0


def _too_large(max_bytes: int) -> HttpError:
    return HttpError(413, f"the body of the request is larger than {max_bytes} bytes")
