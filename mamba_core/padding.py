"""From padded batches to packed sequences and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mamba_core.ops.packing import Packing


@dataclass(frozen=True, slots=True)
class PaddedRows:
    """Where the real tokens of a batch [B, L] are; ``index`` [T] is None when all of them are real."""

    packing: Packing
    index: Tensor | None
    num_rows: int
    num_columns: int

    @classmethod
    def of(cls, batch: Tensor, attention_mask: Tensor | None) -> PaddedRows:
        """Rows of ``batch`` [B, L, ...]; the last L columns of the mask say which tokens are real.

        Row b continues slot b. Without a mask nothing here waits for the device. Raises ValueError for a mask of a
        wrong shape.
        """
        num_rows, num_columns = batch.shape[:2]
        slots = torch.arange(num_rows, device=batch.device)
        if attention_mask is not None:
            real = _real_positions(attention_mask, num_rows, num_columns)
            lengths = real.sum(1).tolist()
            if min(lengths, default=num_columns) < num_columns:
                index = real.flatten().nonzero().squeeze(1).to(batch.device, non_blocking=True)
                return cls(Packing.from_lengths(lengths, slots), index, num_rows, num_columns)
        cu_seqlens = torch.arange(num_rows + 1, dtype=torch.int32, device=batch.device) * num_columns
        packing = Packing(slots, cu_seqlens, num_rows * num_columns, num_columns if num_rows else 0)
        return cls(packing, None, num_rows, num_columns)

    def pack(self, x: Tensor) -> Tensor:
        """[B, L, H] -> [T, H]"""
        flat = x.flatten(0, 1)
        return flat if self.index is None else flat.index_select(0, self.index)

    def unpack(self, x: Tensor) -> Tensor:
        """[T, H] -> [B, L, H], zero at padding."""
        if self.index is not None:
            x = x.new_zeros(self.num_rows * self.num_columns, x.shape[-1]).index_copy(0, self.index, x)
        return x.view(self.num_rows, self.num_columns, x.shape[-1])


def _real_positions(attention_mask: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """The last columns of the mask [B, L] as booleans on the host: one wait for the device instead of several."""
    if attention_mask.dim() != 2 or attention_mask.shape[0] != num_rows or attention_mask.shape[1] < num_columns:
        raise ValueError(
            f"attention_mask must have shape ({num_rows}, {num_columns} or more), got {tuple(attention_mask.shape)}"
        )
    return (attention_mask[:, attention_mask.shape[1] - num_columns :] != 0).cpu()
