"""The step of a few sequences in a single launch: what it asks of a model, what it is compiled to, what it computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from mamba_core import MambaCache, few_rows_step, fused_step, single_step
from mamba_core.ops import Packing
from mamba_core.ops.triton import persistent_rows, step
from mamba_core.ops.triton.persistent_rows import MAX_ROWS, sizes_for
from mamba_core.ops.triton.step_products import MAX_TILES
from tests.compiling import records_of
from tests.core.ops_cases import poison_memory
from tests.core.test_persistent_step import MakeModel, bf16_model, clone, error, launch_on_a_cpu, make_layer, warm_cache

# a multiprocessor of compute capability 9.0 has 228 KiB, a block of threads at most
SHARED_BYTES = 227 * 1024


@torch.inference_mode()
def test_it_is_taken_for_a_few_rows(tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_model().to(torch.bfloat16).backbone
    steps: list[Tensor] = []

    def take(*arguments: Tensor) -> Tensor:
        steps.append(arguments[1])
        return arguments[1]

    def launch_others(*arguments: Tensor) -> None:
        raise NotImplementedError(len(arguments[1]))

    monkeypatch.setattr(few_rows_step, "few_rows_step", take)
    monkeypatch.setattr(single_step, "single_step", take)
    monkeypatch.setattr(single_step, "suits", lambda *_: True)
    monkeypatch.setattr(step, "embed", launch_others)
    cache = MambaCache.from_config(backbone.config, MAX_ROWS + 2, dtype=torch.float32)
    counters = torch.zeros(MAX_TILES, dtype=torch.int32)
    for width, most in ((768, MAX_ROWS), (1024, 16)):
        monkeypatch.setattr(backbone.config, "hidden_size", width)
        steps.clear()
        for rows in (2, 5, most):
            fused_step.fused_step(backbone, torch.arange(rows), torch.arange(rows), cache, counters)
        assert [len(tokens) for tokens in steps] == [2, 5, most]
        with pytest.raises(NotImplementedError, match=str(most + 1)):
            fused_step.fused_step(backbone, torch.arange(most + 1), torch.arange(most + 1), cache, counters)


@torch.inference_mode()
def test_it_is_taken_for_bf16_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persistent_rows, "can_run", lambda _, tile: tile == 256)
    layer = make_layer()
    assert persistent_rows.is_applicable(layer)
    assert not persistent_rows.is_applicable(replace(layer, in_proj=layer.in_proj.to(torch.int8)))


@torch.inference_mode()
def test_it_is_not_taken_where_the_kernel_cannot_run(tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_model().backbone
    monkeypatch.setattr(backbone.config, "hidden_size", 1024)
    assert not any(few_rows_step.is_applicable(backbone, rows) for rows in range(20))
    monkeypatch.setattr(single_step, "suits", lambda *_: True)
    assert few_rows_step.is_applicable(backbone, 2)
    monkeypatch.setattr(backbone.config, "hidden_size", 512)
    assert not few_rows_step.is_applicable(backbone, 2)


@pytest.mark.parametrize("width", [768, 1024, 1280, 1536, 2048, 2560, 4096])
@pytest.mark.parametrize("programs", [78, 132, 148])
@pytest.mark.parametrize("rows", [2, 8, 9, 16, 17, 32])
def test_every_row_has_room(width: int, programs: int, rows: int) -> None:
    if rows > persistent_rows.max_rows(width):
        assert width >= 1024
        return
    sizes = sizes_for(rows, width, width // 16, 16, 4, programs)
    assert 0 <= sizes.GROUPS * sizes.BLOCK_B - rows < sizes.BLOCK_B
    # all at once
    assert programs >= sizes.GROUPS * sizes.PROGRAMS
    programs = sizes.PROGRAMS
    # a program's channels come in eights
    channels = 8 * triton.cdiv(2 * width // 8, programs)
    assert channels <= 16 * sizes.C_TILES
    assert sizes.BLOCK_C >= 16 * sizes.C_TILES
    assert sizes.O_ROWS <= 16
    assert triton.cdiv(width, programs) <= sizes.O_TILES * sizes.O_ROWS
    assert sizes.O_SPACE >= sizes.O_TILES
    assert programs <= sizes.P_SPACE
    # four of them to a thread, and not more threads than a warp has
    assert sizes.BLOCK_L <= 128
    assert sizes.BLOCK_L * programs >= (width // 16 + 32) * sizes.BLOCK_B
    assert width % sizes.WIDE == 0
    taken = max(sizes.GROUP, sizes.O_GROUP * sizes.O_TILES)
    assert max(sizes.AHEAD, sizes.OUT_AHEAD, taken) < sizes.STAGES


@pytest.mark.parametrize(
    ("width", "rows", "groups", "programs"),
    [(768, 2, 1, 96), (768, 13, 2, 48), (768, 32, 4, 32), (1024, 16, 2, 64), (2560, 16, 1, 132)],
)
def test_its_launch_gives_the_kernel_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, width: int, rows: int, groups: int, programs: int
) -> None:
    recorder, gained, squares = launch_on_a_cpu(monkeypatch, persistent_rows, "persistent_rows_kernel", width, rows)
    assert gained.shape == (rows, width)
    # of each row, from each program of its group
    assert squares.shape == (programs, rows)
    assert recorder.grid == (programs, groups)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return records_of("tests.core.compile_persistent_rows", tmp_path_factory.mktemp("triton"))


def test_it_compiles_and_fits(compiled: list[dict[str, Any]]) -> None:
    assert [(record["rows"], record["width"]) for record in compiled] == [
        (8, 1024),
        (8, 2048),
        (8, 2560),
        (16, 2560),
        (16, 4096),
        (5, 512),
        (8, 768),
        (32, 768),
    ]
    assert all(record["shared_bytes"] <= SHARED_BYTES for record in compiled)


def test_memory_is_read_16_bytes_a_thread(compiled: list[dict[str, Any]]) -> None:
    assert not any(record["narrow_copies"] or record["narrow_inputs"] for record in compiled)
    assert all(record["copies"] > 0 for record in compiled)


def test_products_run_on_the_matrix_units(compiled: list[dict[str, Any]]) -> None:
    # of each product there is at least one tile of 512 columns, 64 to a warp and 16 to an instruction
    for record in compiled:
        assert record["products"] >= (8 if record["space"] > 8 else 4) * record["width"] // 512
        assert record["wide_reads"] >= 4 * record["width"] // 512


def test_each_phase_is_counted_and_awaited(compiled: list[dict[str, Any]]) -> None:
    assert {(record["counts"], record["waits"]) for record in compiled} == {(4, 4)}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "changes", "rows"),
    [
        ("mamba", {"hidden_size": 512, "num_hidden_layers": 3}, 2),
        ("mamba", {"hidden_size": 768, "state_size": 16, "time_step_rank": 48}, 5),
        ("mamba", {"hidden_size": 768, "state_size": 16, "time_step_rank": 48}, 13),
        ("mamba", {"hidden_size": 768, "use_bias": True, "conv_kernel": 3}, 27),
        ("falcon_mamba", {"hidden_size": 768, "state_size": 12}, 32),
        ("mamba", {"hidden_size": 1024, "state_size": 16}, 8),
        ("mamba", {"hidden_size": 1024}, 15),
        ("mamba", {"hidden_size": 1536, "use_bias": True, "use_conv_bias": False}, 7),
        ("mamba", {"hidden_size": 512, "state_size": 12, "time_step_rank": 40, "conv_kernel": 3}, 11),
        ("falcon_mamba", {"hidden_size": 2560, "state_size": 16, "time_step_rank": 160, "num_hidden_layers": 1}, 8),
        ("falcon_mamba", {"hidden_size": 4096, "state_size": 16, "time_step_rank": 256, "num_hidden_layers": 1}, 16),
    ],
)
@torch.inference_mode()
def test_it_equals_the_layers(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch, family: str, changes: dict[str, object], rows: int
) -> None:
    model = bf16_model(tiny_model, family, **changes)
    reference = tiny_model(family, **changes)
    reference.load_state_dict(model.state_dict())
    reference.to("cuda")
    cache = warm_cache(model, 80)
    before, plain, exact = (clone(cache, dtype) for dtype in (torch.bfloat16, torch.bfloat16, torch.float32))
    counters = torch.zeros(MAX_TILES, dtype=torch.int32, device="cuda")
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1)).to("cuda")
    slots, others = order[:rows], order[rows:]
    packing = Packing.step(slots)
    poison_memory(monkeypatch)

    for token in (5, 77, 0):
        tokens = torch.arange(token, token + rows, device="cuda") % 97
        expected = reference.backbone.forward_packed(reference.backbone.embeddings(tokens), packing, exact)
        one_by_one = model.backbone.forward_packed(model.backbone.embeddings(tokens), packing, plain)
        hidden = few_rows_step.few_rows_step(model.backbone, tokens, slots, cache, counters)
        assert error(hidden, expected) < 1.2 * error(one_by_one, expected) + 1e-3
        for row in range(rows):
            assert error(hidden[row], expected[row]) < 1.5 * error(one_by_one[row], expected[row]) + 2e-3

    for state in ("ssm", "conv"):
        value, plain_value, exact_value = (getattr(a, state)[:, slots] for a in (cache, plain, exact))
        assert error(value, exact_value) < 1.2 * error(plain_value, exact_value) + 1e-3
        assert torch.equal(getattr(cache, state)[:, others], getattr(before, state)[:, others])
    assert not counters.any()


@pytest.mark.gpu
@torch.inference_mode()
def test_states_may_be_rounded_and_scratch_rows_shared(tiny_model: MakeModel) -> None:
    model = bf16_model(tiny_model, "mamba", hidden_size=1024)
    cache = warm_cache(model, 6)
    rounded = MambaCache(cache.conv, cache.ssm.to(torch.bfloat16))
    alone = MambaCache(rounded.conv.clone(), rounded.ssm.clone())
    counters = torch.zeros(MAX_TILES, dtype=torch.int32, device="cuda")
    tokens, slots = torch.tensor([3, 4, 0, 0, 0], device="cuda"), torch.tensor([5, 2, 0, 0, 0], device="cuda")
    for _ in range(3):
        hidden = few_rows_step.few_rows_step(model.backbone, tokens, slots, rounded, counters)
        expected = few_rows_step.few_rows_step(model.backbone, tokens[:2], slots[:2], alone, counters)
        assert torch.equal(hidden[:2], expected)
    assert torch.equal(rounded.ssm[:, 1:], alone.ssm[:, 1:])
    assert torch.equal(rounded.conv[:, 1:], alone.conv[:, 1:])


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "rows"), [(768, 32), (1024, 5)])
@torch.inference_mode()
def test_a_convolutions_inputs_may_lie_by_channels_or_by_taps(tiny_model: MakeModel, width: int, rows: int) -> None:
    model = bf16_model(tiny_model, "mamba", hidden_size=width)
    counters = torch.zeros(MAX_TILES, dtype=torch.int32, device="cuda")
    tokens, slots = torch.arange(rows, device="cuda"), torch.arange(1, rows + 1, device="cuda")
    taps = warm_cache(model, rows + 1)
    assert taps.conv.mT.is_contiguous()
    channels = MambaCache(taps.conv.clone(memory_format=torch.contiguous_format), taps.ssm.clone())
    for _ in range(3):
        hidden = few_rows_step.few_rows_step(model.backbone, tokens, slots, taps, counters)
        assert torch.equal(hidden, few_rows_step.few_rows_step(model.backbone, tokens, slots, channels, counters))
    assert torch.equal(taps.conv, channels.conv)
    assert torch.equal(taps.ssm, channels.ssm)


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "rows"), [(768, 32), (1024, 16)])
@torch.inference_mode()
def test_it_repeats_to_the_bit(tiny_model: MakeModel, width: int, rows: int) -> None:
    model = bf16_model(tiny_model, "mamba", hidden_size=width, num_hidden_layers=8)
    counters = torch.zeros(MAX_TILES, dtype=torch.int32, device="cuda")
    tokens, slots = torch.arange(rows, device="cuda"), torch.arange(1, rows + 1, device="cuda")
    start = warm_cache(model, rows + 1)
    first = clone(start, torch.bfloat16)
    hidden = few_rows_step.few_rows_step(model.backbone, tokens, slots, first, counters)
    for _ in range(50):
        again = clone(start, torch.bfloat16)
        assert torch.equal(few_rows_step.few_rows_step(model.backbone, tokens, slots, again, counters), hidden)
        assert torch.equal(again.ssm, first.ssm)
        assert torch.equal(again.conv, first.conv)
