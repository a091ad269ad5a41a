"""The JSON of completions and of their chunks, whose constant parts are encoded once per request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from app.serving.forms import ChoicePart
from app.serving.logprobs import logprobs_object
from app.serving.tokenizer import Tokenizer

_REST = b',"logprobs":null,"finish_reason":null,"stop_reason":null}]'


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """The fields that an answer and all its chunks share.

    id: of the answer. created: seconds since 1970. model: the name that was asked for.
    """

    id: str
    created: int
    model: str
    system_fingerprint: str

    def fields(self, object_name: str) -> dict[str, Any]:
        """In the order of the wire."""
        return {
            "id": self.id,
            "object": object_name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


def usage_object(num_prompt_tokens: int, num_generated_tokens: int) -> dict[str, Any]:
    """Token counts of an answer."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_generated_tokens,
        "total_tokens": num_prompt_tokens + num_generated_tokens,
        # there is no prefix cache yet
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@dataclass(frozen=True, slots=True)
class CompletionForm:
    """Answers of ``/v1/completions``. num_choices: how many an answer has. has_usage_chunk: whether a stream ends with
    usage. has_continuous_usage: whether each chunk of it tells usage.
    """

    head: AnswerHead
    tokenizer: Tokenizer
    num_choices: int
    has_logprobs: bool
    has_usage_chunk: bool
    has_continuous_usage: bool

    def encoder(self, frame: tuple[bytes, bytes]) -> ChunkEncoder:
        return ChunkEncoder(self, frame)

    def answer(self, parts: Sequence[ChoicePart], usage: dict[str, Any]) -> bytes:
        choices = [self.choice(part, self.has_logprobs) for part in parts]
        return orjson.dumps({**self.head.fields("text_completion"), "choices": choices, "usage": usage})

    def choice(self, part: ChoicePart, has_logprobs: bool) -> dict[str, Any]:
        """A choice, or what came of it."""
        return {
            "index": part.index,
            "text": part.text,
            "logprobs": logprobs_object(part.entries, self.tokenizer, part.end) if has_logprobs else None,
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
        }


class ChunkEncoder:
    """Writes the chunks of one streamed completion, each with what ``frame`` puts before and after it."""

    __slots__ = ("_end", "_form", "_frame", "_head", "_starts", "is_plain")

    def __init__(self, form: CompletionForm, frame: tuple[bytes, bytes]) -> None:
        self.is_plain = not form.has_logprobs and not form.has_continuous_usage
        self._form = form
        # without its closing brace
        self._head = frame[0] + orjson.dumps(form.head.fields("text_completion"))[:-1]
        self._starts = [b'%b,"choices":[{"index":%d,"text":' % (self._head, i) for i in range(form.num_choices)]
        self._frame = frame
        self._end = _REST + self._tail(None)

    def chunk(self, index: int, text: str) -> bytes:
        return b"%b%b%b" % (self._starts[index], orjson.dumps(text), self._end)

    def full_chunk(self, part: ChoicePart, usage: dict[str, Any] | None) -> bytes:
        choice = self._form.choice(part, self._form.has_logprobs and bool(part.entries))
        return b"".join((self._head, b',"choices":[', orjson.dumps(choice), b"]", self._tail(usage)))

    def ending(self, usage: dict[str, Any]) -> bytes:
        if not self._form.has_usage_chunk:
            return b""
        return b"".join((self._head, b',"choices":[]', self._tail(usage)))

    def _tail(self, usage: dict[str, Any] | None) -> bytes:
        told = b"" if usage is None else b',"usage":%b' % orjson.dumps(usage)
        return b"%b}%b" % (told, self._frame[1])
