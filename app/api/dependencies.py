"""What routes ask for in their signatures."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from app.api.context import ServerContext


def context_of(request: Request) -> ServerContext:
    """The objects of the server that got this request."""
    context: ServerContext = request.app.state.context
    return context


async def _context(request: Request) -> ServerContext:
    # a plain function would be sent to a thread
    return context_of(request)


Context = Annotated[ServerContext, Depends(_context)]
