"""Memory that a step needs between its phases."""

from __future__ import annotations

import numpy as np

_LINE = 64


class Scratch:
    """Zeroed memory that is handed out in rows which begin at cache lines."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def rows(self, num_rows: int, num_bytes: int) -> tuple[int, int]:
        """Address of the first row and bytes from one to the next, which hold ``num_bytes`` and zeros behind them."""
        # an odd number of lines, so that equal columns of several rows do not meet in one set of a cache
        lines = -(-(num_bytes + _LINE) // _LINE) | 1
        array = np.zeros((num_rows * lines + 1) * _LINE, np.uint8)
        self._arrays.append(array)
        address: int = array.ctypes.data
        return -(-address // _LINE) * _LINE, lines * _LINE
