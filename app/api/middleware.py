"""What holds for every request: an id, a line in the log, a clean 500, a key, and an end to bodies nobody reads."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import HttpError, as_request_error, error_response
from app.api.headers import find_header, header_values
from app.api.keys import KeyRing
from app.api.open_requests import ClientGone
from app.logging import bind_request, current_notes, note
from app.serving.errors import Overloaded

# asked every few seconds, so that the log tells of them only when they fail
PROBE_PATHS = frozenset({"/livez", "/readyz", "/health", "/metrics"})
# what log and metrics call the status of an answer that nobody waited for
STATUS_CLIENT_GONE = 499

MAX_ID_CHARACTERS = 128

_ANTHROPIC_PATHS = frozenset({"/v1/messages", "/v1/messages/count_tokens"})

_NOT_IN_ID = re.compile(r"[^A-Za-z0-9._:/+=@-]")
_MAX_PATH_CHARACTERS = 200
_SMALL_BODY = 64 * 1024
_LINGER_SECONDS = 1.0

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("app.access")

OnAnswer = Callable[[str, str, int], None]


class RequestContext:
    """Gives each request its id, and tells log and metrics how it was answered."""

    def __init__(self, app: ASGIApp, on_answer: OnAnswer, has_access_log: bool) -> None:
        self._app = app
        self._on_answer = on_answer
        self._has_access_log = has_access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started_at = time.perf_counter()
        request_id = clean_request_id(find_header(scope, b"x-request-id"))
        notes = bind_request(request_id)
        status = STATUS_CLIENT_GONE

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode("ascii"))]
                if "session" in notes:
                    message["headers"].append((b"x-session-id", notes["session"].encode("ascii")))
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientGone:
            status = STATUS_CLIENT_GONE
        finally:
            self._tell(scope, status, time.perf_counter() - started_at, notes)

    def _tell(self, scope: Scope, status: int, seconds: float, notes: dict[str, Any]) -> None:
        route = getattr(scope.get("route"), "path", None)
        # methods and paths that no route has are the client's words, which may not become labels
        self._on_answer(route or "other", scope["method"] if route else "other", status)
        if self._has_access_log:
            line = f"{scope['method']} {scope['path'][:_MAX_PATH_CHARACTERS]} {status}"
            level = logging.DEBUG if route in PROBE_PATHS and status == 200 else logging.INFO
            access_logger.log(level, line, extra={"duration_ms": round(seconds * 1000, 1), **notes})


class CleanErrors:
    """Answers what nobody caught with a plain 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_started = False

        async def watched_send(message: Message) -> None:
            nonlocal is_started
            is_started = True
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except ClientGone:
            raise
        except Exception as error:
            logger.exception("request failed")
            if is_started:
                # the answer has begun and cannot be mended; the server below cuts the connection
                raise
            await error_response(as_request_error(error))(scope, receive, send)


class HeadAsGet:
    """Lets every route that answers GET answer HEAD as well; the server below leaves out the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # the server looks into its own scope for what was asked
        await self._app({**scope, "method": "GET"} if scope["method"] == "HEAD" else scope, receive, send)


class RootPath:
    """Serves under a prefix, whether the proxy in front cuts it off or not."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["root_path"] = self._root_path
        if not scope["path"].startswith(self._root_path + "/"):
            is_prefix = scope["path"] == self._root_path
            scope["path"] = self._root_path + ("/" if is_prefix else scope["path"])
        await self._app(scope, receive, send)


class ApiKeys:
    """Answers 401 unless a request carries one of the keys or its path is one of a fixed list, and 429 to a key whose
    limits are reached. Both come before the body is read; only requests with a body count."""

    def __init__(self, app: ASGIApp, ring: KeyRing, open_paths: frozenset[str], root_path: str) -> None:
        self._app = app
        self._ring = ring
        self._open_paths = open_paths
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(self._root_path)
        if path in self._open_paths:
            await self._app(scope, receive, send)
            return
        account = self._ring.find(_authorizations(scope, path))
        if account is None:
            await _unauthorized()(scope, receive, send)
            return
        note(key=account.name)
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            account.enter()
        except Overloaded as error:
            await error_response(error)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            # what the log is told of a completion is what it took
            notes = current_notes()
            account.leave(notes.get("prompt_tokens", 0) + notes.get("generated_tokens", 0))


class LingeringClose:
    """Ends connections whose body is large and was not read, after the client had a moment to see the answer.

    Without the moment, closing while bytes still arrive resets the connection, and the answer is lost.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _has_large_body(scope):
            await self._app(scope, receive, send)
            return
        is_read = False
        is_closing = False

        async def watched_receive() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = is_read or not message.get("more_body", False)
            return message

        async def lingering_send(message: Message) -> None:
            nonlocal is_closing
            if message["type"] == "http.response.start" and not is_read:
                is_closing = True
                MutableHeaders(scope=message)["Connection"] = "close"
            if is_closing and message["type"] == "http.response.body" and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await _discard(watched_receive, lambda: is_read)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        await self._app(scope, watched_receive, lingering_send)


def clean_request_id(given: str | None) -> str:
    """The client's id without what does not belong into a header or a log, or a new one."""
    kept = _NOT_IN_ID.sub("", given)[:MAX_ID_CHARACTERS] if given else ""
    return kept or secrets.token_hex(16)


def _authorizations(scope: Scope, path: str) -> list[str]:
    """What the request carries as its key, for which clients of Anthropic's API have a header of their own."""
    values = header_values(scope, b"authorization")
    if path in _ANTHROPIC_PATHS and not values:
        return [f"Bearer {key}" for key in header_values(scope, b"x-api-key")]
    return values


def _unauthorized() -> Response:
    headers = {"WWW-Authenticate": "Bearer"}
    message = "a valid API key is needed: Authorization: Bearer KEY"
    error = HttpError(401, message, type="authentication_error", code="invalid_api_key", headers=headers)
    return error_response(error)


def _has_large_body(scope: Scope) -> bool:
    if find_header(scope, b"transfer-encoding") is not None:
        return True
    length = find_header(scope, b"content-length") or "0"
    return not length.isdecimal() or int(length) > _SMALL_BODY


async def _discard(receive: Receive, is_read: Callable[[], bool]) -> None:
    try:
        async with asyncio.timeout(_LINGER_SECONDS):
            while not is_read():
                await receive()
    except TimeoutError:
        pass
