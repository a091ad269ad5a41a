"""The way of requests for tokens past the framework, whose layers cost more than all that is done for them."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.errors import error_response
from app.api.gate import Gate
from app.serving.errors import RequestError


class ShortcutApp(FastAPI):
    """Requests to the paths of ``shortcuts`` meet the application's own middleware and then the endpoint of the route.

    FastAPI documents the routes and answers other methods. Endpoints take the request alone and return a response.
    """

    shortcuts: Mapping[str, APIRoute]
    gate: Gate

    def build_middleware_stack(self) -> ASGIApp:
        """Called once by Starlette, before the first request."""
        answer: ASGIApp = _Endpoint(self.shortcuts, self.gate)
        for layer in reversed(self.user_middleware):
            answer = layer.cls(answer, *layer.args, **layer.kwargs)
        return _Switch(super().build_middleware_stack(), answer, self.shortcuts)


class _Switch:
    def __init__(self, framework: ASGIApp, answer: ASGIApp, routes: Mapping[str, APIRoute]) -> None:
        self._framework = framework
        self._answer = answer
        self._methods = {path: route.methods or set() for path, route in routes.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_short = scope["method"] in self._methods.get(scope["path"], ())
        await (self._answer if is_short else self._framework)(scope, receive, send)


class _Endpoint:
    def __init__(self, routes: Mapping[str, APIRoute], gate: Gate) -> None:
        self._routes = routes
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = scope["route"] = self._routes[scope["path"]]
        try:
            await self._gate.enter()
            response = await route.endpoint(Request(scope, receive, send))
            await response(scope, receive, send)
        except RequestError as error:
            await error_response(error)(scope, receive, send)
