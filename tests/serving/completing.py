"""Ask a service for completions, whole or streamed, and keep what it writes and tells."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from app.engine.request import GenerationRequest
from app.schemas.completions import Completion, CompletionRequest
from app.serving.completions import CompletionService
from app.serving.parsing import parse_request
from app.serving.prepared import PreparedCompletion
from app.serving.tokenizer import Tokenizer
from tests.serving.conftest import make_byte_fallback, train_byte_level

TOKENIZERS = {"byte_level": Tokenizer(train_byte_level()), "byte_fallback": Tokenizer(make_byte_fallback())}


def prepare(service: CompletionService, **fields: Any) -> PreparedCompletion:
    return service.job(parse_request(CompletionRequest, json.dumps({"prompt": "the dog", **fields}).encode())).prepare(
        "r"
    )


async def complete(service: CompletionService, observer: Any = None, **fields: Any) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(await service.complete(prepare(service, **fields), observer))
    check_shape(answer)
    return answer


def check_shape(answer: dict[str, Any]) -> None:
    """An answer has the documented fields and no others."""
    assert Completion.model_validate(answer, strict=True).model_dump(exclude_unset=True) == answer


@dataclass
class Writes:
    """An outlet that keeps what was written."""

    frame: tuple[bytes, bytes] = (b"chunk ", b"\n")
    is_blocked: bool = False
    is_complete: bool = False
    batches: list[list[dict[str, Any]]] = field(default_factory=list)

    def write(self, chunks: bytes, *, is_last: bool) -> None:
        assert not self.is_blocked
        assert not self.is_complete
        self.is_complete = is_last
        # JSON escapes line breaks
        *lines, rest = chunks.split(b"\n")
        assert lines
        assert rest == b""
        assert all(line.startswith(b"chunk {") for line in lines)
        self.batches.append([json.loads(line.removeprefix(b"chunk ")) for line in lines])

    @property
    def chunks(self) -> list[dict[str, Any]]:
        return [chunk for batch in self.batches for chunk in batch]

    @property
    def texts(self) -> list[str]:
        return [choice["text"] for chunk in self.chunks for choice in chunk["choices"]]


async def stream(service: CompletionService, writes: Writes, observer: Any = None, **fields: Any) -> None:
    """Write a stream to its end. Raises what it ends with."""
    with closing(service.stream(prepare(service, stream=True, **fields), writes, observer)) as run:
        await run.done
        run.check()
        assert writes.is_complete


async def chunks(service: CompletionService, **fields: Any) -> list[dict[str, Any]]:
    writes = Writes()
    await stream(service, writes, **fields)
    return writes.chunks


def join(parts: Iterable[dict[str, Any]], num_choices: int) -> list[dict[str, Any]]:
    """The choices of the whole answer that a stream amounts to."""
    choices: list[dict[str, Any]] = [{"index": i, "text": "", "logprobs": None} for i in range(num_choices)]
    for part in parts:
        for piece in part["choices"]:
            choice = choices[piece["index"]]
            assert choice.get("finish_reason") is None, "a chunk after the end"
            choice["text"] += piece["text"]
            for name, values in (piece["logprobs"] or {}).items():
                choice["logprobs"] = choice["logprobs"] or {}
                choice["logprobs"][name] = choice["logprobs"].get(name, []) + values
            choice |= {"finish_reason": piece["finish_reason"], "stop_reason": piece["stop_reason"]}
    return choices


def says(*texts: str) -> Callable[[GenerationRequest, int], list[int]]:
    """A script: sample k says text k and then ends."""
    return lambda _, sample: TOKENIZERS["byte_level"].encode(texts[sample % len(texts)])


@dataclass
class Notes:
    """An observer that keeps what it was told."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def on_first_token(self, seconds: float) -> None:
        assert seconds >= 0
        self.calls.append(("first",))

    def on_gaps(self, num_gaps: int, seconds: float) -> None:
        assert seconds > 0
        self.calls.append(("gaps", num_gaps))

    def on_finish(self, reason: str, prompt_tokens: int, generated_tokens: int, seconds: float) -> None:
        assert seconds >= 0
        self.calls.append(("finish", reason, prompt_tokens, generated_tokens))
