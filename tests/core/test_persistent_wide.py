"""The step of up to 64 sequences in one launch: what it asks of a model, what it is compiled to, what it computes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_core import MambaCache, few_rows_step, fused_step, single_step, wide_step
from mamba_core.ops import Packing
from mamba_core.ops.triton import persistent_wide, step
from mamba_core.ops.triton.persistent_many import MAX_ROWS
from mamba_core.ops.triton.persistent_wide import PROGRAMS, fits, sizes_for
from mamba_core.ops.triton.step_products import MAX_TILES
from mamba_core.wide_step import LEAST_ROWS
from tests.compiling import records_of
from tests.core.ops_cases import poison_memory
from tests.core.test_persistent_step import MakeModel, bf16_model, clone, error, launch_on_a_cpu, warm_cache

# a multiprocessor of compute capability 9.0 has 228 KiB, a block of threads at most
SHARED_BYTES = 227 * 1024
# the least width for which it is taken
SMALL = {"hidden_size": 1536, "state_size": 16, "time_step_rank": 96, "num_hidden_layers": 2}


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the device is granted."""
    monkeypatch.setattr(single_step, "suits", lambda *_: True)
    monkeypatch.setattr(single_step, "is_applicable", lambda _: True)
    monkeypatch.setattr(few_rows_step, "is_applicable", lambda *_: False)
    grant_programs(monkeypatch, 132)


