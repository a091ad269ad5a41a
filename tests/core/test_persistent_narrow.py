"""The step of up to 64 sequences of a narrow model in one launch: what it asks, is compiled to, and computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_core import MambaCache, few_rows_step, fused_step, single_step, wide_step
from mamba_core.ops.triton import persistent_narrow
from mamba_core.ops.triton.persistent_many import MAX_ROWS
from mamba_core.ops.triton.persistent_narrow import fits, programs, sizes_for
from mamba_core.ops.triton.step_products import MAX_TILES
from tests.compiling import records_of
from tests.core.test_persistent_step import MakeModel, launch_on_a_cpu
from tests.core.test_persistent_wide import (
    SHARED_BYTES,
    check_both_layouts_of_a_convolutions_inputs,
    check_rounded_states_and_shared_rows,
    check_that_it_equals_the_layers,
    check_that_it_repeats_to_the_bit,
    grant_programs,
)

# the least width for which it is taken
SMALL = {"hidden_size": 768, "state_size": 16, "time_step_rank": 48, "num_hidden_layers": 2}


@torch.inference_mode()
def test_it_is_taken_for_narrow_models(tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single_step, "suits", lambda *_: True)
    grant_programs(monkeypatch, 132)
    steps: list[tuple[str, int]] = []

    def take(name: str) -> Any:
        def step(*arguments: Tensor) -> Tensor:
            steps.append((name, len(arguments[1])))
            return arguments[1]

        return step

    monkeypatch.setattr(wide_step, "wide_step", take("wide"))
    monkeypatch.setattr(few_rows_step, "few_rows_step", take("few"))
    backbone = tiny_model(**SMALL).to(torch.bfloat16).backbone
    assert wide_step._kernel_for(backbone.layers[0]) is persistent_narrow
    cache = MambaCache.from_config(backbone.config, 2, dtype=torch.float32)
    counters = torch.zeros(MAX_TILES, dtype=torch.int32)
    least = wide_step.least_rows(768)
    for rows in (least - 1, least, MAX_ROWS):
        fused_step.fused_step(backbone, torch.arange(rows), torch.arange(rows), cache, counters)
    assert steps == [("few", least - 1), ("wide", least), ("wide", MAX_ROWS)]
    grant_programs(monkeypatch, programs(768) - 1)
    assert not wide_step.is_applicable(backbone, MAX_ROWS)


@pytest.mark.parametrize("rows", [17, 33, MAX_ROWS])
def test_its_launch_gives_the_kernel_what_it_takes(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    recorder, gained, squares = launch_on_a_cpu(monkeypatch, persistent_narrow, "persistent_narrow_kernel", 768, rows)
    assert gained.shape == (rows, 768)
    # of each row, from each group of programs
    assert squares.shape == (24, rows)
    assert recorder.grid == (96,)


@pytest.mark.parametrize("width", [768, 1024])
@pytest.mark.parametrize("rows", [17, 32, 33, MAX_ROWS])
def test_published_sizes_fit(width: int, rows: int) -> None:
    assert fits(width, width // 16, 16)
    sizes = sizes_for(rows, width, width // 16, 4)
    assert rows <= sizes.SPACE
    # x beside z
    assert programs(width) * sizes.A == 2 * 2 * width
    # in_proj's tiles of 64 columns are whole turns of the rings, of which one slot is freed at a time
    stages = sizes.STAGES
    assert width // 64 % stages == 0
    assert stages >= 2
    assert 0 <= sizes.DEPTH <= sizes.SPACE // 8


@pytest.mark.parametrize(
    ("width", "rank", "states"), [(1536, 96, 16), (896, 56, 16), (768, 48, 12), (768, 40, 16), (768, 80, 16)]
)
def test_other_sizes_do_not(width: int, rank: int, states: int) -> None:
    assert not fits(width, rank, states)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return records_of("tests.core.compile_persistent_narrow", tmp_path_factory.mktemp("triton"))


def test_it_compiles_and_fits(compiled: list[dict[str, Any]]) -> None:
    sizes = [(record["rows"], record["width"]) for record in compiled]
    assert sizes == [(64, 768), (32, 768), (64, 1024), (20, 512)]
    assert all(record["shared_bytes"] <= SHARED_BYTES for record in compiled)


def test_memory_is_read_16_bytes_a_thread(compiled: list[dict[str, Any]]) -> None:
    for record in compiled:
        assert record["copies"] > 0
        assert not record["narrow_copies"]
        pieces = 2 * record["width"] // 512
        space = 32 if record["rows"] <= 32 else 64
        # of each row a program has 16 channels, of each of which a thread of 256 has 16 of 64 bytes
        states = space // 4
        # x_proj: of 16 rows and of 8
        assert record["wide_reads"] == states + 4 * pieces
        assert record["wide_inputs"] >= (2 + space // 16) * pieces
        # and what is gathered of y
        assert record["wide_writes"] == states + 1


def test_products_run_on_the_matrix_units(compiled: list[dict[str, Any]]) -> None:
    for record in compiled:
        # in_proj, and dt_proj between two groups of warps
        assert record["products"] == ["m64n16k16", "m64n32k16"]
        # x_proj, and out_proj of two times 16 outputs and as many eights as rows
        groups_of_rows = (32 if record["rows"] <= 32 else 64) // 4 // 8
        assert record["split_products"] == 2 * record["width"] // 512 * 4 * (1 + 2 * groups_of_rows)


def test_each_phase_is_counted_and_awaited(compiled: list[dict[str, Any]]) -> None:
    assert {(record["counts"], record["waits"]) for record in compiled} == {(4, 4)}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({"num_hidden_layers": 3}, 64),
        ({"use_conv_bias": False}, 33),
        ({"conv_kernel": 3}, 50),
        ({"time_step_rank": 32}, 17),
        ({"hidden_size": 1024, "time_step_rank": 64}, 64),
    ],
)
def test_it_equals_the_layers(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], rows: int
) -> None:
    check_that_it_equals_the_layers(tiny_model, monkeypatch, SMALL | changes, rows)


@pytest.mark.gpu
def test_states_may_be_rounded_and_scratch_rows_shared(tiny_model: MakeModel) -> None:
    check_rounded_states_and_shared_rows(tiny_model, SMALL)


@pytest.mark.gpu
def test_a_convolutions_inputs_may_lie_by_channels_or_by_taps(tiny_model: MakeModel) -> None:
    check_both_layouts_of_a_convolutions_inputs(tiny_model, SMALL)


@pytest.mark.gpu
def test_it_repeats_to_the_bit(tiny_model: MakeModel) -> None:
    check_that_it_repeats_to_the_bit(tiny_model, SMALL | {"num_hidden_layers": 8})
