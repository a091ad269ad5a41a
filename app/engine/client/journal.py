"""What the engine process has reported of live requests, so that another can go on where it stopped."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import msgspec

from app.engine.messages import Report, StepReport

# a token takes some 8 bytes here, and each step some 50 more
MAX_BYTES = 32 * 1024 * 1024


class Journal:
    """Messages as they came, which costs nothing per token; they are taken apart only when a process has died.

    Places are counted from 0 in all; what is before ``first`` is gone, and ``end`` is that of the next message. Once
    the messages are larger than ``max_bytes``, the oldest ones are dropped.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._messages: deque[bytes] = deque()
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self.first = 0

    @property
    def end(self) -> int:
        return self.first + len(self._messages)

    def write(self, message: bytes) -> None:
        """Keep one more message."""
        self._messages.append(message)
        self._num_bytes += len(message)
        while self._num_bytes > self._max_bytes:
            self._drop()

    def forget_before(self, place: int) -> None:
        """Nobody will ask for what is before this place."""
        while self.first < place and self._messages:
            self._drop()

    def read(self) -> Iterator[StepReport]:
        """All that is kept, in the order in which it came."""
        decoder: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)
        for message in self._messages:
            report = decoder.decode(message)
            if isinstance(report, StepReport):
                yield report

    def _drop(self) -> None:
        self._num_bytes -= len(self._messages.popleft())
        self.first += 1
