"""Pages of other origins: allowed by name, with and without keys, on answers and on errors alike."""

from __future__ import annotations

from typing import Any

import pytest

from app.settings import SettingsError, load
from tests.api.conftest import KEY, Serve
from tests.api.test_errors import check_error

ORIGIN = "https://pages.example.com"
OTHER = "https://other.example.com"
PREFLIGHT = {
    "origin": ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-request-timeout",
}
PATHS = ("/v1/completions", "/v1/models", "/nothing")


@pytest.mark.anyio
async def test_off_by_default(serve: Serve) -> None:
    async with serve() as server:
        for path in PATHS:
            response = await server.client.options(path, headers=PREFLIGHT)
            assert response.status_code in (404, 405)
            assert not any(name.startswith("access-control") for name in response.headers)
        response = await server.client.get("/v1/models", headers={"origin": ORIGIN})
        assert not any(name.startswith("access-control") for name in response.headers)


@pytest.mark.anyio
@pytest.mark.parametrize("root_path", ["", "/mamba"])
async def test_a_preflight_needs_no_key(serve: Serve, root_path: str) -> None:
    async with serve(allowed_origins=[ORIGIN], api_key=[KEY], root_path=root_path) as server:
        for path in PATHS:
            response = await server.client.options(root_path + path, headers=PREFLIGHT)
            assert response.status_code == 200
            assert response.headers["access-control-allow-origin"] == ORIGIN
            assert "POST" in response.headers["access-control-allow-methods"]
            assert "x-request-timeout" in response.headers["access-control-allow-headers"]
            assert response.headers["x-request-id"]
        # one that is not a preflight does
        assert (await server.client.options("/v1/models", headers={"origin": ORIGIN})).status_code == 401


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"origin": OTHER}, "origin"),
        ({"access-control-request-method": "DELETE"}, "method"),
        ({"access-control-request-headers": "x-other"}, "headers"),
    ],
)
async def test_a_refused_preflight(serve: Serve, change: dict[str, str], word: str) -> None:
    settings: dict[str, Any] = {
        "allowed_methods": ["GET", "POST"],
        "allowed_headers": ["authorization", "content-type"],
    }
    async with serve(allowed_origins=[ORIGIN], **settings) as server:
        headers = {**PREFLIGHT, "access-control-request-headers": "authorization", **change}
        response = await server.client.options("/v1/completions", headers=headers)
        assert response.status_code == 400
        assert word in check_error(response.headers, response.content)["message"]
        assert ("access-control-allow-origin" in response.headers) == (word != "origin")


@pytest.mark.anyio
@pytest.mark.parametrize("origins", [[ORIGIN, "http://localhost:5173"], ["*"]])
async def test_answers_and_errors_can_be_read(
    serve: Serve, origins: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve(allowed_origins=origins, api_key=[KEY], key_requests_per_minute=3) as server:

        async def ask(headers: dict[str, str], **fields: Any) -> tuple[int, str | None]:
            body = {"prompt": "hello", "max_tokens": 2, **fields}
            headers = {"origin": ORIGIN, **headers}
            response = await server.client.post("/v1/completions", json=body, headers=headers)
            assert response.headers["access-control-expose-headers"] == "X-Request-Id, X-Session-ID, Retry-After"
            assert len(response.headers.get_list("x-request-id")) == 1
            return response.status_code, response.headers.get("access-control-allow-origin")

        key = {"authorization": f"Bearer {KEY}"}
        allowed = "*" if origins == ["*"] else ORIGIN
        assert await ask({}) == (401, allowed)
        assert await ask(key) == (200, allowed)
        assert await ask(key, stream=True) == (200, allowed)
        assert await ask({**key, "origin": OTHER}, n="x") == (400, "*" if allowed == "*" else None)
        assert await ask(key) == (429, allowed)
        response = await server.client.get("/nothing", headers={"origin": ORIGIN, **key})
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (404, allowed)

        def fail() -> bytes:
            raise RuntimeError("planted")

        monkeypatch.setattr(server.context.metrics, "render", fail)
        response = await server.client.get("/metrics", headers={"origin": ORIGIN})
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (500, allowed)
        check_error(response.headers, response.content, "server_error")


@pytest.mark.anyio
async def test_credentials(serve: Serve) -> None:
    async with serve(allowed_origins=["*"], allow_credentials=True) as server:
        response = await server.client.get("/v1/models", headers={"origin": ORIGIN, "cookie": "a=b"})
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert response.headers["access-control-allow-credentials"] == "true"
        assert response.headers["vary"] == "Origin"


@pytest.mark.parametrize("origin", ["https://example.com/", "example.com", "https://a.com/path", "https://A.com", ""])
def test_what_is_not_an_origin(origin: str) -> None:
    with pytest.raises(SettingsError, match="--allowed-origins: an origin is"):
        load({"model": "a/b", "allowed_origins": [origin]})
