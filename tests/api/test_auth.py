"""Every route but a fixed list needs a key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from app.api.app import METRICS_PATH, OPEN_PATHS
from tests.api.conftest import Serve
from tests.api.raw import exchange, post
from tests.api.test_errors import check_error


def all_paths(routes: list[Any]) -> set[str]:
    """Paths of an app's routes, those of included routers too."""
    paths: set[str] = set()
    for route in routes:
        inner = getattr(getattr(route, "original_router", None), "routes", None)
        paths |= all_paths(inner) if inner else {route.path}
    return paths


def test_the_list_of_routes_is_complete(app_of: Callable[..., Any]) -> None:
    expected = {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/responses/{response_id}",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/models",
        "/v1/models/{model:path}",
        "/tokenize",
        "/detokenize",
        "/version",
        "/load",
    }
    pages = {"/", "/docs", "/docs/{name}", "/openapi.json"}
    assert all_paths(app_of().routes) == expected | pages | OPEN_PATHS | {METRICS_PATH}
    assert all_paths(app_of(disable_docs=True).routes) == expected | OPEN_PATHS | {METRICS_PATH}
    assert {"/livez", "/readyz", "/health"} == OPEN_PATHS


@pytest.mark.anyio
async def test_every_other_route_is_closed(serve: Serve, app_of: Callable[..., Any]) -> None:
    async with serve(api_key=["sk-one", "sk-two"]) as server:
        for path in all_paths(app_of().routes) | {"/nothing", "/livez/", "//livez", "/livez/../v1/models"}:
            for method in ("GET", "POST"):
                response = await server.client.request(method, path)
                if path in OPEN_PATHS | {METRICS_PATH}:
                    assert response.status_code == (200 if method == "GET" else 405)
                    continue
                assert response.status_code == 401, path
                assert response.headers["www-authenticate"] == "Bearer"
                check_error(response.headers, response.content, "authentication_error")


@pytest.mark.anyio
@pytest.mark.parametrize("value", ["Bearer sk-one", "bearer sk-two", "BEARER  sk-one"])
async def test_a_right_key(serve: Serve, value: str) -> None:
    async with serve(api_key=["sk-one", "sk-two"]) as server:
        response = await server.client.get("/v1/models", headers={"authorization": value})
        assert response.status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize(
    "header",
    [
        "Authorization: Bearer",
        "Authorization: Bearer ",
        "Authorization: sk-one",
        "Authorization: Basic sk-one",
        "Authorization: Bearer sk-onf",
        "Authorization: Bearer sk-one sk-two",
        "Authorization: Bearer sk-on\xe9",
        "Authorization: Bearer sk-one\r\nAuthorization: Bearer sk-one",
        "Authorization: Bearer " + "x" * 20_000,
        "X-Api-Key: sk-one",
        "Host2: x/livez?",
    ],
)
async def test_a_wrong_key(serve: Serve, header: str) -> None:
    async with serve(api_key=["sk-one", "sk-two"]) as server:
        status, headers, body = await exchange(server.port, post({"prompt": "x"}, header))
        assert status == 401
        check_error(headers, body, "authentication_error")
        assert b"sk-" not in body


@pytest.mark.anyio
async def test_hosts_and_targets_open_nothing(serve: Serve) -> None:
    async with serve(api_key=["sk-one"]) as server:
        for target in ("/v1/models?x=/livez", "/v1/models#/livez", "http://h/v1/models", "/v1/models;/livez"):
            request = f"GET {target} HTTP/1.1\r\nHost: livez\r\n\r\n".encode()
            assert (await exchange(server.port, request))[0] == 401


@pytest.mark.anyio
async def test_metrics_can_be_closed(serve: Serve) -> None:
    async with serve(api_key=["sk-one"], protect_metrics=True) as server:
        assert (await server.client.get("/metrics")).status_code == 401
    async with serve(disable_metrics=True) as server:
        assert (await server.client.get("/metrics")).status_code == 404


@pytest.mark.anyio
async def test_under_a_root_path(serve: Serve) -> None:
    async with serve(api_key=["sk-one"], root_path="/mamba") as server:
        for prefix in ("", "/mamba"):
            assert (await server.client.get(prefix + "/livez")).status_code == 200
            assert (await server.client.get(prefix + "/v1/models")).status_code == 401
            headers = {"authorization": "Bearer sk-one"}
            assert (await server.client.get(prefix + "/v1/models", headers=headers)).status_code == 200
