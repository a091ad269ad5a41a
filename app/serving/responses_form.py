"""How a response is answered: whole, or as OpenAI's typed events."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from app.serving.chat_payloads import ChatForm
from app.serving.errors import RequestError
from app.serving.forms import ChoicePart
from app.serving.responses_output import Item, Output, message_of
from app.serving.responses_store import StoredResponse

Keep = Callable[[str, StoredResponse], bool]


class ResponseForm:
    """Answers of one request of ``/v1/responses``, whose stream it remembers.

    chat: the form of the same answer in a chat, which knows tokens and tools. said: fields that the answer repeats, as
    a JSON object. conversation: the messages before the answer, as a JSON list. keep: told of the response when it is
    over, and says whether it is kept; None if it is not to be.
    """

    __slots__ = ("_conversation", "_encoder", "_id", "_keep", "_said", "chat")

    def __init__(self, chat: ChatForm, said: bytes, conversation: bytes, keep: Keep | None) -> None:
        self._said = said
        self._conversation = conversation
        self._keep = keep
        self._id = f"resp_{secrets.token_hex(24)}"
        self._encoder: ResponseEncoder | None = None
        self.chat = chat

    def encoder(self, frame: tuple[bytes, bytes]) -> ResponseEncoder:
        self._encoder = ResponseEncoder(self, frame)
        return self._encoder

    def answer(self, parts: Sequence[ChoicePart], usage: dict[str, Any]) -> bytes:
        (part,) = parts
        output = self.output(lambda *_: None)
        output.take(part.text, self.logprobs(part), part.finish_reason)
        return self.end(output.items, part.finish_reason, usage)

    def last_words(self, frame: tuple[bytes, bytes], error: RequestError | None) -> bytes:
        """What a stream ends with: nothing, or the event of a failure."""
        if error is None:
            return b""
        return (self._encoder or self.encoder(frame)).failure(error)

    def output(self, tell: Callable[[str, dict[str, Any]], None]) -> Output:
        """Where what the model writes goes."""
        return Output(None if self.chat.tools is None else self.chat.tools.parser(), tell)

    def logprobs(self, part: ChoicePart) -> list[Item]:
        """Of the tokens of a part, where they were asked for."""
        if not self.chat.has_logprobs or not part.entries:
            return []
        content: list[Item] = self.chat.logprobs(part.entries)["content"]
        return content

    def end(self, items: Sequence[Item], finish_reason: str | None, usage: dict[str, Any]) -> bytes:
        """The whole response, which is kept from now on."""
        status = status_of(finish_reason)
        answer = self.snapshot(status, items, usage=usage)
        if self._keep is None:
            return answer
        conversation = b"%b,%b]" % (self._conversation[:-1], orjson.dumps(message_of(items)))
        if not self._keep(self._id, StoredResponse(answer, conversation)):
            self._keep = None
            answer = self.snapshot(status, items, usage=usage)
        return answer

    def snapshot(
        self,
        status: str,
        items: Sequence[Item] = (),
        *,
        usage: dict[str, Any] | None = None,
        error: RequestError | None = None,
    ) -> bytes:
        """The response as it is, as JSON."""
        response = {
            "id": self._id,
            "object": "response",
            "created_at": self.chat.head.created,
            "model": self.chat.head.model,
            "status": status,
            "error": None if error is None else _problem(error),
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": items,
            "usage": None if usage is None else _usage(usage),
            "store": self._keep is not None and error is None,
        }
        return b"%b,%b" % (orjson.dumps(response)[:-1], self._said[1:])


class ResponseEncoder:
    """Writes the events of one response, numbered from 0. Nothing is written before there is a first token."""

    __slots__ = ("_delta", "_events", "_finish_reason", "_form", "_frame", "_number", "_output", "is_plain")

    def __init__(self, form: ResponseForm, frame: tuple[bytes, bytes]) -> None:
        self.is_plain = not form.chat.has_logprobs and form.chat.tools is None
        self._form = form
        self._frame = frame
        self._number = 0
        self._events: list[bytes] = []
        self._output = form.output(self._tell)
        self._finish_reason: str | None = None
        # of the message of a plain stream, up to the event's number
        self._delta = b""

    def chunk(self, index: int, text: str) -> bytes:  # noqa: ARG002 (a response has one choice)
        opening = b""
        if not self._delta:
            opening = self._begin() + self._open_plain()
        message = self._output.message
        assert message is not None
        message.texts.append(text)
        event = b'%b%d,"delta":%b}%b' % (self._delta, self._number, orjson.dumps(text), self._frame[1])
        self._number += 1
        return opening + event

    def full_chunk(self, part: ChoicePart, usage: dict[str, Any] | None) -> bytes:  # noqa: ARG002 (told at the end)
        opening = self._begin()
        self._finish_reason = part.finish_reason
        self._output.take(part.text, self._form.logprobs(part), part.finish_reason)
        return opening + self._take_events()

    def ending(self, usage: dict[str, Any]) -> bytes:
        if self._finish_reason is None:
            # it failed, which is told by the last words
            return b""
        answer = self._form.end(self._output.items, self._finish_reason, usage)
        self._tell(status_of(self._finish_reason), {"response": orjson.Fragment(answer)})
        return self._take_events()

    def failure(self, error: RequestError) -> bytes:
        """The event of a failure, after those that are owed before any other."""
        opening = self._begin()
        response = self._form.snapshot("failed", self._output.all_items(), error=error)
        self._tell("failed", {"response": orjson.Fragment(response)})
        return opening + self._take_events()

    def _begin(self) -> bytes:
        if self._number:
            return b""
        response = orjson.Fragment(self._form.snapshot("in_progress"))
        self._tell("created", {"response": response})
        self._tell("in_progress", {"response": response})
        return self._take_events()

    def _open_plain(self) -> bytes:
        message = self._output.open()
        self._delta = (
            b'event: response.output_text.delta\n%b{"type":"response.output_text.delta","item_id":"%b",'
            b'"output_index":0,"content_index":0,"logprobs":[],"sequence_number":'
        ) % (self._frame[0], message.id.encode())
        return self._take_events()

    def _tell(self, kind: str, fields: dict[str, Any]) -> None:
        kind = f"response.{kind}"
        data = orjson.dumps({"type": kind, "sequence_number": self._number, **fields})
        self._events.append(b"event: %b\n%b%b%b" % (kind.encode(), self._frame[0], data, self._frame[1]))
        self._number += 1

    def _take_events(self) -> bytes:
        events = b"".join(self._events)
        self._events.clear()
        return events


def status_of(finish_reason: str | None) -> str:
    """Of a response that is over."""
    return "incomplete" if finish_reason == "length" else "completed"


def _problem(error: RequestError) -> dict[str, Any]:
    code = "server_error" if error.status >= 500 else error.code or error.type
    return {"code": code, "message": error.message}


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
