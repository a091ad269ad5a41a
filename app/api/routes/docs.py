"""``GET /docs``: the routes as a page to read and to try them on, all of it from this server.

Every address in the page is relative, so that it works under whatever path a proxy has put it.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, RedirectResponse

from app.api.errors import HttpError

OPENAPI_PATH = "/openapi.json"
_START = "start.js"
# of Swagger UI, as a package brings it along
_ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}
DOCS_PATHS = frozenset({"/", "/docs", OPENAPI_PATH, *(f"/docs/{name}" for name in (_START, *_ASSETS))})

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>mamba-serve</title>
<link rel="icon" href="docs/favicon-32x32.png">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="routes"></div>
<noscript>This page needs JavaScript. The same is in <a href="openapi.json">openapi.json</a>.</noscript>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
_SCRIPT = """SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#routes",
  deepLinking: true,
  displayRequestDuration: true,
  defaultModelRendering: "model",
  defaultModelExpandDepth: 2,
  defaultModelsExpandDepth: 0,
  validatorUrl: null,
});
"""
# Swagger UI writes styles into its elements
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}

router = APIRouter(include_in_schema=False)


@router.get("/")
async def root(request: Request) -> Response:
    # seen from a path without a slash at its end, "docs" alone would be beside it
    last = request.scope["raw_path"].rpartition(b"/")[2].decode("latin-1")
    return RedirectResponse(f"{last}/docs" if last else "docs")


@router.get("/docs")
async def page() -> Response:
    return Response(_PAGE, media_type="text/html", headers=_HEADERS)


@router.get("/docs/{name}")
async def asset(name: str) -> Response:
    headers = {**_HEADERS, "Cache-Control": "max-age=3600"}
    if name == _START:
        return Response(_SCRIPT, media_type="text/javascript", headers=headers)
    if name not in _ASSETS:
        raise HttpError(404, "there is no such part of the page")
    path = Path(str(files("fastapi_swagger") / "resources" / name))
    return FileResponse(path, media_type=_ASSETS[name], headers=headers)
