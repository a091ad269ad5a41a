"""What the engine itself does to the states of slots, and which of them lack a token."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable
from typing import Protocol

import torch
from torch import Tensor

from app.engine.host import to_device
from app.engine.sequence import Sequence
from app.engine.slots import SCRATCH_SLOT
from mamba_core.cache import MambaCache


class Settler(Protocol):
    """What gives states the tokens that they lack; ``mamba_core.lagging.Settler`` is one."""

    def lags(self, num_rows: int) -> bool:
        """Whether a step of so many rows leaves states behind."""

    def settle(self, slots: Tensor) -> None:
        """Let the states of these slots lack nothing; [B] int64, each once."""


class States:
    """The states of a cache. Without a ``settler`` none ever lacks a token.

    With one, steps may leave them behind, and the host knows of which slots that may be true: it is told of every step
    before it is launched, and never asks the device.
    """

    def __init__(self, cache: MambaCache, settler: Settler | None = None) -> None:
        self._cache = cache
        self._settler = settler
        self._behind: set[int] = set()
        # the last step's rows and whether it left them behind: as long as nobody comes or goes, nothing changes
        self._last: tuple[tuple[Sequence, ...], bool] | None = None

    @property
    def behind(self) -> frozenset[int]:
        """Slots whose states may lack a token."""
        return frozenset(self._behind)

    def start(self) -> None:
        """Get ready, so that nothing is compiled when slots are settled for the first time."""
        if self._settler is not None:
            self._settler.settle(self._upload([SCRATCH_SLOT]))

    def zero(self, slots: Collection[int]) -> None:
        """Make slots fresh."""
        self._cache.zero(self._upload(slots))
        self._behind.difference_update(slots)
        self._last = None

    def copy(self, forks: Collection[tuple[int, int]]) -> None:
        """Copy states along forks (source, destination), whether they lack a token or not."""
        sources, targets = zip(*forks, strict=True)
        self._cache.copy(*self._upload((*sources, *targets)).view(2, -1).unbind(0))
        behind = {target for source, target in forks if source in self._behind}
        self._behind.difference_update(targets)
        self._behind |= behind
        self._last = None

    def settle(self, slots: Iterable[int]) -> None:
        """Let these lack nothing, before anything but a step that lags continues them."""
        if self._settler is None or not self._behind:
            return
        late = self._behind.intersection(slots)
        if late:
            self._settler.settle(self._upload(late))
            self._behind -= late
            self._last = None

    def before_step(self, rows: tuple[Sequence, ...], num_rows: int) -> None:
        """One token for each of ``rows`` follows, in a step that is made for ``num_rows``."""
        if self._settler is None:
            return
        lags = self._settler.lags(num_rows)
        if self._last is not None and self._last[0] is rows and self._last[1] == lags:
            return
        slots = [sequence.slot for sequence in rows]
        if lags:
            self._behind.update(slots)
        else:
            self.settle(slots)
        self._last = (rows, lags)

    def _upload(self, slots: Iterable[int]) -> Tensor:
        return to_device(array("q", slots), torch.int64, self._cache.device)
