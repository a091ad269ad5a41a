"""A route that FastAPI documents and does not otherwise stand in the way of."""

from __future__ import annotations

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send


class PlainRoute(APIRoute):
    """Its endpoint takes the request alone and returns a response, which is all that happens.

    Solving dependencies, exit stacks and a second handler of exceptions cost as much as parsing and submitting a
    completion.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in self.methods:
            # tells which methods there are
            await super().handle(scope, receive, send)
            return
        response = await self.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)
