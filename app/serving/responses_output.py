"""The output of a response: items made of what the model writes, and the events that tell how they grow."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

from app.schemas.messages import Message
from app.serving.tool_calls import Piece, ToolCall, ToolCallParser

Item = dict[str, Any]
# the type of an event, without "response.", and its fields
Tell = Callable[[str, dict[str, Any]], None]


class OpenMessage:
    """A message that still grows."""

    __slots__ = ("id", "logprobs", "texts")

    def __init__(self) -> None:
        self.id = f"msg_{secrets.token_hex(16)}"
        self.texts: list[str] = []
        self.logprobs: list[Item] = []

    def part(self) -> Item:
        """What its content is."""
        return {**_NO_TEXT, "text": "".join(self.texts), "logprobs": self.logprobs}

    def item(self, status: str, content: Sequence[Item] = ()) -> Item:
        return {"id": self.id, "type": "message", "status": status, "role": "assistant", "content": list(content)}


class Output:
    """Items in the order in which the model writes them.

    parser: finds calls of tools, None where there are none. items: those that are complete. message: the one that
    grows, if any.
    """

    __slots__ = ("_parser", "_tell", "items", "message")

    def __init__(self, parser: ToolCallParser | None, tell: Tell) -> None:
        self._parser = parser
        self._tell = tell
        self.items: list[Item] = []
        self.message: OpenMessage | None = None

    def take(self, text: str, logprobs: Sequence[Item], finish_reason: str | None) -> None:
        """What the model wrote since the last call; with a finish reason nothing comes after it."""
        pieces: list[Piece] = [text] if text or logprobs else []
        if self._parser is not None:
            pieces = self._parser.push(text) + (self._parser.finish() if finish_reason is not None else [])
        for piece in pieces:
            if isinstance(piece, ToolCall):
                self._add_call(piece)
            else:
                self._add_text(piece, logprobs)
        if finish_reason is not None:
            if not self.items:
                self.open()
            self._close("incomplete" if finish_reason == "length" else "completed")

    def open(self) -> OpenMessage:
        """The message that grows, a new one if there is none."""
        if self.message is None:
            self.message = message = OpenMessage()
            place = self._place()
            item = message.item("in_progress")
            self._tell("output_item.added", {"output_index": place["output_index"], "item": item})
            self._tell("content_part.added", {**place, "part": _NO_TEXT})
        return self.message

    def all_items(self) -> list[Item]:
        """Those that are complete, and what there is of the one that is not."""
        message = self.message
        return self.items if message is None else [*self.items, message.item("incomplete", [message.part()])]

    def _place(self) -> dict[str, Any]:
        assert self.message is not None
        return {"item_id": self.message.id, "output_index": len(self.items), "content_index": 0}

    def _add_text(self, text: str, logprobs: Sequence[Item]) -> None:
        message = self.open()
        message.texts.append(text)
        message.logprobs += logprobs
        self._tell("output_text.delta", {**self._place(), "delta": text, "logprobs": logprobs})

    def _close(self, status: str) -> None:
        message = self.message
        if message is None:
            return
        place, part = self._place(), message.part()
        item = message.item(status, [part])
        self._tell("output_text.done", {**place, "text": part["text"], "logprobs": part["logprobs"]})
        self._tell("content_part.done", {**place, "part": part})
        self._tell("output_item.done", {"output_index": place["output_index"], "item": item})
        self.items.append(item)
        self.message = None

    def _add_call(self, call: ToolCall) -> None:
        self._close("completed")
        item = {
            "id": f"fc_{secrets.token_hex(16)}",
            "type": "function_call",
            "status": "completed",
            "call_id": call.id,
            "name": call.name,
            "arguments": call.arguments,
        }
        index = {"output_index": len(self.items)}
        place = {"item_id": item["id"], **index}
        self._tell("output_item.added", {**index, "item": {**item, "status": "in_progress", "arguments": ""}})
        self._tell("function_call_arguments.delta", {**place, "delta": call.arguments})
        done = {**place, "name": call.name, "arguments": call.arguments}
        self._tell("function_call_arguments.done", done)
        self._tell("output_item.done", {**index, "item": item})
        self.items.append(item)


_NO_TEXT: Item = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


def message_of(output: Sequence[Item]) -> Message:
    """What the assistant said and called, as chat templates see it."""
    text = "".join([part["text"] for item in output if item["type"] == "message" for part in item["content"]])
    calls = [
        {
            "id": item["call_id"],
            "type": "function",
            "function": {"name": item["name"], "arguments": item["arguments"]},
        }
        for item in output
        if item["type"] == "function_call"
    ]
    if not calls:
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "content": text or None, "tool_calls": calls}
