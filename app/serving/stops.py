"""Stop strings: text is cut before the first of them, and no part of one is let out early."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Looks for stop strings in text that comes in pieces; what it finds does not depend on where the pieces end.

    Of several stop strings the one that is complete first counts, and of those that end together the longest.
    Looks at each character a bounded number of times, since no more is held back than a stop string's length.
    """

    __slots__ = ("_first_characters", "_held", "_is_included", "_longest", "_stops", "matched")

    def __init__(self, stops: Sequence[str], *, include_in_output: bool) -> None:
        self._stops = tuple(stops)
        self._first_characters = frozenset(stop[0] for stop in self._stops)
        self._longest = max(map(len, self._stops), default=0)
        self._is_included = include_in_output
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """The text that may be let out now. ``matched`` is set once a stop string is complete."""
        if not self._stops or self.matched is not None:
            return piece if self.matched is None else ""
        text = self._held + piece
        cut = self._find(text)
        if cut is None:
            cut = len(text) - self._num_held(text)
        self._held = text[cut:] if self.matched is None else ""
        return text[:cut]

    def flush(self) -> str:
        """The end of the text: what was held back is no stop string."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> int | None:
        """Where to cut, if a stop string is complete in ``text``."""
        ends = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if not ends:
            return None
        end, start, self.matched = min(ends)
        return end if self._is_included else start

    def _num_held(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop string begins."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._first_characters:
                tail = text[start:]
                if any(stop.startswith(tail) for stop in self._stops):
                    return len(tail)
        return 0


class LateMatcher:
    """A matcher that overlooks text while ``is_awake`` is false: what comes before is not searched later either."""

    __slots__ = ("_matcher", "is_awake")

    def __init__(self, matcher: StopMatcher) -> None:
        self._matcher = matcher
        self.is_awake = False

    @property
    def matched(self) -> str | None:
        return self._matcher.matched

    def push(self, piece: str) -> str:
        return self._matcher.push(piece) if self.is_awake else piece

    def flush(self) -> str:
        return self._matcher.flush()
