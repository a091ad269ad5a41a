"""How the sequences of one call lie end to end, and which state slot each of them continues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class HostRows:
    """What the host knows of the rows of a packing.

    slots [B], bounds [B+1] int64, contiguous, on the CPU; slot_range, bound_range: the least and the greatest of
    each, None of no slots.
    """

    slots: Tensor
    bounds: Tensor
    slot_range: tuple[int, int] | None
    bound_range: tuple[int, int]


@dataclass(frozen=True)
class Packing:
    """B sequences packed into T tokens; made once per forward and shared by all layers.

    slots [B] int64: the state slot of each sequence. cu_seqlens [B+1] int32: where each begins, and where the last
    ends; a sequence may be empty. num_tokens is T, max_seqlen the longest sequence: known to the host, so that no
    kernel launch waits for the device. Index vectors derived from these are made on first use and kept.

    Without gradients, max_seqlen may be more than the longest, and the last sequence may end before T: the tokens after
    it belong to none, and what an op returns for them means nothing.

    in_steps: a model may take the tokens as those of steps instead, one of a sequence behind the other. num_beside: as
    many such packings are at work at the same time, this one included, by which a kernel may choose how to go about it.
    may_lag: a step may leave states behind by a token, if the cache has room for it and the rows are many enough
    (``lagging.lags``); for any other packing no state may lack one.
    """

    slots: Tensor
    cu_seqlens: Tensor
    num_tokens: int
    max_seqlen: int
    in_steps: bool = False
    num_beside: int = 1
    may_lag: bool = False

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], slots: Tensor, *, in_steps: bool = False) -> Packing:
        """Packing of sequences with these lengths, on the device of ``slots``."""
        if len(lengths) != slots.shape[0]:
            raise ValueError(f"{len(lengths)} lengths for {slots.shape[0]} slots")
        offsets = [0]
        for length in lengths:
            offsets.append(offsets[-1] + length)
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32).to(slots.device, non_blocking=True)
        return cls(slots, cu_seqlens, offsets[-1], max(lengths, default=0), in_steps)

    @classmethod
    def step(cls, slots: Tensor, *, may_lag: bool = False) -> Packing:
        """Packing of one token per row."""
        rows = slots.shape[0]
        bounds = torch.arange(rows + 1, dtype=torch.int32, device=slots.device)
        return cls(slots, bounds, rows, 1, may_lag=may_lag)

    @property
    def num_rows(self) -> int:
        return self.slots.shape[0]

    @property
    def is_step(self) -> bool:
        """Whether every row has exactly one token, so that the step ops apply."""
        return self.max_seqlen == 1 and self.num_tokens == self.num_rows

    @property
    def token_slots(self) -> Tensor:
        """The state slot of each token [T], if every token belongs to a sequence."""
        if self.is_step:
            return self.slots
        return self.slots.repeat_interleave(self.cu_seqlens.diff().long(), output_size=self.num_tokens)

    @cached_property
    def seq_idx(self) -> Tensor:
        """The row of each token, [T] int32; B for a token of none."""
        tokens = torch.arange(self.num_tokens, dtype=torch.int32, device=self.cu_seqlens.device)
        return torch.searchsorted(self.cu_seqlens[1:], tokens, right=True, out_int32=True)

    @cached_property
    def host_rows(self) -> HostRows:
        """Slots and bounds for kernels that the host runs. Raises ValueError where they are not vectors that fit."""
        if self.slots.dim() != 1 or self.cu_seqlens.shape != (len(self.slots) + 1,):
            shapes = f"{tuple(self.slots.shape)} and {tuple(self.cu_seqlens.shape)}"
            raise ValueError(f"slots and cu_seqlens must have shapes (B,) and (B + 1,), got {shapes}")
        slots, bounds = (t.to("cpu", torch.int64).contiguous() for t in (self.slots, self.cu_seqlens))
        numbers, limits = slots.tolist(), bounds.tolist()
        slot_range = (min(numbers), max(numbers)) if numbers else None
        return HostRows(slots, bounds, slot_range, (min(limits), max(limits)))
