"""Every refusal has OpenAI's body, a request id, and nothing of our insides."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.api.conftest import MODEL, Serve
from tests.api.raw import exchange, post, read_answer
from tests.fakes import FakeEngine

JSON = {"content-type": "application/json"}


def check_error(headers: Any, body: bytes, kind: str = "invalid_request_error") -> dict[str, Any]:
    """The error object, after a look at what all errors share."""
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"]
    content = json.loads(body)
    assert set(content) == {"error"}
    error = content["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == kind
    assert len(error["message"]) < 400
    assert not any(word in error["message"] for word in ("Traceback", "/app/", "0x", "pydantic"))
    return dict(error)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[1]", None),
        (b"null", None),
        (b'{"prompt": "x",}', None),
        (b'{"prompt": "\xff"}', None),
        (b'{"prompt": "a", "prompt": "b"}', "prompt"),
        (b'{"prompt": "x", "temperature": NaN}', None),
        (b'{"prompt": "x", "temperature": 1e400}', None),
        (b'{"prompt": "x", "y": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
        (b'{"prompt": "x", "seed": ' + b"9" * 5001 + b"}", None),
        (b"{}", "prompt"),
        (b'{"prompt": null}', "prompt"),
        (b'{"prompt": [true]}', "prompt"),
        (b'{"prompt": [257]}', "prompt"),
        (b'{"prompt": "x", "max_tokens": true}', "max_tokens"),
        (b'{"prompt": "x", "stream": "yes"}', "stream"),
        (b'{"prompt": "x", "stream": true, "stream_options": 1}', "stream_options"),
        (b'{"prompt": "x", "n": 65}', "n"),
        (b'{"prompt": "x", "suffix": "y"}', "suffix"),
    ],
)
async def test_a_wrong_body_is_400(serve: Serve, body: bytes, param: str | None) -> None:
    async with serve() as server:
        response = await server.client.post("/v1/completions", content=body, headers=JSON)
        assert response.status_code == 400
        error = check_error(response.headers, response.content)
        assert error["param"] == param
        assert not server.engine.requests
        await server.is_idle()


@pytest.mark.anyio
async def test_too_long_is_400_also_for_a_stream(serve: Serve) -> None:
    async with serve(max_model_len=20) as server:
        for stream in (False, True):
            response = await server.complete(max_tokens=16, stream=stream)
            assert response.status_code == 400
            error = check_error(response.headers, response.content)
            assert error["code"] == "context_length_exceeded"
            assert "20" in error["message"]
            assert "21" in error["message"]


@pytest.mark.anyio
async def test_unknown_model_is_404(serve: Serve) -> None:
    async with serve() as server:
        for response in (await server.complete(model="other"), await server.client.get("/v1/models/other")):
            assert response.status_code == 404
            assert check_error(response.headers, response.content)["code"] == "model_not_found"


@pytest.mark.anyio
async def test_unknown_route_and_method(serve: Serve) -> None:
    async with serve() as server:
        for path in ("/v1", "/v1/completions/", "/doc", "/v1/comp%0aletions"):
            response = await server.client.post(path)
            assert response.status_code == 404
            check_error(response.headers, response.content)
        response = await server.client.get("/v1/completions")
        assert response.status_code == 405
        assert response.headers["allow"] == "POST"
        response = await server.client.put("/v1/responses/resp_1")
        assert response.status_code == 405
        assert response.headers["allow"] == "DELETE, GET, HEAD"
        check_error(response.headers, response.content)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
async def test_what_is_not_plain_json_is_415(serve: Serve, headers: dict[str, str]) -> None:
    async with serve() as server:
        response = await server.client.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers)
        assert response.status_code == 415
        check_error(response.headers, response.content)


@pytest.mark.anyio
async def test_a_large_body_is_413_and_not_read(serve: Serve) -> None:
    async with serve(max_body_size="1KiB") as server:
        status, headers, body = await exchange(server.port, post(b"", length=10**9))
        assert status == 413
        assert headers["connection"] == "close"
        check_error(headers, body)
        # without a length: the answer comes while the client still sends, and the client can read it
        reader, writer = await server.connect()
        head = post(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        writer.write(head + b"400\r\n" + b" " * 1024 + b"\r\n")
        writer.write(b"400\r\n" + b" " * 1024 + b"\r\n")
        async with asyncio.timeout(5):
            status, headers, body = await read_answer(reader)
            assert status == 413
            check_error(headers, body)
            for _ in range(50):
                writer.write(b"400\r\n" + b" " * 1024 + b"\r\n")
            assert await reader.read() == b""
        writer.close()
        assert (await server.complete(max_tokens=1)).status_code == 200


@pytest.mark.anyio
async def test_a_large_body_is_refused_before_100_continue(serve: Serve) -> None:
    async with serve(max_body_size="1KiB") as server:
        status, _, _ = await exchange(server.port, post(b"", "Expect: 100-continue", length=10**6))
        assert status == 413


@pytest.mark.anyio
async def test_a_slow_body_is_408(serve: Serve) -> None:
    async with serve(body_timeout=0.2) as server:
        status, headers, body = await exchange(server.port, post(b'{"pro', length=100))
        assert status == 408
        check_error(headers, body, "timeout_error")


@pytest.mark.anyio
async def test_slow_headers_end_the_connection(serve: Serve) -> None:
    async with serve(header_timeout=0.2) as server:
        status, headers, body = await exchange(server.port, b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-")
        assert status == 408
        check_error(headers, body, "timeout_error")
        reader, writer = await server.connect()
        async with asyncio.timeout(2):
            assert await reader.read() == b""
        writer.close()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (post(b"{}", "X-Long: " + "a" * 70_000), 431),
        (post(b"{}", *[f"X-{i}: a" for i in range(600)]), 431),
        (b"POST /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431),
        # never an end: refused while it arrives
        (b"POST / HTTP/1.1\r\nX-Long: " + b"a" * 70_000, 431),
        (post(b"{}", "Host: other"), 400),
        (post(b"{}").replace(b"Host: localhost", b"Host: x/v1?"), 400),
        (post(b"{}").replace(b"Host: localhost", b"Host: x#y"), 400),
        (post(b"{}", length=-1), 400),
        (post(b"{}", "Transfer-Encoding: chunked"), 400),
        (b"\x00\x01\x02\x03 rubbish\r\n\r\n", 400),
        (post(b"zz\r\n").replace(b"Content-Length: 4", b"Transfer-Encoding: chunked"), 400),
    ],
)
async def test_what_is_wrong_below_the_application(serve: Serve, data: bytes, expected: int) -> None:
    async with serve() as server:
        status, headers, body = await exchange(server.port, data)
        assert status == expected
        assert headers["connection"] == "close"
        check_error(headers, body)
        assert (await server.complete(max_tokens=1)).status_code == 200


@pytest.mark.anyio
async def test_two_hundred_dribbling_clients_disturb_nobody(serve: Serve) -> None:
    async with serve(header_timeout=4.0, body_timeout=4.0) as server:
        clients = []
        for number in range(200):
            # at once: a connection that has sent nothing for so long is closed without an answer
            clients.append(await server.connect())
            clients[-1][1].write(b"POST /v1/comp" if number % 2 else post(b'{"prom', length=50))
        # whoever had to wait for them would wait for as long as they are given
        async with asyncio.timeout(4.0):
            for _ in range(10):
                assert (await server.complete(max_tokens=3)).status_code == 200
        statuses = await asyncio.gather(*(read_answer(reader) for reader, _ in clients))
        assert {status for status, _, _ in statuses} == {408}
        for _, writer in clients:
            writer.close()


@pytest.mark.anyio
async def test_too_many_connections_are_503(serve: Serve) -> None:
    async with serve(max_connections=5) as server:
        clients = [await server.connect() for _ in range(5)]
        await asyncio.sleep(0.05)
        reader, writer = await server.connect()
        async with asyncio.timeout(5):
            status, headers, body = await read_answer(reader)
        assert status == 503
        check_error(headers, body, "service_unavailable_error")
        for _, other in [*clients, (reader, writer)]:
            other.close()
        await asyncio.sleep(0.05)
        assert (await server.complete(max_tokens=1)).status_code == 200


@pytest.mark.anyio
async def test_request_ids(serve: Serve) -> None:
    async with serve() as server:
        for given, expected in [("abc-1", "abc-1"), ("a b\t<c>", "abc"), ("x" * 500, "x" * 128)]:
            response = await server.client.get("/livez", headers={"x-request-id": given})
            assert response.headers["x-request-id"] == expected
        own = {(await server.client.get("/nothing")).headers["x-request-id"] for _ in range(3)}
        assert len(own) == 3
        response = await server.client.post("/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "mine"})
        assert response.json()["id"] == "cmpl-mine"


@pytest.mark.anyio
async def test_a_fault_of_ours_is_500_and_the_next_request_works(serve: Serve, engine: FakeEngine) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret /app/detail")

    async with serve() as server:
        submit = engine.submit
        engine.submit = broken  # type: ignore[method-assign, assignment]
        response = await server.complete()
        assert response.status_code == 500
        check_error(response.headers, response.content, "server_error")
        assert b"secret" not in response.content
        engine.submit = submit  # type: ignore[method-assign]
        assert (await server.complete(max_tokens=1)).status_code == 200
        await server.is_idle()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("failure", "status", "kind"),
    [
        ("error", 500, "server_error"),
        ("invalid", 400, "invalid_request_error"),
        ("died", 503, "service_unavailable_error"),
    ],
)
async def test_the_engine_fails_before_the_first_token(
    serve: Serve, engine: FakeEngine, failure: str, status: int, kind: str
) -> None:
    engine.fail_at, engine.failure = 0, failure
    async with serve() as server:
        for stream in (False, True):
            response = await server.complete(stream=stream)
            assert response.status_code == status
            check_error(response.headers, response.content, kind)
            assert ("retry-after" in response.headers) == (status == 503)
        await server.is_idle()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        ("error", "server_error"),
        ("invalid", "invalid_request_error"),
        ("died", "service_unavailable_error"),
        ("abort", None),
    ],
)
async def test_the_engine_fails_in_a_stream(serve: Serve, engine: FakeEngine, failure: str, kind: str | None) -> None:
    engine.fail_at, engine.failure = 3, failure
    async with serve() as server:
        response = await server.complete(stream=True, max_tokens=10)
        events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert events[-1] == "[DONE]"
        error = json.loads(events[-2])["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == kind or kind is None
        assert len(events) == 5
        await server.is_idle()


@pytest.mark.anyio
async def test_openapi_tells_of_request_and_errors(serve: Serve) -> None:
    async with serve() as server:
        schema = (await server.client.get("/openapi.json")).json()
        operation = schema["paths"]["/v1/completions"]["post"]
        reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        request = schema["components"]["schemas"][reference.rpartition("/")[2]]
        assert {"prompt", "max_tokens", "stream", "logit_bias"} <= set(request["properties"])
        assert {"200", "400", "401", "413", "415", "429", "500", "503"} <= set(operation["responses"])
        assert "422" not in operation["responses"]
        assert MODEL not in json.dumps(schema)
