"""Chunks of one prompt as CUDA graphs: launched one by one, a model's operations cost the host far more than a short
prompt costs the device.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence as Sizes

import torch
from torch import Tensor

from app.engine.capture import Captured, Capturer
from app.engine.decoder import Model
from app.engine.host import to_device
from mamba_core.cache import MambaCache
from mamba_core.ops import Packing

# tokens of a graph; ``share.PrefillShare`` chooses among the powers of two. A chunk is padded to the next size, unless
# that is so large that the device has longer to work on the padding than the host on launches
SIZES = (32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
LARGEST_PADDED = 2048


class ChunkGraphs:
    """One graph for each of a few sizes, captured in idle moments.

    The padding of a chunk is a second sequence, on the scratch slot.
    """

    def __init__(self, model: Model, cache: MambaCache, capturer: Capturer, sizes: Sizes[int] = SIZES) -> None:
        self._model = model
        self._cache = cache
        self._capturer = capturer
        self._sizes = sizes
        # the largest first, into whose memory the others fit
        self._missing = sorted(sizes, reverse=True)
        # token ids, the slots of chunk and padding, and where the two begin and end
        self._inputs: dict[int, Tensor] = {}
        self._graphs: dict[int, Captured[None]] = {}

    def run(self, tokens: array[int], slot: int) -> bool:
        """Take a chunk through the model, continuing ``slot``; False, and nothing done, if no graph is made for it."""
        num_tokens = len(tokens)
        place = bisect_left(self._sizes, num_tokens)
        size = self._sizes[place] if place < len(self._sizes) else 0
        if size not in self._graphs or (size > LARGEST_PADDED and size != num_tokens):
            return False
        padding = array("q", bytes(tokens.itemsize * (size - num_tokens)))
        layout = array("q", (slot, 0, 0, num_tokens, size))
        self._inputs[size].copy_(to_device(tokens + padding + layout, torch.int64, self._cache.device))
        self._graphs[size].graph.replay()
        return True

    def prepare_more(self) -> bool:
        """Capture one of the graphs that are missing; whether any was."""
        if not self._missing or not self._capturer.can_capture:
            return False
        size = self._missing.pop(0)
        inputs = torch.zeros(size + 5, dtype=torch.int64, device=self._cache.device)
        # all of it is padding; these inputs are also those of the first replay
        inputs[-1] = size
        captured = self._capturer.capture(
            f"a chunk of {size} tokens", lambda: self._forward(inputs, size), lambda: self._forward(inputs, size)
        )
        if captured is not None:
            self._inputs[size] = inputs
            self._graphs[size] = captured
            # the first replay of a graph takes longer than all that follow
            captured.graph.replay()
        return True

    def _forward(self, inputs: Tensor, size: int) -> None:
        tokens, slots, bounds = inputs.tensor_split((size, size + 2))
        self._model.forward_packed(tokens, Packing(slots, bounds.to(torch.int32), size, size), self._cache)
