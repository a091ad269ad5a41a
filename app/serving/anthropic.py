"""Requests of ``/v1/messages``: chats whose answers look different."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson

from app.schemas.anthropic import ConversationFields, MessagesRequest
from app.schemas.chat import ChatRequest
from app.schemas.json import BodyError
from app.schemas.messages import Message
from app.schemas.wire import check_body
from app.serving.chat_payloads import ChatForm
from app.serving.chat_translate import ChatJob
from app.serving.errors import InvalidRequest, RequestError
from app.serving.forms import ChoicePart
from app.serving.prepared import PreparedCompletion
from app.serving.unsupported import refuse_unsupported

_FIELDS: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ({"type": "auto"}, {"type": "none"}),
    "thinking": ({"type": "disabled"},),
    **dict.fromkeys(("mcp_servers", "container", "context_management", "output_config", "output_format"), ()),
    # of OpenAI's API
    **dict.fromkeys(("stop", "n", "response_format"), ()),
}
_SHARED = ("max_tokens", "temperature", "top_p", "top_k", "stream")


def as_chat(body: MessagesRequest) -> ChatRequest:
    """The same as a chat. Raises InvalidRequest."""
    fields = {name: getattr(body, name) for name in _SHARED} | {"model": body.model, "stop": body.stop_sequences}
    fields["messages"], fields["continue_final_message"] = read_conversation(body)
    try:
        return check_body(ChatRequest, fields)
    except BodyError as error:
        raise InvalidRequest(error.message, param=error.param) from None


def read_conversation(body: ConversationFields) -> tuple[list[Message], bool]:
    """The messages, that of the system first, and whether the last one is continued. Raises UnsupportedParameter."""
    refuse_unsupported(body.model_extra, _FIELDS)
    is_continued = body.messages[-1]["role"] == "assistant"
    if body.system is None:
        return body.messages, is_continued
    return [{"role": "system", "content": body.system}, *body.messages], is_continued


class MessagesJob(ChatJob):
    """A ``Job`` of ``/v1/messages``."""

    __slots__ = ()

    def prepare(self, request_id: str) -> PreparedCompletion:
        prepared = ChatJob.prepare(self, request_id)
        assert isinstance(prepared.form, ChatForm)
        form = MessagesForm(prepared.form, f"msg_{request_id}", prepared.num_prompt_tokens)
        return replace(prepared, form=form, last_words=form.last_words)


@dataclass(frozen=True, slots=True)
class MessagesForm:
    """Answers of ``/v1/messages``. chat: the form of the same answer in a chat."""

    chat: ChatForm
    id: str
    num_prompt_tokens: int

    def encoder(self, frame: tuple[bytes, bytes]) -> MessagesEncoder:
        return MessagesEncoder(self, frame)

    def answer(self, parts: Sequence[ChoicePart], usage: dict[str, Any]) -> bytes:
        (part,) = parts
        return orjson.dumps(self.message(usage["completion_tokens"], [{"type": "text", "text": part.text}], part))

    def last_words(self, frame: tuple[bytes, bytes], error: RequestError | None) -> bytes:
        """What a stream ends with: nothing, or the event of a failure."""
        return b"" if error is None else event(frame, "error", **error.body())

    def message(self, num_tokens: int, content: list[dict[str, str]], part: ChoicePart | None) -> dict[str, Any]:
        """The whole of it, or without ``part`` its beginning."""
        head = {"id": self.id, "type": "message", "role": "assistant", "model": self.chat.head.model}
        usage = {"input_tokens": self.num_prompt_tokens, "output_tokens": num_tokens}
        return {**head, "content": content, **self.ends(part), "usage": usage}

    def ends(self, part: ChoicePart | None) -> dict[str, Any]:
        """Why it ended, if it did."""
        if part is None:
            return {"stop_reason": None, "stop_sequence": None}
        sequence = self.chat.ends(part, has_calls=False)["stop_reason"]
        reason = "max_tokens" if part.finish_reason == "length" else "stop_sequence" if sequence else "end_turn"
        return {"stop_reason": reason, "stop_sequence": sequence}


class MessagesEncoder:
    """Writes the events of one streamed message."""

    __slots__ = ("_form", "_frame", "_is_new", "_last", "is_plain")

    def __init__(self, form: MessagesForm, frame: tuple[bytes, bytes]) -> None:
        self.is_plain = True
        self._form = form
        self._frame = frame
        self._is_new = True
        self._last: ChoicePart | None = None

    def chunk(self, index: int, text: str) -> bytes:
        opening = self._open() if self._is_new else b""
        return opening + event(
            self._frame, "content_block_delta", index=index, delta={"type": "text_delta", "text": text}
        )

    def full_chunk(self, part: ChoicePart, usage: dict[str, Any] | None) -> bytes:  # noqa: ARG002 (told at the end)
        self._last = part
        return self.chunk(part.index, part.text) if part.text else self._open() if self._is_new else b""

    def ending(self, usage: dict[str, Any]) -> bytes:
        if self._last is None or self._last.finish_reason is None:
            # it failed, which is told by the last words
            return b""
        told = {"output_tokens": usage["completion_tokens"]}
        return b"".join(
            (
                event(self._frame, "content_block_stop", index=0),
                event(self._frame, "message_delta", delta=self._form.ends(self._last), usage=told),
                event(self._frame, "message_stop"),
            )
        )

    def _open(self) -> bytes:
        self._is_new = False
        start = event(self._frame, "message_start", message=self._form.message(0, [], None))
        return start + event(self._frame, "content_block_start", index=0, content_block={"type": "text", "text": ""})


def event(frame: tuple[bytes, bytes], kind: str, **fields: Any) -> bytes:
    """One event, named twice as Anthropic's clients expect it."""
    return b"event: %b\n%b%b%b" % (kind.encode(), frame[0], orjson.dumps({"type": kind, **fields}), frame[1])