def grant_programs(monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    properties = SimpleNamespace(multi_processor_count=programs)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


@torch.inference_mode()
@pytest.mark.usefixtures("on_a_gpu")
def test_it_is_taken_for_more_than_a_few_rows(tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_model(**SMALL).to(torch.bfloat16).backbone
    steps: list[int] = []

    def take(*arguments: Tensor) -> Tensor:
        steps.append(len(arguments[1]))
        return arguments[1]

    def launch_others(*arguments: Tensor) -> None:
        raise NotImplementedError(len(arguments[1]))

    monkeypatch.setattr(wide_step, "wide_step", take)
    monkeypatch.setattr(step, "embed", launch_others)
    cache = MambaCache.from_config(backbone.config, 2, dtype=torch.float32)
    counters = torch.zeros(MAX_TILES, dtype=torch.int32)
    for rows in (LEAST_ROWS, 40, MAX_ROWS):
        fused_step.fused_step(backbone, torch.arange(rows), torch.arange(rows), cache, counters)
    assert steps == [LEAST_ROWS, 40, MAX_ROWS]
    for rows in (LEAST_ROWS - 1, MAX_ROWS + 1):
        with pytest.raises(NotImplementedError, match=str(rows)):
            fused_step.fused_step(backbone, torch.arange(rows), torch.arange(rows), cache, counters)


@torch.inference_mode()
@pytest.mark.usefixtures("on_a_gpu")
def test_it_asks_for_bf16_without_biases_and_inner_norms(tiny_model: MakeModel) -> None:
    def applies(family: str = "mamba", dtype: torch.dtype = torch.bfloat16, **changes: object) -> bool:
        return wide_step.is_applicable(tiny_model(family, **SMALL | changes).to(dtype).backbone, MAX_ROWS)

    assert applies()
    assert applies(use_conv_bias=False)
    assert not applies(dtype=torch.float32)
    assert not applies(use_bias=True)
    assert not applies(hidden_size=1280, time_step_rank=80)
    assert not applies("falcon_mamba")


@torch.inference_mode()
@pytest.mark.usefixtures("on_a_gpu")
def test_all_programs_must_run_at_once(tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_model(**SMALL).to(torch.bfloat16).backbone
    for programs, applies in ((PROGRAMS, True), (PROGRAMS - 1, False)):
        grant_programs(monkeypatch, programs)
        assert wide_step.is_applicable(backbone, MAX_ROWS) == applies


@torch.inference_mode()
def test_it_is_not_taken_where_the_kernel_cannot_run(tiny_model: MakeModel) -> None:
    assert not wide_step.is_applicable(tiny_model(**SMALL).to(torch.bfloat16).backbone, MAX_ROWS)


@pytest.mark.parametrize("rows", [17, 33, MAX_ROWS])
def test_its_launch_gives_the_kernel_what_it_takes(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    recorder, gained, squares = launch_on_a_cpu(monkeypatch, persistent_wide, "persistent_wide_kernel", 2560, rows)
    assert gained.shape == (rows, 2560)
    # of each row, from each group of programs
    assert squares.shape == (32, rows)
    assert recorder.grid == (PROGRAMS,)


@pytest.mark.parametrize("width", [1024, 1536, 2048, 2560])
@pytest.mark.parametrize("rows", [17, 32, 33, MAX_ROWS])
def test_published_sizes_fit(width: int, rows: int) -> None:
    assert fits(width, width // 16, 16)
    sizes = sizes_for(rows, width, width // 16, 4)
    assert rows <= sizes.SPACE
    # the outputs of a program, and its channels in eights
    assert width == 32 * (sizes.A + sizes.B)
    assert 2 * width // PROGRAMS * 2 == sizes.A + sizes.B
    assert 2 * width // PROGRAMS % 8 == 0
    # each product's tiles of 64 columns are whole turns of the rings
    stages = sizes.STAGES
    assert width // 64 % stages == 0
    assert 2 * width // 4 // 64 % stages == 0
    assert stages > sizes.AHEAD


@pytest.mark.parametrize(
    ("width", "rank", "states"),
    [
        (768, 48, 16),
        (4096, 256, 16),
        (2560, 160, 12),
        (2560, 168, 16),
        (2560, 240, 16),
        (1536, 128, 16),
    ],
)
def test_other_sizes_do_not(width: int, rank: int, states: int) -> None:
    assert not fits(width, rank, states)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return records_of("tests.core.compile_persistent_wide", tmp_path_factory.mktemp("triton"))


def test_it_compiles_and_fits(compiled: list[dict[str, Any]]) -> None:
    sizes = [(record["rows"], record["width"]) for record in compiled]
    assert sizes == [(64, 1024), (64, 1536), (64, 2048), (64, 2560), (64, 2048), (20, 2560)]
    assert all(record["shared_bytes"] <= SHARED_BYTES for record in compiled)


def test_memory_is_read_16_bytes_a_thread(compiled: list[dict[str, Any]]) -> None:
    for record in compiled:
        assert record["copies"] > 0
        assert not record["narrow_copies"]
        # of each row a program has width / 64 channels, of each of which a thread of 256 has 16 of 64 bytes
        states = (32 if record["rows"] <= 32 else 64) * record["width"] // 64 * 4 // 256
        assert record["wide_reads"] >= states
        assert record["wide_writes"] >= states
    for record in compiled[2:4]:
        # besides, of what a convolution keeps: three inputs of 32 channels of each row, eight to a thread
        assert record["wide_reads"] >= record["width"] // 64 + 3
        assert record["wide_writes"] >= record["width"] // 64 + 3


def test_products_run_on_the_matrix_units(compiled: list[dict[str, Any]]) -> None:
    # of the large products, and of the small ones between two groups of warps
    assert [record["products"] for record in compiled] == [
        ["m64n16k16", "m64n32k16"],
        ["m64n16k16", "m64n32k16", "m64n8k16"],
        ["m64n32k16", "m64n64k16"],
        ["m64n16k16", "m64n32k16", "m64n64k16", "m64n8k16"],
        ["m64n32k16", "m64n64k16"],
        ["m64n16k16", "m64n32k16", "m64n64k16", "m64n8k16"],
    ]


def test_each_phase_is_counted_and_awaited(compiled: list[dict[str, Any]]) -> None:
    assert {(record["counts"], record["waits"]) for record in compiled} == {(5, 5)}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, 17),
        ({"use_conv_bias": False}, 33),
        ({"hidden_size": 2048, "time_step_rank": 128, "conv_kernel": 3}, 50),
        ({"hidden_size": 2560, "time_step_rank": 160, "num_hidden_layers": 3}, 64),
        ({"hidden_size": 2560, "time_step_rank": 48}, 31),
    ],
)
def test_it_equals_the_layers(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], rows: int
) -> None:
    check_that_it_equals_the_layers(tiny_model, monkeypatch, SMALL | changes, rows)


@torch.inference_mode()
def check_that_it_equals_the_layers(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], rows: int
) -> None:
    model = bf16_model(tiny_model, "mamba", **changes)
    reference = tiny_model("mamba", **changes)
    reference.load_state_dict(model.state_dict())
    reference.to("cuda")
    cache = warm_cache(model, 70)
    before, plain, exact = (clone(cache, dtype) for dtype in (torch.bfloat16, torch.bfloat16, torch.float32))
    counters = torch.zeros(MAX_TILES, dtype=torch.int32, device="cuda")
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1)).to("cuda")
    slots, others = order[:rows], order[rows:]
    packing = Packing.step(slots)
    poison_memory(monkeypatch)

    for token in (5, 17, 0):
        tokens = torch.arange(token, token + rows, device="cuda")
        expected = reference.backbone.forward_packed(reference.backbone.embeddings(tokens), packing, exact)
        one_by_one = model.backbone.forward_packed(model.backbone.embeddings(tokens), packing, plain)
        hidden = wide_step.wide_step(model.backbone, tokens, slots, cache, counters)
        assert error(hidden, expected) < 1.2 * error(one_by_one, expected) + 1e-3
        for row in range(rows):
            assert error(hidden[row], expected[row]) < 1.5 * error(one_by_one[row], expected[row]) + 2e-3

    for state in ("ssm", "conv"):
        value, plain_value, exact_value = (getattr(a, state)[:, slots] for a in (cache, plain, exact))
        assert error(value, exact_value) < 1.2 * error(plain_value, exact_value) + 1e-3
        assert torch.equal(getattr(cache, state)[:, others], getattr(before, state)[:, others])
    assert not counters.any()


