"""What an operator sees once the server is ready."""

from __future__ import annotations

import shlex

import orjson

from app.engine.request import ModelInfo
from app.settings import Settings

_MIB = 2**20
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def ready_text(settings: Settings, info: ModelInfo, port: int) -> str:
    """The model, what it takes, where it is served, and a command to paste."""
    url = base_url(settings, port)
    name = settings.model_names[0]
    has_key = bool(settings.api_key or settings.api_key_file)
    return "\n".join(
        (
            f"{name}: {info.architecture}, {info.num_parameters / 1e6:.1f} M parameters, {info.dtype} on {info.device}",
            f"slots: {info.max_num_seqs} x {info.state_bytes_per_seq / _MIB:.1f} MiB",
            f"ready: {url}",
            *((f"docs:  {url}/docs",) if settings.open_docs or not (has_key or settings.disable_docs) else ()),
            f"try:   {curl_command(url, name, has_key=has_key)}",
        )
    )


def base_url(settings: Settings, port: int) -> str:
    """Where a client on this machine finds the server."""
    host = _ANY_ADDRESS.get(settings.host, settings.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def curl_command(url: str, model: str, *, has_key: bool) -> str:
    """A streamed completion, quoted for a shell."""
    body = orjson.dumps({"model": model, "prompt": "def fibonacci(n):", "max_tokens": 64, "stream": True}).decode()
    key = ' -H "Authorization: Bearer $MAMBA_API_KEY"' if has_key else ""
    return f"curl -N {url}/v1/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
