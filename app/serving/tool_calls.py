"""Calls of tools in what a model writes: Hermes' way, ``<tool_call>{"name": ..., "arguments": ...}</tool_call>``."""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass, field

OPEN, CLOSE = "<tool_call>", "</tool_call>"

MAX_CALL_CHARACTERS = 128 * 1024
MAX_GAP_CHARACTERS = 256

_IN_TEXT = re.compile(r'["<]')
_IN_STRING = re.compile(r'["\\]')


def _new_id() -> str:
    return f"call_{secrets.token_hex(12)}"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call; ``arguments`` is the text of a JSON object."""

    name: str
    arguments: str
    id: str = field(default_factory=_new_id)


Piece = str | ToolCall


class ToolCallParser:
    """Takes calls out of text that comes in pieces; what it finds does not depend on where the pieces end.

    A call is told when it is complete, since one that turns out to be no JSON stays text. White space around calls
    is dropped. The end of the text closes a call, too. is_open: the text begins inside a call. is_single: what comes
    after the first call is dropped.
    """

    __slots__ = ("_buffer", "_gap", "_is_after_call", "_is_in_call", "_is_in_string", "_is_single", "_opening", "_seen")

    def __init__(self, *, is_open: bool = False, is_single: bool = False) -> None:
        self._is_single = is_single
        self._is_after_call = False
        self._is_in_call = is_open
        # what opened the call, and the white space before that, should both have to be given back
        self._opening = ""
        self._gap = ""
        self._buffer = ""
        # within a call: so much was looked at, and ends inside of a string
        self._seen = 0
        self._is_in_string = False

    def push(self, text: str) -> list[Piece]:
        """What is certain with this text and was not before."""
        self._buffer += text
        pieces: list[Piece] = []
        while self._take_call(pieces) if self._is_in_call else self._take_text(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        """The end of the text."""
        pieces: list[Piece] = []
        if self._is_in_call:
            self._end_call(pieces, self._buffer, "")
        elif not self._is_after_call and self._buffer:
            pieces.append(self._buffer)
        self._buffer = ""
        return pieces

    def _take_text(self, pieces: list[Piece]) -> bool:
        """Let out text, up to where a call may begin. Whether there is more to be done."""
        if self._is_after_call:
            self._buffer = "" if self._is_single else self._buffer.lstrip()
            if len(self._buffer) < len(OPEN) and OPEN.startswith(self._buffer):
                return False
            self._is_after_call = False
        start = self._buffer.find(OPEN)
        is_found = start >= 0
        if not is_found:
            start = len(self._buffer) - _length_of_beginning(self._buffer)
        end = max(len(self._buffer[:start].rstrip()), start - MAX_GAP_CHARACTERS)
        if end:
            pieces.append(self._buffer[:end])
        if not is_found:
            self._buffer = self._buffer[end:]
            return False
        self._gap, self._opening = self._buffer[end:start], OPEN
        self._buffer = self._buffer[start + len(OPEN) :]
        self._is_in_call, self._seen, self._is_in_string = True, 0, False
        return True

    def _take_call(self, pieces: list[Piece]) -> bool:
        end = self._find_close()
        if end is None:
            if len(self._buffer) <= MAX_CALL_CHARACTERS:
                return False
            end = len(self._buffer)
            self._end_call(pieces, self._buffer, "")
            self._buffer = ""
            return False
        inside, self._buffer = self._buffer[:end], self._buffer[end + len(CLOSE) :]
        self._end_call(pieces, inside, CLOSE)
        return True

    def _end_call(self, pieces: list[Piece], inside: str, closing: str) -> None:
        call = parse_call(inside)
        self._is_in_call = False
        self._is_after_call = call is not None
        text = self._gap + self._opening + inside + closing
        if call is not None:
            pieces.append(call)
        elif text:
            pieces.append(text)

    def _find_close(self) -> int | None:
        """Where the mark of the end stands, outside of strings; goes on where it stopped the last time."""
        buffer, i = self._buffer, self._seen
        while i < len(buffer):
            match = (_IN_STRING if self._is_in_string else _IN_TEXT).search(buffer, i)
            if match is None:
                i = len(buffer)
                break
            i = match.start()
            if match[0] == '"':
                self._is_in_string = not self._is_in_string
                i += 1
            elif match[0] == "\\":
                if i + 1 == len(buffer):
                    break
                i += 2
            else:
                rest = buffer[i : i + len(CLOSE)]
                if rest == CLOSE:
                    return i
                if CLOSE.startswith(rest):
                    break
                i += 1
        self._seen = i
        return None


def parse_call(text: str) -> ToolCall | None:
    """The call that a JSON object says, or None if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict):
        return None
    return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))


def _length_of_beginning(text: str) -> int:
    """Of the longest end of ``text`` with which the mark of a call begins."""
    start = text.rfind("<", max(0, len(text) - len(OPEN) + 1))
    return len(text) - start if start >= 0 and OPEN.startswith(text[start:]) else 0
