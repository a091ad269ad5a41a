"""Which chunks of prompts are replayed and what that does to the states; without a GPU, and on one."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from app.engine import chunk_graphs
from app.engine.capture import Capturer
from app.engine.chunk_graphs import LARGEST_PADDED, ChunkGraphs, Shape, default_shapes
from app.engine.chunks import PackedChunks
from app.engine.share import LEAST_SHARE
from mamba_core import MambaCache, MambaConfig, MambaForCausalLM
from mamba_core.ops import Packing
from tests.engine.fakes import BrokenCapturer, HistoryModel, HostCapturer, make_cache, state_after


def chunk_of(length: int, seed: int = 1) -> list[int]:
    return [(7 * i + seed) % 53 for i in range(length)]


def run_chunks(graphs: ChunkGraphs, chunks: dict[int, list[int]]) -> torch.Tensor | None:
    """Take chunks by their slots through graphs; hidden states of their last tokens, None if they are not taken."""
    tokens, bounds = array("q"), array("q", [0])
    for chunk in chunks.values():
        tokens.extend(chunk)
        bounds.append(len(tokens))
    hidden = graphs.run(PackedChunks(tokens, array("q", chunks), bounds))
    return None if hidden is None else hidden[: len(chunks)]


def make_chunk_graphs(
    *shapes: Shape, num_slots: int = 5, capturer: HostCapturer | None = None
) -> tuple[ChunkGraphs, MambaCache]:
    """Chunk graphs, all captured, and a cache whose every slot is fresh."""
    cache = make_cache(num_slots)
    cache.ssm.zero_()
    graphs = ChunkGraphs(HistoryModel(), cache, capturer or HostCapturer(), shapes)  # type: ignore[arg-type]
    while graphs.prepare_more():
        pass
    return graphs, cache


@pytest.mark.parametrize("lengths", [[1], [31], [32], [1, 31], [10, 1, 5], [8, 8, 8, 8], [64], [33, 2], [1, 1, 1, 1]])
def test_chunks_go_on_from_their_slots_and_padding_touches_nobody(lengths: list[int]) -> None:
    graphs, cache = make_chunk_graphs(Shape(32, 32, 1), Shape(32, 32, 4), Shape(64, 64, 4))
    cache.ssm[:] = torch.nan
    slots = [4, 2, 5, 1][: len(lengths)]
    cache.zero(slots)
    chunks = {slot: chunk_of(length, slot) for slot, length in zip(slots, lengths, strict=True)}
    assert run_chunks(graphs, chunks) is not None
    hidden = run_chunks(graphs, chunks)
    assert hidden is not None
    for row, (slot, tokens) in enumerate(chunks.items()):
        # of this model the hidden state of a token is the state behind it
        assert cache.ssm[0, slot].item() == hidden[row].item() == state_after(tokens + tokens)
    others = [slot for slot in range(6) if slot not in chunks]
    assert cache.ssm[0, others].isnan().all()


def test_a_replay_sees_nothing_of_the_one_before() -> None:
    graphs, cache = make_chunk_graphs(Shape(32, 32, 4))
    assert run_chunks(graphs, {1: chunk_of(8), 2: chunk_of(9), 3: chunk_of(10)}) is not None
    assert run_chunks(graphs, {4: chunk_of(3)}) is not None
    states = [state_after(chunk_of(length)) for length in (8, 9, 10, 3)]
    assert cache.ssm[0, 1:, 0, 0].tolist() == [*states, 0]


class ShapeNotes(HostCapturer):
    """Notes which graph is replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.replayed: list[str] = []

    def capture(self, name: str, warm_up: Any, body: Any) -> Any:
        def noted() -> Any:
            self.replayed.append(name)
            return body()

        return super().capture(name, warm_up, noted)


@pytest.mark.parametrize(
    ("lengths", "num_tokens"),
    [
        *(([20], 32), ([32], 32), ([33], 64), ([60, 4], 64), ([10, 10, 10], 256), ([65], 256), ([65, 1], 256)),
        *(([40, 41, 42], 256), ([65, 65, 65], None), ([257], None), ([64] * 5, None)),
    ],
)
def test_chunks_take_the_cheapest_graph_that_has_room(lengths: list[int], num_tokens: int | None) -> None:
    notes = ShapeNotes()
    shapes = [Shape(256, 256, 2), Shape(32, 32, 1), Shape(64, 64, 2), Shape(256, 64, 4)]
    graphs, cache = make_chunk_graphs(*shapes, num_slots=8, capturer=notes)
    del notes.replayed[:]
    chunks = {slot: chunk_of(length) for slot, length in enumerate(lengths, start=1)}
    assert (run_chunks(graphs, chunks) is None) == (num_tokens is None)
    assert notes.replayed == ([] if num_tokens is None else [f"a step of {num_tokens} prompt tokens"])
    if num_tokens is None:
        assert (cache.ssm == 0).all()


