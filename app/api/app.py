"""The application: plain construction from objects that are passed in."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Match

from app import __version__
from app.api.context import ServerContext
from app.api.cors import EXPOSED_HEADERS, Cors
from app.api.errors import HttpError, as_request_error, error_response
from app.api.middleware import PROBE_PATHS, ApiKeys, CleanErrors, HeadAsGet, LingeringClose, RequestContext, RootPath
from app.api.openapi import describe, make_schema
from app.api.routes import anthropic, chat, completions, docs, models, operations, responses, tokens
from app.api.shortcut import ShortcutApp
from app.serving.errors import RequestError
from app.settings import Settings

METRICS_PATH = "/metrics"
# paths that need no key; everything else does, what does not exist included
OPEN_PATHS = PROBE_PATHS - {METRICS_PATH}

ROUTERS = (
    completions.router,
    chat.router,
    responses.router,
    responses.stored_router,
    anthropic.router,
    models.router,
    tokens.router,
    operations.router,
)
# requests for tokens, which go past the framework
SHORT_ROUTERS = (completions.router, chat.router, responses.router, anthropic.router)

_TITLE = "mamba-serve"
_DESCRIPTION = "Mamba language models behind OpenAI's API. Errors of every route have the same body."


def create_app(context: ServerContext) -> FastAPI:
    """The application over one server's objects."""
    app = ShortcutApp(
        title=_TITLE,
        version=__version__,
        description=_DESCRIPTION,
        openapi_url=None if context.settings.disable_docs else docs.OPENAPI_PATH,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=_middleware(context),
        exception_handlers={RequestError: _on_request_error, HTTPException: _on_http_exception},
    )
    app.state.context = context
    for router in ROUTERS:
        app.include_router(router)
    if not context.settings.disable_docs:
        app.include_router(docs.router)
    short = [route for router in SHORT_ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    app.shortcuts = {prefix + route.path: route for route in short for prefix in ("", context.settings.root_path)}
    app.gate = context.gate
    describe(app)
    return app


def document() -> dict[str, Any]:
    """What /openapi.json holds, which is the same for every server but for its path."""
    app = FastAPI(title=_TITLE, version=__version__, description=_DESCRIPTION)
    for router in ROUTERS:
        app.include_router(router)
    return make_schema(app)


def _middleware(context: ServerContext) -> list[Middleware]:
    settings = context.settings
    on_answer, has_access_log = context.metrics.on_answer, not settings.disable_access_log
    layers = [
        Middleware(HeadAsGet),
        Middleware(RequestContext, on_answer=on_answer, has_access_log=has_access_log),
    ]
    if settings.root_path:
        layers.insert(0, Middleware(RootPath, root_path=settings.root_path))
    if settings.allowed_origins:
        layers.append(_cors(settings))
    layers += [Middleware(CleanErrors), Middleware(LingeringClose)]
    if context.keys:
        open_paths = OPEN_PATHS if settings.protect_metrics else OPEN_PATHS | {METRICS_PATH}
        open_paths |= docs.DOCS_PATHS if settings.open_docs else frozenset()
        layers.append(Middleware(ApiKeys, ring=context.keys, open_paths=open_paths, root_path=settings.root_path))
    return layers


def _cors(settings: Settings) -> Middleware:
    return Middleware(
        Cors,
        allow_origins=settings.allowed_origins,
        allow_methods=settings.allowed_methods,
        allow_headers=settings.allowed_headers,
        allow_credentials=settings.allow_credentials,
        expose_headers=EXPOSED_HEADERS,
    )


async def _on_request_error(request: Request, error: Exception) -> Response:  # noqa: ARG001 (Starlette's signature)
    return error_response(as_request_error(error))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = error.headers
    if error.status_code == 404:
        message = f"there is no route {request.method[:10]} {request.scope['path'][:80]!r}"
    elif error.status_code == 405:
        message, headers = f"this route does not take {request.method[:10]}", {"Allow": _methods(request)}
    else:
        message = error.detail
    return error_response(HttpError(error.status_code, message, headers=headers))


def _methods(request: Request) -> str:
    """What the path takes, over all routes that share it."""
    routes = [route for router in (*ROUTERS, docs.router) for route in router.routes if isinstance(route, APIRoute)]
    matching = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    methods = {method for route in matching for method in route.methods or ()}
    return ", ".join(sorted(methods | {"HEAD"} if "GET" in methods else methods))
