"""The JSON of completions and of their chunks, whose constant parts are encoded once per request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from app.serving.forms import ChoicePart
from app.serving.logprobs import PromptScores, TokenName, logprobs_object

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
    """Answers of ``/v1/completions``. name: how log-probabilities show tokens. num_choices: how many an answer has.
    has_usage_chunk: whether a stream ends with usage. has_continuous_usage: whether each chunk of it tells usage.
    has_token_ids: whether tokens are told by their ids as well.
    """

    head: AnswerHead
    name: TokenName
    num_choices: int
    has_logprobs: bool
    has_usage_chunk: bool
    has_continuous_usage: bool
    has_token_ids: bool = False

    def encoder(self, frame: tuple[bytes, bytes]) -> ChunkEncoder:
        return ChunkEncoder(self, frame)

    def answer(self, parts: Sequence[ChoicePart], usage: dict[str, Any]) -> bytes:
        start = orjson.dumps(self.head.fields("text_completion"))[:-1] + b',"choices":['
        pieces = [start]
        for part in parts:
            pieces += (*self.choice(part, self.has_logprobs), b",")
        pieces[-1] = b'],"usage":%b}' % orjson.dumps(usage)
        return b"".join(pieces)

    def choice(self, part: ChoicePart, has_logprobs: bool) -> list[bytes]:
        """A choice, or what came of it, as JSON in pieces."""
        own = logprobs_object(part.entries, self.name, part.end) if has_logprobs else None
        choice: dict[str, Any] = {"index": part.index, "text": part.text}
        end: dict[str, Any] = {"finish_reason": part.finish_reason, "stop_reason": part.stop_reason}
        if part.token_ids is not None:
            end["token_ids"] = part.token_ids
        if part.prompt_token_ids is not None:
            end["prompt_token_ids"] = part.prompt_token_ids
        if not part.prompt_scores:
            return [orjson.dumps({**choice, "logprobs": own, **end})]
        pieces = [orjson.dumps(choice)[:-1], b',"logprobs":', *_joined_logprobs(part.prompt_scores, own), b","]
        if part.prompt_scores[0].prompt_logprobs:
            pieces += (b'"prompt_logprobs":[', *prompt_logprobs_members(part.prompt_scores), b"],")
        return [*pieces, orjson.dumps(end)[1:]]


def prompt_logprobs_members(scores: Sequence[PromptScores]) -> list[bytes]:
    """What stands in the list of that name, in pieces. There is at least one slice."""
    return _separated([slice_.prompt_logprobs for slice_ in scores])


def _joined_logprobs(scores: Sequence[PromptScores], own: dict[str, list[Any]] | None) -> list[bytes]:
    """The lists of the prompt, each followed by that of the output."""
    if own is None:
        return [b"null"]
    pieces = [b"{"]
    for name, values in own.items():
        members = [*(getattr(slice_, name) for slice_ in scores), orjson.dumps(values)[1:-1]]
        pieces += (b'"%b":[' % name.encode(), *_separated([each for each in members if each]), b"],")
    pieces[-1] = b"]}"
    return pieces


def _separated(members: list[bytes]) -> list[bytes]:
    return [piece for each in members for piece in (each, b",")][:-1]


class ChunkEncoder:
    """Writes the chunks of one streamed completion, each with what ``frame`` puts before and after it."""

    __slots__ = ("_end", "_form", "_frame", "_head", "_starts", "is_plain")

    def __init__(self, form: CompletionForm, frame: tuple[bytes, bytes]) -> None:
        self.is_plain = not form.has_logprobs and not form.has_continuous_usage and not form.has_token_ids
        self._form = form
        # without its closing brace
        self._head = frame[0] + orjson.dumps(form.head.fields("text_completion"))[:-1]
        self._starts = [b'%b,"choices":[{"index":%d,"text":' % (self._head, i) for i in range(form.num_choices)]
        self._frame = frame
        self._end = _REST + self._tail(None)

    def chunk(self, index: int, text: str) -> bytes:
        return b"%b%b%b" % (self._starts[index], orjson.dumps(text), self._end)

    def full_chunk(self, part: ChoicePart, usage: dict[str, Any] | None) -> bytes:
        choice = self._form.choice(part, self._form.has_logprobs and bool(part.entries or part.prompt_scores))
        return b"".join((self._head, b',"choices":[', *choice, b"]", self._tail(usage)))

    def ending(self, usage: dict[str, Any]) -> bytes:
        if not self._form.has_usage_chunk:
            return b""
        return b"".join((self._head, b',"choices":[]', self._tail(usage)))

    def _tail(self, usage: dict[str, Any] | None) -> bytes:
        told = b"" if usage is None else b',"usage":%b' % orjson.dumps(usage)
        return b"%b}%b" % (told, self._frame[1])
