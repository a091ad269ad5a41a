"""Stop strings against a reference that sees the whole text at once."""

from __future__ import annotations

import time

from hypothesis import example, given
from hypothesis import strategies as st

from app.serving.stops import StopMatcher

stop_lists = st.lists(st.text("ab€", min_size=1, max_size=5), max_size=4)


def cut(text: str, stops: list[str], *, include: bool) -> tuple[str, str | None]:
    """Reads character by character; the first end of a stop string counts, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@given(st.lists(st.text("ab€ c", max_size=6), max_size=12), stop_lists, st.booleans())
@example(["abcd"], ["abcd", "bc"], False)
@example(["a", "b", "a", "b", "c"], ["ababc"], False)
@example(["aab"], ["ab", "aab"], True)
def test_pieces_joined_equal_the_reference(pieces: list[str], stops: list[str], include: bool) -> None:
    matcher = StopMatcher(stops, include_in_output=include)
    out, seen = "", ""
    expected, expected_stop = cut("".join(pieces), stops, include=include)
    for piece in pieces:
        seen += piece
        out += matcher.push(piece)
        # nothing is out that any continuation could still take back, and nothing waits that none could
        assert expected.startswith(out)
        if matcher.matched is None:
            longest = max(
                (n for n in range(len(seen) + 1) for s in stops if n < len(s) and s[:n] == seen[-n:]), default=0
            )
            assert len(out) == len(seen) - (longest if seen else 0)
    if matcher.matched is None:
        out += matcher.flush()
    assert (out, matcher.matched) == (expected, expected_stop)


def test_long_texts_are_not_searched_again() -> None:
    # a quadratic search over this text would take minutes
    matcher = StopMatcher(["a" * 255 + "b"], include_in_output=False)
    started = time.perf_counter()
    num_out = sum(len(matcher.push("xay")) for _ in range(100_000))
    assert num_out == 300_000
    assert time.perf_counter() - started < 5


def test_text_after_a_match_is_dropped() -> None:
    matcher = StopMatcher(["b"], include_in_output=False)
    assert matcher.push("ab") == "a"
    assert matcher.push("more") == ""
    assert matcher.flush() == ""
