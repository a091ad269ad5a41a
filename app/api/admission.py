"""How much work is let in: sequences beyond slots and queue, and prompt tokens beyond their limit, are refused."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from app.serving.errors import InvalidRequest, Overloaded


class Ticket:
    """The place of one admitted request; closed when the request is over, in whatever way."""

    def __init__(self, admission: Admission, num_rows: int, num_tokens: int) -> None:
        self._admission = admission
        self._num_rows = num_rows
        self._num_tokens = num_tokens

    def count_tokens(self, num_tokens: int) -> None:
        """Replace the estimate by the true number of prompt tokens, or by 0 once none of them waits."""
        self._admission.num_waiting_tokens += num_tokens - self._num_tokens
        self._num_tokens = num_tokens

    def close(self) -> None:
        self.count_tokens(0)
        self._admission.num_rows -= self._num_rows
        self._num_rows = 0


class ByteBudget:
    """How many bytes of bodies are worked on at once beside the engine, so that they leave cores for everything else.

    One that is larger than all of it is let in while no other is there.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.num_bytes = 0

    def check(self) -> None:
        """Refuse even before the body is read when nothing more has a place. Raises Overloaded."""
        if self.num_bytes >= self._max_bytes:
            raise _overloaded()

    @contextmanager
    def hold(self, num_bytes: int) -> Generator[None, None, None]:
        """A block for one body. Raises Overloaded instead of entering it."""
        if self.num_bytes and self.num_bytes + num_bytes > self._max_bytes:
            raise _overloaded()
        self.num_bytes += num_bytes
        try:
            yield
        finally:
            self.num_bytes -= num_bytes


class Admission:
    """Counts what was let in and is not over. A refusal costs two comparisons, so it comes before tokenizing."""

    def __init__(self, max_queue: int, max_queue_tokens: int) -> None:
        self._max_queue = max_queue
        self._max_queue_tokens = max_queue_tokens
        self.num_rows = 0
        self.num_waiting_tokens = 0

    def check(self, num_slots: int) -> None:
        """Refuse even before the body is read when not one more sequence has a place. Raises Overloaded."""
        if self.num_rows >= num_slots + self._max_queue or self.num_waiting_tokens >= self._max_queue_tokens:
            raise _overloaded()

    def enter(self, num_slots: int, num_rows: int, num_tokens: int) -> Ticket:
        """Let a request in. Raises Overloaded, or InvalidRequest when it could not even enter an idle server.

        A request whose prompts alone exceed the limit of tokens is let in while no others wait.
        """
        capacity = num_slots + self._max_queue
        if num_rows > capacity:
            raise InvalidRequest(f"the request asks for {num_rows} sequences at once; this server holds {capacity}")
        if self.num_rows + num_rows > capacity:
            raise _overloaded()
        if self.num_waiting_tokens and self.num_waiting_tokens + num_tokens > self._max_queue_tokens:
            raise _overloaded()
        self.num_rows += num_rows
        self.num_waiting_tokens += num_tokens
        return Ticket(self, num_rows, num_tokens)


def _overloaded() -> Overloaded:
    return Overloaded("the server is full; try again in a moment", retry_after=1.0)
