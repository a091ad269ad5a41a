"""The page of routes: everything it loads comes from this server, under any path, with a key or without."""

from __future__ import annotations

import re
from urllib.parse import urljoin

import pytest

from app.api.routes.docs import DOCS_PATHS
from tests.api.conftest import KEY, Serve
from tests.api.test_errors import check_error


@pytest.mark.anyio
@pytest.mark.parametrize("root_path", ["", "/behind/proxy"])
async def test_the_page_is_whole(serve: Serve, root_path: str) -> None:
    async with serve(root_path=root_path) as server:
        page = await server.client.get(root_path + "/docs")
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        parts = re.findall(r'(?:href|src)="([^"]+)"', page.text)
        assert len(parts) == 5
        for part in parts:
            response = await server.client.get(urljoin(str(page.url), part))
            assert response.status_code == 200, part
            assert len(response.content) > 100
            assert response.headers["content-type"].partition(";")[0] == KINDS[part.rpartition(".")[2]]
        schema = (await server.client.get(root_path + "/openapi.json")).json()
        assert schema.get("servers") == ([{"url": root_path}] if root_path else None)


KINDS = {"png": "image/png", "css": "text/css", "js": "text/javascript", "json": "application/json"}


@pytest.mark.anyio
async def test_nothing_is_loaded_from_elsewhere(serve: Serve) -> None:
    async with serve() as server:
        page = await server.client.get("/docs")
        script = await server.client.get("/docs/start.js")
        assert "//" not in page.text + script.text
        # and a browser is told to refuse what the page might ask for all the same
        for response in (page, script):
            policy = response.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'; ")
            assert "http" not in policy


@pytest.mark.anyio
async def test_the_start_of_the_server_leads_there(serve: Serve) -> None:
    async with serve(root_path="/mamba") as server:
        for path in ("/", "/mamba/"):
            response = await server.client.get(path, follow_redirects=True)
            assert response.status_code == 200
            assert response.url.path == path + "docs"
    async with serve(root_path="/behind/proxy") as server:
        response = await server.client.get("/behind/proxy", follow_redirects=True)
        assert (response.status_code, response.url.path) == (200, "/behind/proxy/docs")


@pytest.mark.anyio
async def test_other_files_are_not_there(serve: Serve) -> None:
    async with serve() as server:
        for name in ("main.py", "..%2fmain.py", "%2e%2e/main.py", "__init__.py", ""):
            response = await server.client.get(f"/docs/{name}")
            assert response.status_code == 404
            check_error(response.headers, response.content)


@pytest.mark.anyio
async def test_keys_close_it_unless_it_is_opened(serve: Serve) -> None:
    async with serve(api_key=[KEY]) as server:
        for path in DOCS_PATHS:
            assert (await server.client.get(path)).status_code == 401
            headers = {"authorization": f"Bearer {KEY}"}
            assert (await server.client.get(path, headers=headers)).status_code in (200, 307)
    async with serve(api_key=[KEY], open_docs=True, root_path="/mamba") as server:
        for path in DOCS_PATHS:
            for prefix in ("", "/mamba"):
                assert (await server.client.get(prefix + path)).status_code in (200, 307)
        assert (await server.client.get("/docs/other")).status_code == 401
        assert (await server.client.get("/v1/models")).status_code == 401


@pytest.mark.anyio
async def test_it_can_be_switched_off(serve: Serve) -> None:
    async with serve(disable_docs=True) as server:
        for path in DOCS_PATHS:
            response = await server.client.get(path)
            assert response.status_code == 404
            check_error(response.headers, response.content)