def test_graphs_come_one_by_one_the_largest_first_and_serve_from_then_on() -> None:
    cache, capturer = make_cache(3), HostCapturer()
    shapes = (Shape(8, 8, 1), Shape(16, 16, 4), Shape(64, 64, 1), Shape(8, 8, 2))
    graphs = ChunkGraphs(HistoryModel(), cache, capturer, shapes)  # type: ignore[arg-type]
    served = []
    for _ in range(4):
        assert graphs.can_run
        chunks = ({1: [1] * 60}, {1: [1] * 4, 2: [1] * 4})
        served.append([run_chunks(graphs, some) is not None for some in chunks])
        assert graphs.prepare_more()
    assert not graphs.prepare_more()
    assert served == [[False, False], [True, False], [True, False], [True, True]]
    assert [name.split()[3] for name in capturer.names] == ["64", "8", "8", "16"]


def test_large_chunks_are_not_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_graphs, "LARGEST_PADDED", 32)
    graphs, _ = make_chunk_graphs(Shape(32, 32, 1), Shape(64, 64, 1))
    served = [run_chunks(graphs, {1: [1] * length}) is not None for length in (20, 32, 40, 63, 64)]
    assert served == [True, True, False, False, True]


@pytest.mark.parametrize(
    ("length", "parts"),
    [
        *((64, [64]), (96, [64, 32]), (104, [64, 40]), (128, [128]), (168, [128, 40]), (192, [128, 64])),
        *((230, [128, 64, 38]), (256, [256]), (620, [256, 256, 64, 44]), (65, None), (90, None), (128 + 31, None)),
    ],
)
def test_a_long_chunk_alone_goes_through_several_graphs(
    monkeypatch: pytest.MonkeyPatch, length: int, parts: list[int] | None
) -> None:
    monkeypatch.setattr(chunk_graphs, "LARGEST_PADDED", 64)
    notes = ShapeNotes()
    shapes = [Shape(size, size, 1) for size in (16, 32, 40, 64, 128, 256)]
    graphs, cache = make_chunk_graphs(*shapes, Shape(1024, 1024, 2), capturer=notes)
    del notes.replayed[:]
    hidden = run_chunks(graphs, {2: chunk_of(length)})
    if parts is None:
        assert hidden is None
        assert notes.replayed == []
        return
    assert hidden is not None
    assert cache.ssm[0, 2].item() == hidden.item() == state_after(chunk_of(length))
    padded = [next(shape.num_tokens for shape in shapes if shape.num_tokens >= part) for part in parts]
    assert notes.replayed == [f"a step of {size} prompt tokens" for size in padded]


@pytest.mark.parametrize("num_chunks", [1, 2, 5, 8, 9, 17, 33, 64])
@pytest.mark.parametrize("length", [2, 8, 31, 200, 700])
def test_steps_of_prompts_have_graphs_that_are_not_much_larger(num_chunks: int, length: int) -> None:
    num_tokens = num_chunks * length
    held = [shape for shape in default_shapes() if shape.holds(num_tokens, length, num_chunks)]
    if num_tokens > LARGEST_PADDED:
        assert not held
    else:
        # launched one by one, the operations of 130m to 2.8b take the host as long as 1,000 tokens the device or longer
        assert min(held).num_tokens <= max(1.5 * num_tokens + 64, 1024)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        *(((8192, 8192, 1), Shape(8192, 8192, 1)), ((8192, 2048, 4), Shape(8192, 2048, 8))),
        *(((8192, 5000, 3), Shape(8192, 8192, 8)), ((4096, 3000, 2), Shape(4096, 4096, 8))),
        *(((16384, 2048, 8), Shape(16384, 2048, 8)), ((16384, 16384, 1), Shape(16384, 16384, 1))),
        *(((8191, 8191, 1), None), ((8192, 1024, 9), None), ((32768, 32768, 1), None)),
    ],
)
def test_steps_of_many_tokens_have_graphs_if_they_are_full(size: tuple[int, int, int], expected: Shape | None) -> None:
    for most in (8192, 20000):
        held = [shape for shape in default_shapes(most) if shape.holds(*size)]
        assert min(held, default=None) == (expected if size[0] <= most else None)


def test_shares_of_one_prompt_or_of_a_few_are_sizes_of_graphs() -> None:
    shapes = default_shapes()
    assert len(shapes) == len(set(shapes)) < 40
    for power in range(6, 14):
        assert any(shape.num_tokens == shape.longest == 2**power for shape in shapes)
    for power in range(6, 12):
        assert any(shape.holds(2**power, 2**power - 2, 3) and shape.num_tokens == 2**power for shape in shapes)
    assert LEAST_SHARE == 2**6


