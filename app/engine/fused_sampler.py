"""Draws one token per row on a GPU in two launches that a CUDA graph can hold, from parameters kept per slot.

The meaning is that of ``app.engine.sampler`` without bias and penalties, which the caller applies to the logits
before; only a uniform within rounding of a boundary between two tokens may choose the other one.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Iterator, Sequence

import torch
import triton
from torch import Tensor

from app.engine.decoder import BROKEN
from app.engine.fused_sampler_kernels import ENTRY_WORDS, sampler_block_kernel, sampler_row_kernel
from app.engine.host import to_device
from app.engine.request import SamplingParams
from app.engine.sampler import GREEDY_TEMPERATURE

# logits of one program of the first kernel; the sums are made by these blocks whatever the number of rows
_BLOCK = 1024
# logits that one program of a filtered row looks at together
_CHUNK = 2048
# logits among which the threshold of a filter is sought without reading the row again
_CANDIDATES = 4096
# blocks whose sums such a row makes together
_GROUP = 4
_BLOCK_WARPS = 2
_ROW_WARPS = 8
# of the second kernel, so that a multiprocessor holds two of its programs
_ROW_REGISTERS = 128

_LARGEST_TOP_K = 2**31 - 1

# of one slot: key, position, temperature, top_p, log of min_p, top_k, token drawn last
_ENTRY = struct.Struct("=qqfffiq")
assert _ENTRY.size == 8 * ENTRY_WORDS.value


class SlotSampling:
    """How each slot's tokens are drawn, in tables [S] on the device.

    ``temperature`` is 0 for greedy slots; ``top_k`` 0, ``top_p`` 1 and ``floors`` (the log of min_p) -inf are off;
    ``keys`` are those of ``distribution.stream_key``; ``positions`` are those of the tokens drawn next, and
    ``last_tokens`` what was drawn before. All are views of one table, so that a slot lies in one place. A slot that was
    never written is greedy, the scratch slot 0 always should be: several rows may share it.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self._device = device
        self.table = torch.zeros(num_slots, ENTRY_WORDS.value, dtype=torch.int64, device=device)
        narrow = self.table.view(torch.float32)  # [S, 10]
        self.keys, self.positions, self.last_tokens = self.table[:, 0], self.table[:, 1], self.table[:, 4]
        self.temperature, self.top_p, self.floors = narrow[:, 4], narrow[:, 5], narrow[:, 6]
        self.top_k = self.table.view(torch.int32)[:, 7]

    def write(
        self,
        slots: Sequence[int],
        params: Sequence[SamplingParams],
        keys: Sequence[int],
        positions: Sequence[int],
        last_tokens: Sequence[int],
    ) -> None:
        """Set the entries of these slots, each named once, without waiting for the device."""
        if not slots:
            return
        packed = array("q", slots)
        for row in zip(params, keys, positions, last_tokens, strict=True):
            packed.frombytes(_pack(*row))
        numbers = to_device(packed, torch.int64, self._device)
        rows = numbers[len(slots) :].view(len(slots), ENTRY_WORDS.value)
        self.table.index_copy_(0, numbers[: len(slots)], rows)


def draw_tokens(logits: Tensor, slots: Tensor, tables: SlotSampling, out: Tensor | None = None) -> Tensor:
    """One token per row, which is the last one of its slot from now on; the positions of the slots advance by 1.

    logits [B, V] fp32 or bf16, rows strided, not changed; slots [B] int64, distinct except for the scratch slot.
    Returns tokens [B] int64, in ``out`` if given, BROKEN where a logit is NaN or Inf; the last token then is
    meaningless but in [0, V). The same tokens for a row whatever the other rows are.
    """
    num_rows, num_tokens = logits.shape
    if logits.stride(1) != 1 and num_tokens > 1:
        raise ValueError("the logits of a row must be contiguous")
    num_blocks = triton.cdiv(num_tokens, _BLOCK)
    maxima, indices, sums = _scratch((num_rows, num_blocks), logits.device)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device) if out is None else out
    if num_rows == 0:
        return tokens
    align = math.gcd(logits.stride(0), num_tokens, 16)
    shared = (logits, slots, tables.table, maxima, indices, sums)
    row_units = logits.stride(0) // align
    sampler_block_kernel[(num_blocks, num_rows)](
        *shared, row_units, V=num_tokens, ALIGN=align, BLOCK=_BLOCK, num_warps=_BLOCK_WARPS
    )
    sampler_row_kernel[(num_rows,)](
        *shared,
        tokens,
        torch.empty(num_rows, _CANDIDATES, dtype=torch.float32, device=logits.device),
        row_units,
        num_tokens,
        V=num_tokens,
        ALIGN=align,
        BLOCK=_BLOCK,
        NUM_BLOCKS=num_blocks,
        BLOCKS=triton.next_power_of_2(num_blocks),
        CHUNK=_CHUNK,
        CANDIDATES=_CANDIDATES,
        GROUP=_GROUP,
        BROKEN=BROKEN,
        num_warps=_ROW_WARPS,
        maxnreg=_ROW_REGISTERS,
    )
    return tokens


def _scratch(shape: tuple[int, int], device: torch.device) -> Iterator[Tensor]:
    """What the first kernel leaves for the second: maxima, their indices, sums of weights."""
    return (torch.empty(shape, dtype=dtype, device=device) for dtype in (torch.float32, torch.int32, torch.float64))


def _pack(params: SamplingParams, key: int, position: int, last_token: int) -> bytes:
    temperature = params.temperature if params.temperature >= GREEDY_TEMPERATURE else 0.0
    floor = math.log(params.min_p) if params.min_p > 0 else -math.inf
    return _ENTRY.pack(key, position, temperature, params.top_p, floor, min(params.top_k, _LARGEST_TOP_K), last_token)
