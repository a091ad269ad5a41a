"""SSM states that lack the last token of their sequence, until the step after it.

A decode step of many rows reads and writes all their states, which is most of what it does. What a token does to a
state takes a sixteenth of the state's size to keep. So a step may leave the states as they are and keep the token
instead; the next one does both tokens and writes the states. The operations are the same either way, and so is every
bit. Half of the rows of a step write and half do not: what some have to compute beside passes while others' states are
on their way, and all steps take the same time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# phases of a slot: its states lack a token; a step has just written them, and the next one leaves them behind
BEHIND = 1
WRITTEN = 2


@dataclass(frozen=True, slots=True)
class Lag:
    """What the states of S slots lack, in all layers or, from ``layer``, in one.

    phases [S] int32, in all layers alike: BEHIND, WRITTEN, or 0 of states that lack nothing and are left behind by the
    next step if the slot's number is even. inputs [layers, S, 2, D]: x of the token that is lacking, and delta before
    its bias and softplus. b [layers, S, N] fp32: B as the recurrence takes it.
    """

    phases: Tensor
    inputs: Tensor
    b: Tensor

    @classmethod
    def zeros(
        cls, layers: int, slots: int, dim: int, states: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> Lag:
        """Of states that lack nothing."""
        return cls(
            torch.zeros(slots, dtype=torch.int32, device=device),
            torch.zeros(layers, slots, 2, dim, dtype=dtype, device=device),
            torch.zeros(layers, slots, states, dtype=torch.float32, device=device),
        )

    @staticmethod
    def slot_bytes(layers: int, dim: int, states: int, dtype: torch.dtype) -> int:
        """Bytes one slot takes, without allocating it."""
        return 4 + layers * (2 * dim * dtype.itemsize + 4 * states)

    @property
    def nbytes(self) -> int:
        return self.phases.nbytes + self.inputs.nbytes + self.b.nbytes

    def layer(self, index: int) -> Lag:
        """Views of one layer: inputs [S, 2, D] and b [S, N]."""
        return Lag(self.phases, self.inputs[index], self.b[index])
