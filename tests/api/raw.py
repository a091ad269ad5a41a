"""HTTP by hand, for what no client would send."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import Any


def post(
    body: bytes | dict[str, Any], *headers: str, path: str = "/v1/completions", length: int | None = None
) -> bytes:
    """The bytes of a POST; ``length`` lies about the body's."""
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    head = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(content) if length is None else length}",
        *headers,
    ]
    return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + content


async def exchange(port: int, data: bytes, seconds: float = 5.0) -> tuple[int, dict[str, str], bytes]:
    """Send bytes; status, headers and body of the answer. The connection stays open until the answer is here."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        async with asyncio.timeout(seconds):
            return await read_answer(reader)
    finally:
        writer.close()


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return int(head[0].split()[1]), headers, body


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
