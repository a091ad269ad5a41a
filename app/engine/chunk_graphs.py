"""The prompt tokens of a step as CUDA graphs: launched one by one, a model's operations cost the host far more than
short prompts cost the device.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Shapes
from dataclasses import dataclass

import torch
from torch import Tensor

from app.engine.capture import Captured, Capturer
from app.engine.chunks import PackedChunks
from app.engine.decoder import Forward, ends_of
from app.engine.host import to_device
from mamba_core.cache import MambaCache
from mamba_core.ops import Packing

# up to so many tokens a step is padded; with more the device has longer to work on the padding than the host on
# launches, unless nothing is padded
LARGEST_PADDED = 2048
_PADDED = (32, 64, 128, 256, 384, 512, 768, 1024, 1280, 1536, 1792, LARGEST_PADDED)
_EXACT = (4096, 8192, 16384)
# of a chunk that goes through several graphs, the last takes so many tokens at least
_LEAST_REST = 32

# chunks of any lengths in one graph; each more costs programs that find nothing to do
_FEW_CHUNKS = 8
# as long as they may be in graphs of many tokens, beside those for chunks of any lengths: then all of them are at work
# most of the time, for which the scan is made in another way
_SHORT = 2048
# a graph for many has one for so many tokens, and none longer than such a part of them: with several at work all the
# time the scan need not cut them up, which costs it every exponential twice
_TOKENS_PER_CHUNK = 16
_LONGEST_OF_MANY = 4


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """The most that a graph takes: tokens in all, tokens of the longest chunk, chunks. Small ones are cheap ones."""

    num_tokens: int
    longest: int
    num_chunks: int

    def holds(self, num_tokens: int, longest: int, num_chunks: int) -> bool:
        """Whether it serves for these, without more padding than is worth it."""
        is_close = num_tokens == self.num_tokens or num_tokens <= self.num_tokens <= LARGEST_PADDED
        return is_close and longest <= self.longest and num_chunks <= self.num_chunks


def default_shapes(most: int = 8192) -> tuple[Shape, ...]:
    """A chunk alone, a few of any lengths, and many that are short, for steps of at most ``most`` tokens.

    ``share.PrefillShare`` chooses among the powers of two, or all that a step may take.
    """
    exact = [size for size in _EXACT if size <= most]
    alone = [Shape(size, size, 1) for size in (*_PADDED, *exact)]
    few = [Shape(size, size, _FEW_CHUNKS) for size in (*_PADDED[1:], *exact)]
    short = [Shape(size, _SHORT, _FEW_CHUNKS) for size in exact if size > _SHORT * 2]
    many = [Shape(size, size // _LONGEST_OF_MANY, size // _TOKENS_PER_CHUNK) for size in _PADDED]
    return (*alone, *few, *short, *(shape for shape in many if shape.num_chunks > _FEW_CHUNKS))


class ChunkGraphs:
    """One graph for each of a few shapes, captured in idle moments.

    Chunks that a shape has room for and a step has not are empty, on the scratch slot; tokens likewise belong to none.
    """

    def __init__(
        self, model: Forward, cache: MambaCache, capturer: Capturer, shapes: Shapes[Shape] = default_shapes()
    ) -> None:
        self._model = model
        self._cache = cache
        self._capturer = capturer
        # the largest first, into whose memory the others fit; then those in which launches are most of the time
        ascending = sorted(shapes)
        self._missing = ascending[-1:] + ascending[:-1]
        # token ids, the slots of chunks, and where the chunks begin and end
        self._inputs: dict[Shape, Tensor] = {}
        # the cheapest first
        self._graphs: dict[Shape, Captured[Tensor]] = {}

    @property
    def can_run(self) -> bool:
        """Whether there are, or may still be, chunks that it takes."""
        return bool(self._graphs) or self._capturer.can_capture

    def run(self, chunks: PackedChunks) -> Tensor | None:
        """Take chunks through the model; the hidden states of the last token of each, [B, H] or more, until the next
        run. None, and nothing done, if no graph that is made has room for them.

        A chunk alone that is too long for any goes through several, one after the other.
        """
        hidden: Tensor | None = None
        for part, shape in self._divide(chunks):
            hidden = self._replay(part, shape)
        return hidden

    def prepare_more(self) -> bool:
        """Capture one of the graphs that are missing; whether any was."""
        if not self._missing or not self._capturer.can_capture:
            return False
        shape = self._missing.pop(0)
        # no chunk but empty ones; these inputs are also those of the first replay
        inputs = _zero_inputs(shape, self._cache.device)
        name = f"a step of {shape.num_tokens} prompt tokens"
        captured = self._capturer.capture(
            name, lambda: self._forward(inputs, shape), lambda: self._forward(inputs, shape)
        )
        if captured is not None:
            self._inputs[shape] = inputs
            self._graphs = dict(sorted([*self._graphs.items(), (shape, captured)]))
            # the first replay of a graph takes longer than all that follow
            captured.graph.replay()
        return True

    def _divide(self, chunks: PackedChunks) -> list[tuple[PackedChunks, Shape]]:
        """What each of some graphs takes of chunks, in this order; nothing if there are no graphs for all of it."""
        if (shape := self._find(chunks)) is not None:
            return [(chunks, shape)]
        parts: list[tuple[PackedChunks, Shape]] = []
        if len(chunks.slots) > 1:
            return parts
        alone = [shape for shape in self._graphs if shape.num_chunks == 1 and shape.num_tokens >= LARGEST_PADDED]
        rest = chunks.tokens
        while len(rest) > LARGEST_PADDED:
            shape = max((shape for shape in alone if shape.num_tokens <= len(rest)), default=None)
            if shape is None:
                return []
            parts.append((_alone(rest[: shape.num_tokens], chunks.slots), shape))
            rest = rest[shape.num_tokens :]
        if rest:
            part = _alone(rest, chunks.slots)
            shape = self._find(part)
            if shape is None or len(rest) < _LEAST_REST:
                return []
            parts.append((part, shape))
        return parts

    def _find(self, chunks: PackedChunks) -> Shape | None:
        size = (len(chunks.tokens), chunks.longest, len(chunks.slots))
        return next((shape for shape in self._graphs if shape.holds(*size)), None)

    def _replay(self, chunks: PackedChunks, shape: Shape) -> Tensor:
        tokens, slots, bounds = chunks.tokens, chunks.slots, chunks.bounds
        num_empty = shape.num_chunks - len(slots)
        padded = tokens + _zeros(shape.num_tokens - len(tokens)) + slots + _zeros(num_empty) + bounds
        padded += bounds[-1:] * num_empty
        self._inputs[shape].copy_(to_device(padded, torch.int64, self._cache.device))
        captured = self._graphs[shape]
        captured.graph.replay()
        return captured.output

    def _forward(self, inputs: Tensor, shape: Shape) -> Tensor:
        tokens, slots, bounds = inputs.tensor_split((shape.num_tokens, shape.num_tokens + shape.num_chunks))
        packing = Packing(slots, bounds.to(torch.int32), shape.num_tokens, shape.longest)
        return self._model.forward_packed(tokens, packing, self._cache, ends_of(bounds))


def _alone(tokens: array[int], slots: array[int]) -> PackedChunks:
    return PackedChunks(tokens, slots, array("q", (0, len(tokens))))


def _zero_inputs(shape: Shape, device: torch.device) -> Tensor:
    return torch.zeros(shape.num_tokens + 2 * shape.num_chunks + 1, dtype=torch.int64, device=device)


def _zeros(count: int) -> array[int]:
    return array("q", bytes(8 * count))
