"""Responses that are kept: whose they are, how many, how large, and which give way."""

from __future__ import annotations

import pytest

from app.serving.responses_store import ResponseNotFound, ResponseStore, StoredResponse


def response(size: int = 1) -> StoredResponse:
    return StoredResponse(b"a" * size, b"[]")


def test_one_is_only_its_owners() -> None:
    store = ResponseStore(10, 10**6)
    store.put("one", "resp_1", response())
    assert store.get("one", "resp_1") == response()
    for owner in ("two", None):
        with pytest.raises(ResponseNotFound):
            store.get(owner, "resp_1")
        with pytest.raises(ResponseNotFound):
            store.delete(owner, "resp_1")
    store.delete("one", "resp_1")
    assert (len(store), store.num_bytes) == (0, 0)


def test_the_one_not_used_for_longest_gives_way() -> None:
    store = ResponseStore(2, 10**6)
    for name in ("a", "b"):
        store.put(None, name, response())
    store.get(None, "a")
    store.put(None, "c", response())
    assert len(store) == 2
    with pytest.raises(ResponseNotFound):
        store.get(None, "b")
    assert store.get(None, "a") == store.get(None, "c")


def test_bytes_are_bounded() -> None:
    size = response(1000).num_bytes
    store = ResponseStore(100, 3 * size)
    for number in range(10):
        store.put(None, str(number), response(1000))
        assert store.num_bytes <= 3 * size
    assert len(store) == 3
    # one that fits nowhere drives nobody out
    store.put(None, "large", response(4 * size))
    assert len(store) == 3
    with pytest.raises(ResponseNotFound):
        store.get(None, "large")
    # one that takes all of it drives everybody out
    largest = response(3 * size - response(0).num_bytes)
    store.put(None, "largest", largest)
    assert (len(store), store.num_bytes) == (1, largest.num_bytes)


def test_none_are_kept_where_there_is_no_room() -> None:
    store = ResponseStore(0, 10**6)
    store.put(None, "a", response())
    assert not store.is_open
    assert (len(store), store.num_bytes) == (0, 0)
