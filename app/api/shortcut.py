"""The way of completions past the framework, whose layers cost more than all that is done for a request."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.errors import error_response
from app.api.gate import Gate
from app.serving.errors import RequestError


class ShortcutApp(FastAPI):
    """Requests to ``shortcut_paths`` meet the application's own middleware and then the endpoint of ``shortcut``.

    FastAPI documents the route and answers other methods. The endpoint takes the request alone and returns a response.
    """

    shortcut: APIRoute
    shortcut_paths: frozenset[str]

    def build_middleware_stack(self) -> ASGIApp:
        """Called once by Starlette, before the first request."""
        answer: ASGIApp = _Endpoint(self.shortcut)
        for layer in reversed(self.user_middleware):
            answer = layer.cls(answer, *layer.args, **layer.kwargs)
        return _Switch(super().build_middleware_stack(), answer, self.shortcut_paths, self.shortcut.methods or set())


class _Switch:
    def __init__(self, framework: ASGIApp, answer: ASGIApp, paths: frozenset[str], methods: set[str]) -> None:
        self._framework = framework
        self._answer = answer
        self._paths = paths
        self._methods = methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_short = scope["path"] in self._paths and scope["method"] in self._methods
        await (self._answer if is_short else self._framework)(scope, receive, send)


class _Endpoint:
    def __init__(self, route: APIRoute) -> None:
        self._route = route
        self._gate = Gate()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = self._route
        try:
            await self._gate.enter()
            response = await self._route.endpoint(Request(scope, receive, send))
            await response(scope, receive, send)
        except RequestError as error:
            await error_response(error)(scope, receive, send)
