"""A prompt in pieces is the prompt as a whole: how it is cut, and what comes of it on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mamba_core import MambaCache, MambaConfig, MambaForCausalLM
from mamba_core.ops import Packing
from mamba_core.staggered import cut, num_pieces

GPU = torch.device("cuda", 0)


@pytest.fixture
def model() -> MambaForCausalLM:
    torch.manual_seed(0)
    made = MambaForCausalLM(MambaConfig(vocab_size=53, hidden_size=64, num_hidden_layers=3))
    # far from the initial symmetry, so that every layer matters
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("lengths", [[20], [5, 0, 9, 6], [1, 1, 18], [13]])
@torch.inference_mode()
def test_pieces_one_after_the_other_leave_what_the_whole_does(
    model: MambaForCausalLM, lengths: list[int], count: int
) -> None:
    slots = torch.tensor([3, 1, 4, 2])[: len(lengths)]
    # 20 tokens, of which the last may belong to nobody
    packing = Packing(slots, torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32), 20, 20)
    tokens = torch.randint(53, (20,))
    whole, parts = (MambaCache.from_config(model.config, 6, dtype=torch.float32) for _ in range(2))
    hidden = model.forward_packed(tokens, packing, whole)
    pieces = cut(packing, count)
    assert len(pieces) == count
    assert [begin for begin, _ in pieces] == [sum(p.num_tokens for _, p in pieces[:i]) for i in range(count)]
    assert sum(piece.num_tokens for _, piece in pieces) == 20
    found = [model.forward_packed(tokens[begin:][: piece.num_tokens], piece, parts) for begin, piece in pieces]
    real = sum(lengths)
    torch.testing.assert_close(torch.cat(found)[:real], hidden[:real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.ssm, whole.ssm, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.conv, whole.conv, rtol=1e-4, atol=1e-5)


def test_one_long_sequence_alone_is_cut() -> None:
    def packing(*lengths: int) -> Packing:
        return Packing.from_lengths(lengths, torch.arange(len(lengths)))

    assert num_pieces(packing(8192), 768) > num_pieces(packing(4096), 768) == 1
    assert num_pieces(packing(8192), 2560) > num_pieces(packing(4096), 2560) > num_pieces(packing(2048), 2560) == 1
    assert num_pieces(packing(8000, 192), 2560) == 1


# --- on a GPU


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is allocated without a value is NaN first."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        made: torch.Tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        return made.fill_(torch.nan) if made.is_floating_point() else made

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        yield


@pytest.mark.gpu
@pytest.mark.parametrize("length", [8192, 8191, 4096, 3000, 1])
@pytest.mark.usefixtures("poisoned_memory")
@torch.inference_mode()
def test_replays_give_what_the_whole_does(model: MambaForCausalLM, length: int) -> None:
    from app.engine.capture import Capturer
    from mamba_core.staggered import Staggered

    model = model.to(GPU)
    staggered = Staggered(model)
    num_tokens = 8192
    slots, bounds = torch.tensor([2], device=GPU), torch.tensor([0, length], dtype=torch.int32, device=GPU)
    packing = Packing(slots, bounds, num_tokens, num_tokens)
    assert num_pieces(packing, model.config.hidden_size) > 1
    tokens, wanted = torch.randint(53, (num_tokens,), device=GPU), torch.tensor([length - 1], device=GPU)
    whole, pieces = (MambaCache.from_config(model.config, 4, dtype=torch.float32, device=GPU) for _ in range(2))
    start = torch.randn_like(whole.ssm)

    def run() -> torch.Tensor:
        return staggered.forward_packed(tokens, packing, pieces, wanted)

    captured = Capturer(GPU).capture("pieces", run, run)
    assert captured is not None
    for _ in range(3):
        for cache in (whole, pieces):
            cache.reset()
            cache.ssm.copy_(start)
        hidden = model.forward_packed(tokens, packing, whole, wanted)
        captured.graph.replay()
        torch.testing.assert_close(captured.output, hidden, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(pieces.ssm, whole.ssm, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(pieces.conv, whole.conv, rtol=1e-3, atol=1e-4)
