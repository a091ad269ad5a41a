"""Chunks of one prompt as CUDA graphs, so that a long prompt beside streams costs the host next to nothing."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from app.engine.capture import Captured, Capturer
from app.engine.decoder import Model
from app.engine.host import to_device
from mamba_core.cache import MambaCache
from mamba_core.ops import Packing

# tokens of the chunks that have graphs: what ``share.PrefillShare`` chooses from; beyond, the device is slower anyway
SIZES = (64, 128, 256, 512, 1024)


class ChunkGraphs:
    """One graph for each of a few sizes of chunks, captured in idle moments; other chunks are none of its business."""

    def __init__(self, model: Model, cache: MambaCache, capturer: Capturer) -> None:
        self._model = model
        self._cache = cache
        self._capturer = capturer
        self._missing = list(SIZES)
        # token ids, then the slot
        self._inputs: dict[int, Tensor] = {}
        self._graphs: dict[int, Captured[None]] = {}
        # graphs read them
        self._packings: list[Packing] = []

    def run(self, tokens: array[int], slot: int) -> bool:
        """Take a chunk through the model, continuing ``slot``; False if there is no graph of its size."""
        captured = self._graphs.get(len(tokens))
        if captured is None:
            return False
        inputs = self._inputs[len(tokens)]
        inputs.copy_(to_device(tokens + array("q", [slot]), torch.int64, self._cache.device))
        captured.graph.replay()
        return True

    def prepare_more(self) -> bool:
        """Capture one of the graphs that are missing; whether any was."""
        if not self._missing or not self._capturer.can_capture:
            return False
        num_tokens = self._missing.pop(0)
        inputs = torch.zeros(num_tokens + 1, dtype=torch.int64, device=self._cache.device)
        scratch, packing = (_packing_of(values) for values in (torch.zeros_like(inputs), inputs))
        captured = self._capturer.capture(
            f"a chunk of {num_tokens} tokens",
            lambda: self._forward(torch.zeros_like(inputs), scratch),
            lambda: self._forward(inputs, packing),
        )
        if captured is not None:
            self._inputs[num_tokens] = inputs
            self._graphs[num_tokens] = captured
            self._packings.append(packing)
            # the first replay of a graph takes longer than all that follow; the inputs still name the scratch slot
            captured.graph.replay()
        return True

    def _forward(self, inputs: Tensor, packing: Packing) -> None:
        self._model.forward_packed(inputs[:-1], packing, self._cache)


def _packing_of(inputs: Tensor) -> Packing:
    num_tokens = inputs.shape[0] - 1
    cu_seqlens = torch.tensor([0, num_tokens], dtype=torch.int32, device=inputs.device)
    return Packing(inputs[-1:], cu_seqlens, num_tokens, num_tokens)
