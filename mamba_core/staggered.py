"""A long prompt on a GPU in pieces, each on a stream of its own and a layer behind the piece before it.

One sequence has too few channels for its scan to fill the machine. So the scans of several pieces, in neighbouring
layers, run beside each other, and beside the products of others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from mamba_core.cache import MambaCache
from mamba_core.modeling_mamba import MambaBlock, MambaForCausalLM
from mamba_core.ops import Packing

# a sequence of so many tokens or more is cut into so many pieces: of fewer, products would not fill the machine
_PIECES = {8192: 4}
# those of layers at least so wide, whose products are larger
_PIECES_OF_WIDE = {8192: 4, 4096: 2}
_WIDE = 2560


@dataclass(slots=True)
class _Piece:
    """Tokens from ``begin`` on, on their way through the layers. ``done``: with a layer, whose states have moved on."""

    begin: int
    packing: Packing
    stream: torch.cuda.Stream
    done: torch.cuda.Event
    hidden: Tensor
    residual: Tensor | None = None


class Staggered:
    """A model that takes one long sequence in pieces, and everything else as it does by itself.

    Launched one by one, its operations take the host longer than those of the whole: it is to be captured as a graph.
    """

    def __init__(self, model: MambaForCausalLM) -> None:
        self._model = model
        self._streams: list[torch.cuda.Stream] = []

    def forward_packed(
        self, input_ids: Tensor, packing: Packing, cache: MambaCache, wanted: Tensor | None = None
    ) -> Tensor:
        """See ``MambaForCausalLM.forward_packed``; on CUDA, without gradients."""
        count = num_pieces(packing, self._model.config.hidden_size)
        if wanted is None or count == 1 or self._is_quantized:
            return self._model.forward_packed(input_ids, packing, cache, wanted)
        main = torch.cuda.current_stream(input_ids.device)
        pieces = self._begin(input_ids, packing, count, main)
        layers = cast(list[MambaBlock], self._model.backbone.layers)
        for index, layer in enumerate(layers):
            states = cache.layer(index)
            is_last = index == len(layers) - 1
            for before, piece in zip([None, *pieces], pieces, strict=False):
                with torch.cuda.stream(piece.stream):
                    if before is not None:
                        piece.stream.wait_event(before.done)
                    places = _within(piece, wanted) if is_last else None
                    piece.hidden, piece.residual = layer(piece.hidden, piece.residual, piece.packing, *states, places)
                    piece.done.record(piece.stream)
        return self._end(pieces, wanted, main)

    @property
    def _is_quantized(self) -> bool:
        """Whether each product of many tokens takes a pass over its weights first, which pieces would repeat."""
        first = cast(list[MambaBlock], self._model.backbone.layers)[0]
        return not first.mixer.in_proj.weight.is_floating_point()

    def _begin(self, input_ids: Tensor, packing: Packing, count: int, main: torch.cuda.Stream) -> list[_Piece]:
        while len(self._streams) < count:
            self._streams.append(torch.cuda.Stream(input_ids.device))  # type: ignore[no-untyped-call]
        pieces: list[_Piece] = []
        for (begin, part), stream in zip(cut(packing, count), self._streams, strict=False):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                embedded = self._model.backbone.embeddings(input_ids[begin : begin + part.num_tokens])
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            pieces.append(_Piece(begin, part, stream, done, embedded))
        return pieces

    def _end(self, pieces: list[_Piece], wanted: Tensor, main: torch.cuda.Stream) -> Tensor:
        found: Tensor | None = None
        for piece in pieces:
            with torch.cuda.stream(piece.stream):
                hidden: Tensor = self._model.backbone.norm_f(piece.hidden, piece.residual)[0]
            main.wait_stream(piece.stream)
            found = hidden if found is None else torch.where((wanted >= piece.begin)[:, None], hidden, found)
        assert found is not None, "there is a piece at least"
        return found


def num_pieces(packing: Packing, width: int) -> int:
    """How many pieces are fastest in layers so wide: several sequences fill the machine as they are."""
    if packing.num_rows > 1:
        return 1
    pieces = _PIECES_OF_WIDE if width >= _WIDE else _PIECES
    return next((count for least, count in pieces.items() if packing.num_tokens >= least), 1)


def cut(packing: Packing, count: int) -> list[tuple[int, Packing]]:
    """Where each of ``count`` pieces of the tokens begins, and its packing, in which every sequence has a part."""
    size = -(-packing.num_tokens // count)
    pieces: list[tuple[int, Packing]] = []
    for begin in range(0, packing.num_tokens, size):
        num_tokens = min(size, packing.num_tokens - begin)
        bounds = (packing.cu_seqlens - begin).clamp(0, num_tokens)
        longest = min(packing.max_seqlen, num_tokens)
        pieces.append((begin, Packing(packing.slots, bounds, num_tokens, longest, num_beside=count)))
    return pieces


def _within(piece: _Piece, places: Tensor) -> Tensor:
    """Places in the piece, and any for those outside."""
    return (places - piece.begin).clamp(0, piece.packing.num_tokens - 1)