def test_chunks_that_cannot_be_captured_are_left_to_others() -> None:
    cache = make_cache(3)
    graphs = ChunkGraphs(HistoryModel(), cache, BrokenCapturer(0))  # type: ignore[arg-type]
    assert graphs.can_run
    assert graphs.prepare_more()
    assert not graphs.prepare_more()
    assert not graphs.can_run
    assert run_chunks(graphs, {1: [1] * 64}) is None


# --- on a GPU

GPU = torch.device("cuda", 0)
NUM_SLOTS = 40
SHAPES = (Shape(64, 64, 1), Shape(128, 128, 8), Shape(512, 512, 4), Shape(512, 128, 32))


@pytest.fixture
def model() -> MambaForCausalLM:
    torch.manual_seed(0)
    made = MambaForCausalLM(MambaConfig(vocab_size=53, hidden_size=64, num_hidden_layers=3))
    # far from the initial symmetry, so that every layer matters
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval().to(GPU)


def poisoned_cache(model: MambaForCausalLM, slots: Iterable[int]) -> MambaCache:
    """Full of NaN but for some slots, which are fresh."""
    cache = MambaCache.from_config(model.config, NUM_SLOTS, dtype=torch.float32, device=GPU)
    cache.conv.fill_(torch.nan)
    cache.ssm.fill_(torch.nan)
    cache.zero(list(slots))
    return cache


def poisoned_graphs(model: MambaForCausalLM, cache: MambaCache, monkeypatch: pytest.MonkeyPatch) -> ChunkGraphs:
    """All graphs; each replay first fills with NaN what is allocated without a value."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    graphs = ChunkGraphs(model, cache, Capturer(GPU), SHAPES)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        while graphs.prepare_more():
            pass
    return graphs


def run_eagerly(model: MambaForCausalLM, cache: MambaCache, chunks: dict[int, list[int]]) -> torch.Tensor:
    tokens = torch.tensor([token for chunk in chunks.values() for token in chunk], device=GPU)
    lengths = [len(chunk) for chunk in chunks.values()]
    packing = Packing.from_lengths(lengths, torch.tensor(list(chunks), device=GPU))
    return model.forward_packed(tokens, packing, cache, packing.cu_seqlens[1:].long() - 1)


@pytest.mark.gpu
@torch.inference_mode()
def test_replays_leave_the_states_that_launches_do(model: MambaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [[5], [64], [31, 33], [16] * 8, [1, 2, 3], [300, 2], [500], [20, 1, 128, 9, 7] * 3, [15] * 32, [100, 28]]
    cache = poisoned_cache(model, [])
    graphs = poisoned_graphs(model, cache, monkeypatch)
    assert graphs.can_run
    for number, lengths in enumerate(batches):
        slots = [1 + (7 * index + number) % (NUM_SLOTS - 1) for index in range(len(lengths))]
        expected = poisoned_cache(model, slots)
        cache.conv.copy_(expected.conv)
        cache.ssm.copy_(expected.ssm)
        # the second chunk of each prompt goes on where the first has ended
        for seed in (1, 2):
            chunks = {slot: chunk_of(length, seed + slot) for slot, length in zip(slots, lengths, strict=True)}
            hidden = run_chunks(graphs, chunks)
            assert hidden is not None, lengths
            torch.testing.assert_close(hidden, run_eagerly(model, expected, chunks), rtol=1e-3, atol=1e-4)
        # the products of other numbers of tokens are made by other kernels, so that sums round otherwise
        torch.testing.assert_close(cache.ssm, expected.ssm, rtol=1e-3, atol=1e-4, equal_nan=True)
        torch.testing.assert_close(cache.conv, expected.conv, rtol=1e-3, atol=1e-4, equal_nan=True)
        assert cache.ssm[:, [slot for slot in range(NUM_SLOTS) if slot not in slots]].isnan().all()


@pytest.mark.gpu
@torch.inference_mode()
def test_the_same_replay_gives_the_same_bits(model: MambaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = poisoned_cache(model, [])
    graphs = poisoned_graphs(model, cache, monkeypatch)
    states = []
    for _ in range(20):
        cache.zero(range(NUM_SLOTS))
        assert run_chunks(graphs, {slot: chunk_of(31 - slot, slot) for slot in range(1, 11)}) is not None
        states.append((cache.conv.clone(), cache.ssm.clone()))
        # something larger in between
        assert run_chunks(graphs, {slot: chunk_of(16, slot) for slot in range(1, 33)}) is not None
    for conv, ssm in states:
        assert torch.equal(conv, states[0][0])
        assert torch.equal(ssm, states[0][1])