@pytest.mark.gpu
def test_states_may_be_rounded_and_scratch_rows_shared(tiny_model: MakeModel) -> None:
    check_rounded_states_and_shared_rows(tiny_model, SMALL)


@torch.inference_mode()
def check_rounded_states_and_shared_rows(tiny_model: MakeModel, changes: dict[str, Any]) -> None:
    model = bf16_model(tiny_model, "mamba", **changes)
    cache = warm_cache(model, 30)
    rounded = MambaCache(cache.conv, cache.ssm.to(torch.bfloat16))
    alone = MambaCache(rounded.conv.clone(), rounded.ssm.clone())
    counters = torch.zeros(MAX_TILES, dtype=torch.int32, device="cuda")
    tokens, slots = torch.arange(32, device="cuda"), torch.arange(1, 33, device="cuda")
    tokens[20:], slots[20:] = 0, 0
    for _ in range(3):
        hidden = wide_step.wide_step(model.backbone, tokens, slots, rounded, counters)
        expected = wide_step.wide_step(model.backbone, tokens[:20], slots[:20], alone, counters)
        assert torch.equal(hidden[:20], expected)
    assert torch.equal(rounded.ssm[:, 1:], alone.ssm[:, 1:])
    assert torch.equal(rounded.conv[:, 1:], alone.conv[:, 1:])


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1536, 2560])
def test_a_convolutions_inputs_may_lie_by_channels_or_by_taps(tiny_model: MakeModel, width: int) -> None:
    check_both_layouts_of_a_convolutions_inputs(tiny_model, SMALL | {"hidden_size": width})


@torch.inference_mode()
def check_both_layouts_of_a_convolutions_inputs(tiny_model: MakeModel, changes: dict[str, Any]) -> None:
    model = bf16_model(tiny_model, "mamba", **changes)
    counters = torch.zeros(MAX_TILES, dtype=torch.int32, device="cuda")
    tokens, slots = torch.arange(40, device="cuda"), torch.arange(1, 40 + 1, device="cuda")
    taps = warm_cache(model, 41)
    assert taps.conv.mT.is_contiguous()
    channels = MambaCache(taps.conv.clone(memory_format=torch.contiguous_format), taps.ssm.clone())
    for _ in range(3):
        hidden = wide_step.wide_step(model.backbone, tokens, slots, taps, counters)
        assert torch.equal(hidden, wide_step.wide_step(model.backbone, tokens, slots, channels, counters))
    assert torch.equal(taps.conv, channels.conv)
    assert torch.equal(taps.ssm, channels.ssm)


@pytest.mark.gpu
def test_it_repeats_to_the_bit(tiny_model: MakeModel) -> None:
    check_that_it_repeats_to_the_bit(tiny_model, SMALL | {"num_hidden_layers": 8})


@torch.inference_mode()
def check_that_it_repeats_to_the_bit(tiny_model: MakeModel, changes: dict[str, Any]) -> None:
    model = bf16_model(tiny_model, "mamba", **changes)
    counters = torch.zeros(MAX_TILES, dtype=torch.int32, device="cuda")
    tokens, slots = torch.arange(64, device="cuda"), torch.arange(1, 65, device="cuda")
    start = warm_cache(model, 65)
    first = clone(start, torch.bfloat16)
    hidden = wide_step.wide_step(model.backbone, tokens, slots, first, counters)
    for _ in range(50):
        again = clone(start, torch.bfloat16)
        assert torch.equal(wide_step.wide_step(model.backbone, tokens, slots, again, counters), hidden)
        assert torch.equal(again.ssm, first.ssm)
        assert torch.equal(again.conv, first.conv)
