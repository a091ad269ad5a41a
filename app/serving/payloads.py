"""The JSON of answers and of chunks, whose constant parts are encoded once per request."""

from __future__ import annotations

from typing import Any

import orjson

from app.serving.prepared import PreparedCompletion

OBJECT = "text_completion"

_REST = b',"logprobs":null,"finish_reason":null,"stop_reason":null}]'


def usage_object(num_prompt_tokens: int, num_generated_tokens: int) -> dict[str, Any]:
    """Token counts of an answer."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_generated_tokens,
        "total_tokens": num_prompt_tokens + num_generated_tokens,
        # there is no prefix cache yet
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def head_object(prepared: PreparedCompletion) -> dict[str, Any]:
    """The fields that an answer and all its chunks share."""
    return {
        "id": prepared.id,
        "object": OBJECT,
        "created": prepared.created,
        "model": prepared.model,
        "system_fingerprint": prepared.system_fingerprint,
    }


class ChunkEncoder:
    """Writes the chunks of one streamed completion, each with what ``frame`` puts before and after it."""

    __slots__ = ("_end", "_frame", "_head", "_starts")

    def __init__(self, prepared: PreparedCompletion, frame: tuple[bytes, bytes]) -> None:
        # without its closing brace
        self._head = frame[0] + orjson.dumps(head_object(prepared))[:-1]
        self._starts = [b'%b,"choices":[{"index":%d,"text":' % (self._head, i) for i in range(prepared.num_sequences)]
        self._frame = frame
        self._end = _REST + self._tail(None)

    def chunk(self, index: int, text: str) -> bytes:
        """A piece of text in the midst of a choice: what nearly every chunk is."""
        return b"%b%b%b" % (self._starts[index], orjson.dumps(text), self._end)

    def full_chunk(self, choice: dict[str, Any], usage: dict[str, Any] | None) -> bytes:
        """Any other chunk of a choice."""
        return b"".join((self._head, b',"choices":[', orjson.dumps(choice), b"]", self._tail(usage)))

    def usage_chunk(self, usage: dict[str, Any]) -> bytes:
        """The last chunk, which has no choice."""
        return b"".join((self._head, b',"choices":[]', self._tail(usage)))

    def _tail(self, usage: dict[str, Any] | None) -> bytes:
        told = b"" if usage is None else b',"usage":%b' % orjson.dumps(usage)
        return b"%b}%b" % (told, self._frame[1])
