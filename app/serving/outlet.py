"""Where the chunks of a streamed completion go, without this room knowing of HTTP."""

from __future__ import annotations

from typing import Protocol


class Outlet(Protocol):
    """One client that reads a stream. ``CompletionRun.resume`` is to be called when it can be written to again."""

    @property
    def frame(self) -> tuple[bytes, bytes]:
        """What stands before and after each chunk."""

    @property
    def is_blocked(self) -> bool:
        """More is not to be written now. What comes meanwhile waits as text and leaves together."""

    def write(self, chunks: bytes, *, is_last: bool) -> None:
        """Send chunks, each a JSON object in its frame; called only while not blocked. Must not block.

        After the last ones the run is done, so that they may leave together with what ends the stream.
        """
