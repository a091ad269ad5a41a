"""The JSON of chat completions and of their chunks, whose constant parts are encoded once per request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from app.serving.forms import ChoicePart
from app.serving.logprobs import LogprobEntry, TokenName, finite
from app.serving.payloads import AnswerHead, prompt_logprobs_members
from app.serving.tokenizer import Tokenizer
from app.serving.tool_calls import Piece, ToolCall, ToolCallParser

_OPENING = {"role": "assistant", "content": ""}
_REST = b'},"logprobs":null,"finish_reason":null,"stop_reason":null}]'


@dataclass(frozen=True, slots=True)
class ToolReading:
    """How calls of tools are found: ``is_forced`` if there is nothing else, ``is_single`` if one is enough."""

    is_forced: bool
    is_single: bool

    def parser(self) -> ToolCallParser:
        """For one choice."""
        return ToolCallParser(is_open=self.is_forced, is_single=self.is_single)


@dataclass(frozen=True, slots=True)
class ChatForm:
    """Answers of ``/v1/chat/completions``.

    name: how log-probabilities show tokens. num_choices: how many an answer has. has_usage_chunk: whether a stream ends
    with usage. has_continuous_usage: whether each chunk of it tells usage. has_token_ids: whether tokens are told by
    their ids as well. tools: None where no tool may be called. own_stops: stop strings that are not the client's.
    """

    head: AnswerHead
    tokenizer: Tokenizer
    name: TokenName
    num_choices: int
    has_logprobs: bool
    has_usage_chunk: bool
    has_continuous_usage: bool
    has_token_ids: bool = False
    tools: ToolReading | None = None
    own_stops: frozenset[str] = frozenset()

    def encoder(self, frame: tuple[bytes, bytes]) -> ChatEncoder:
        return ChatEncoder(self, frame)

    def answer(self, parts: Sequence[ChoicePart], usage: dict[str, Any]) -> bytes:
        choices = [self._choice(part) for part in parts]
        answer = {**self.head.fields("chat.completion"), "choices": choices, "usage": usage}
        if parts[0].prompt_token_ids is not None:
            answer["prompt_token_ids"] = parts[0].prompt_token_ids
        encoded = orjson.dumps(answer)
        if not parts[0].prompt_scores:
            return encoded
        members = b"".join(prompt_logprobs_members(parts[0].prompt_scores))
        return b'%b,"prompt_logprobs":[%b]}' % (encoded[:-1], members)

    def ends(self, part: ChoicePart, has_calls: bool) -> dict[str, Any]:
        """Why a choice ended, where it did."""
        is_own = isinstance(part.stop_reason, str) and part.stop_reason in self.own_stops
        reason = "tool_calls" if has_calls and part.finish_reason == "stop" else part.finish_reason
        return {"finish_reason": reason, "stop_reason": None if is_own else part.stop_reason}

    def logprobs(self, entries: Sequence[LogprobEntry]) -> dict[str, Any]:
        """The object of that name."""
        return {"content": [self._entry(entry) for entry in entries], "refusal": None}

    def _choice(self, part: ChoicePart) -> dict[str, Any]:
        pieces: list[Piece] = [part.text]
        if self.tools is not None:
            parser = self.tools.parser()
            pieces = [*parser.push(part.text), *parser.finish()]
        text = "".join([piece for piece in pieces if isinstance(piece, str)])
        calls = [call_object(piece) for piece in pieces if isinstance(piece, ToolCall)]
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        choice: dict[str, Any] = {"index": part.index, "message": message, "logprobs": None}
        if self.has_logprobs:
            choice["logprobs"] = self.logprobs(part.entries)
        choice |= self.ends(part, bool(calls))
        if part.token_ids is not None:
            choice["token_ids"] = part.token_ids
        return choice

    def _entry(self, entry: LogprobEntry) -> dict[str, Any]:
        assert entry.logprobs is not None
        top = [self._token(token_id, logprob) for token_id, logprob in entry.logprobs.top]
        return {**self._token(entry.token_id, entry.logprobs.logprob), "top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self.tokenizer.id_to_bytes(token_id)
        return {"token": self.name(token_id), "logprob": finite(logprob), "bytes": list(data)}


class ChatEncoder:
    """Writes the chunks of one streamed answer, each with what ``frame`` puts before and after it.

    The first of each choice tells the role; calls of tools are told one by one: index, id and name, then arguments.
    """

    __slots__ = ("_end", "_form", "_frame", "_head", "_is_new", "_num_calls", "_parsers", "_starts", "is_plain")

    def __init__(self, form: ChatForm, frame: tuple[bytes, bytes]) -> None:
        self.is_plain = not (form.has_logprobs or form.has_continuous_usage or form.has_token_ids or form.tools)
        self._form = form
        self._frame = frame
        # without its closing brace
        self._head = frame[0] + orjson.dumps(form.head.fields("chat.completion.chunk"))[:-1]
        numbers = range(form.num_choices)
        self._starts = [b'%b,"choices":[{"index":%d,"delta":{"content":' % (self._head, i) for i in numbers]
        self._end = _REST + self._tail(None)
        self._is_new = [True] * form.num_choices
        self._parsers = [form.tools.parser() for _ in numbers] if form.tools is not None else []
        self._num_calls = [0] * form.num_choices

    def chunk(self, index: int, text: str) -> bytes:
        opening = self._open(index, None) if self._is_new[index] else b""
        return b"%b%b%b%b" % (opening, self._starts[index], orjson.dumps(text), self._end)

    def full_chunk(self, part: ChoicePart, usage: dict[str, Any] | None) -> bytes:
        index, form = part.index, self._form
        deltas = self._deltas(part)
        own: dict[str, Any] = {}
        if form.has_logprobs and part.entries:
            own["logprobs"] = form.logprobs(part.entries)
        if part.token_ids:
            own["token_ids"] = part.token_ids
        ends = form.ends(part, self._num_calls[index] > 0)
        if not deltas and (own or ends["finish_reason"] is not None):
            deltas = [{}]
        chunks = [self._open(index, usage, part.prompt_token_ids)] if self._is_new[index] else []
        for i, delta in enumerate(deltas, 1):
            last = ends if i == len(deltas) else {"finish_reason": None, "stop_reason": None}
            chunks.append(self._chunk({"index": index, "delta": delta, "logprobs": None, **last, **own}, usage))
            own = {}
        return b"".join(chunks)

    def ending(self, usage: dict[str, Any]) -> bytes:
        if not self._form.has_usage_chunk:
            return b""
        return b"".join((self._head, b',"choices":[]', self._tail(usage)))

    def _deltas(self, part: ChoicePart) -> list[dict[str, Any]]:
        if not self._parsers:
            return [{"content": part.text}] if part.text else []
        parser = self._parsers[part.index]
        pieces = parser.push(part.text)
        if part.finish_reason is not None:
            pieces += parser.finish()
        return [delta for piece in pieces for delta in self._piece_deltas(part.index, piece)]

    def _piece_deltas(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        if isinstance(piece, str):
            return [{"content": piece}]
        number = self._num_calls[index]
        self._num_calls[index] += 1
        begun = {"index": number, **call_object(piece), "function": {"name": piece.name, "arguments": ""}}
        rest = {"index": number, "function": {"arguments": piece.arguments}}
        return [{"tool_calls": [begun]}, {"tool_calls": [rest]}]

    def _open(self, index: int, usage: dict[str, Any] | None, prompt_token_ids: Sequence[int] | None = None) -> bytes:
        self._is_new[index] = False
        choice = {"index": index, "delta": _OPENING, "logprobs": None, "finish_reason": None, "stop_reason": None}
        return self._chunk(choice, usage, prompt_token_ids)

    def _chunk(
        self, choice: dict[str, Any], usage: dict[str, Any] | None, prompt_token_ids: Sequence[int] | None = None
    ) -> bytes:
        told = b"" if prompt_token_ids is None else b',"prompt_token_ids":%b' % orjson.dumps(prompt_token_ids)
        return b"".join((self._head, b',"choices":[', orjson.dumps(choice), b"]", told, self._tail(usage)))

    def _tail(self, usage: dict[str, Any] | None) -> bytes:
        told = b"" if usage is None else b',"usage":%b' % orjson.dumps(usage)
        return b"%b}%b" % (told, self._frame[1])


def call_object(call: ToolCall) -> dict[str, Any]:
    """A call as an answer has it."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
