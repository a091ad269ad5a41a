"""HTTP: routes, errors, keys, server-sent events, disconnects. The only room that knows FastAPI."""

from app.api.app import create_app
from app.api.context import Phase, ServerContext

__all__ = ["Phase", "ServerContext", "create_app"]
