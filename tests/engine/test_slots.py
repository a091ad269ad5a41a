"""A slot is handed out once, comes back once, and slot 0 never leaves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.engine.slots import SCRATCH_SLOT, SlotPool


def test_every_slot_but_scratch_is_handed_out_once() -> None:
    pool = SlotPool(5)
    slots = [pool.allocate() for _ in range(5)]
    assert sorted(slots) == [1, 2, 3, 4, 5]
    assert SCRATCH_SLOT not in slots
    assert (pool.num_free, pool.num_held) == (0, 5)
    with pytest.raises(IndexError):
        pool.allocate()


def test_a_freed_slot_is_the_next_one() -> None:
    pool = SlotPool(3)
    first = pool.allocate()
    pool.allocate()
    pool.free(first)
    assert pool.allocate() == first


@pytest.mark.parametrize("slot", [0, 1, 4])
def test_a_slot_that_is_not_held_cannot_be_freed(slot: int) -> None:
    pool = SlotPool(3)
    with pytest.raises(KeyError):
        pool.free(slot)


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one slot"):
        SlotPool(0)


def test_a_slot_freed_behind_the_pool_is_noticed() -> None:
    pool = SlotPool(2)
    slot = pool.allocate()
    pool._free.append(slot)
    with pytest.raises(AssertionError, match="both free and held"):
        pool.check_integrity()


@given(st.integers(1, 6), st.lists(st.integers(0, 5)))
def test_any_order_of_use_keeps_the_books(num_slots: int, choices: list[int]) -> None:
    pool = SlotPool(num_slots)
    held: list[int] = []
    for choice in choices:
        if choice % 2 and held:
            pool.free(held.pop(choice % len(held)))
        elif pool.num_free:
            held.append(pool.allocate())
        pool.check_integrity()
        assert pool.held == frozenset(held)
        assert pool.num_free == num_slots - len(held)
