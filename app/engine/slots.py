"""The free list of state slots: which place in the state pool is held, which is free."""

from __future__ import annotations

SCRATCH_SLOT = 0


class SlotPool:
    """Slots 1 .. num_slots; slot 0 is scratch, where padding rows write, and is never handed out.

    The slot freed last is handed out first, so that a lightly loaded engine stays in few pages of memory.
    """

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ValueError(f"a pool needs at least one slot, got {num_slots}")
        self.num_slots = num_slots
        self._free = list(range(num_slots, SCRATCH_SLOT, -1))
        self._held: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        return len(self._held)

    @property
    def held(self) -> frozenset[int]:
        return frozenset(self._held)

    def allocate(self) -> int:
        """A slot nobody holds. Raises IndexError when there is none: ask ``num_free`` first."""
        slot = self._free.pop()
        self._held.add(slot)
        return slot

    def free(self, slot: int) -> None:
        """Give a slot back. Raises KeyError when it is not held."""
        self._held.remove(slot)
        self._free.append(slot)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every slot is either free or held, once."""
        assert len(set(self._free)) == len(self._free), "a slot is free twice"
        assert self._held.isdisjoint(self._free), "a slot is both free and held"
        assert self._held | set(self._free) == set(range(1, self.num_slots + 1)), "a slot is lost or foreign"
