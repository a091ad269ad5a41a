"""Responses that later requests may go on after: in memory, bounded, those not used for longest out first."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from app.serving.errors import RequestError

# what an entry takes beside its bytes
_OVERHEAD = 512


class ResponseNotFound(RequestError):
    """No response of that id is kept for whoever asks."""

    status = 404
    type = "invalid_request_error"
    code = "response_not_found"

    def __init__(self) -> None:
        super().__init__(
            "no response of this id is kept: it never was, was too large, is another key's, or gave way to others",
            param="response_id",
        )


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """answer: the response as it was answered. conversation: all messages up to its end, without instructions.

    Both are JSON, so that what they take is known to the byte.
    """

    answer: bytes
    conversation: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.answer) + len(self.conversation) + _OVERHEAD


class ResponseStore:
    """At most ``max_responses`` of at most ``max_bytes`` together; 0 responses for none. For one thread.

    Owners see only their own responses. One that is too large for all of the room is not kept.
    """

    def __init__(self, max_responses: int, max_bytes: int) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._responses: OrderedDict[tuple[str | None, str], StoredResponse] = OrderedDict()

    def __len__(self) -> int:
        return len(self._responses)

    @property
    def is_open(self) -> bool:
        """Whether anything is kept at all."""
        return self._max_responses > 0

    @property
    def num_bytes(self) -> int:
        """What is kept."""
        return self._num_bytes

    def put(self, owner: str | None, response_id: str, response: StoredResponse) -> bool:
        """Keep a response of a new id; others give way to it. False if it cannot be kept."""
        if not self.is_open or response.num_bytes > self._max_bytes:
            return False
        self._responses[owner, response_id] = response
        self._num_bytes += response.num_bytes
        while len(self._responses) > self._max_responses or self._num_bytes > self._max_bytes:
            _, oldest = self._responses.popitem(last=False)
            self._num_bytes -= oldest.num_bytes
        return True

    def get(self, owner: str | None, response_id: str) -> StoredResponse:
        """Counts as use. Raises ResponseNotFound."""
        response = self._responses.get((owner, response_id))
        if response is None:
            raise ResponseNotFound
        self._responses.move_to_end((owner, response_id))
        return response

    def delete(self, owner: str | None, response_id: str) -> None:
        """Responses that went on after it have all of the conversation and stay. Raises ResponseNotFound."""
        response = self._responses.pop((owner, response_id), None)
        if response is None:
            raise ResponseNotFound
        self._num_bytes -= response.num_bytes
