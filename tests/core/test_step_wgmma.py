"""The large products of a decode step compile for Hopper into what they are meant to be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mamba_core.ops.triton import step_wgmma
from mamba_core.ops.triton.quantized import Matrix
from mamba_core.ops.triton.step_wgmma import WideTile, tile_in, tile_low, tile_out
from tests.compiling import records_of

# bytes of shared memory that a program may have
ROOM = 227 * 1024


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One record per tile, from a process that compiles where this one interprets."""
    return records_of("tests.core.compile_step_wgmma", tmp_path_factory.mktemp("triton"))


def test_tiles_fit_into_shared_memory_and_registers(compiled: list[dict[str, Any]]) -> None:
    assert [record["tile"] for record in compiled if record["shared_bytes"] > ROOM] == []
    assert [record["tile"] for record in compiled if record["local"] > 0] == []


def test_a_tile_is_multiplied_while_the_next_is_awaited(compiled: list[dict[str, Any]]) -> None:
    # products of one tile may be under way when the next is begun, and none is waited for until the last
    assert all(record["awaited"] == [str(record["parts"]), "0"] for record in compiled)
    assert all(len(record["products"]) == record["parts"] for record in compiled)


def test_tiles_come_and_bf16_leaves_without_the_threads(compiled: list[dict[str, Any]]) -> None:
    # each operand once for every stage before the loop, and once in it
    for record in compiled:
        assert record["fetches"] == (1 + record["parts"]) * (1 + record["stages"])
        assert record["writes"] == (0 if record["kernel"] == "wgmma_shared_kernel" else record["parts"])


def test_every_kernel_waits_once_for_its_predecessor(compiled: list[dict[str, Any]]) -> None:
    assert {(record["waits"], record["launches"]) for record in compiled} == {(1, 1)}


def test_a_tile_fits_what_it_divides() -> None:
    assert WideTile(128, 128, 32, 6, shares=4).fits(2560, 5120)
    assert not WideTile(128, 128, 32, 6).fits(2048, 2560)
    # six shares of two tiles are more than ten tiles
    assert not WideTile(128, 128, 0, 6, shares=6).fits(2048, 640)
    assert WideTile(128, 128, 0, 6, shares=5).fits(2048, 640)


def test_the_rows_compiled_for_first_have_all_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_wgmma, "has_wgmma", lambda _: True)
    for width in (768, 1024, 1536, 2048, 2560):
        in_proj, x_proj, out_proj = (
            Matrix(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
            for shape in ((4 * width, width), (width // 16 + 32, 2 * width), (width, 2 * width))
        )
        for least, first in ((33, 64), (65, 128), (129, 256)):
            for rows in range(least, first):
                assert tile_in(in_proj, rows) == tile_in(in_proj, first)
                assert tile_low(x_proj, rows) == tile_low(x_proj, first)
                assert tile_out(out_proj, rows) == tile_out(out_proj, first)


@pytest.mark.parametrize(
    ("sizes", "rows", "expected"),
    [
        ((192, 5120), 256, WideTile(64, 64, 0, 8, shares=10)),
        ((192, 5120), 64, WideTile(64, 32, 0, 4, shares=20)),
        ((160, 4096), 128, WideTile(64, 32, 0, 6, shares=11)),
        ((80, 1536), 256, WideTile(64, 16, 0, 4, shares=6)),
        ((80, 1536), 257, None),
    ],
)
def test_x_proj_is_shared_out_among_nearly_all_multiprocessors(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int], rows: int, expected: WideTile | None
) -> None:
    monkeypatch.setattr(step_wgmma, "has_wgmma", lambda _: True)
    assert tile_low(Matrix(torch.empty(sizes, dtype=torch.bfloat16, device="meta")), rows) == expected


def test_products_in_other_types_and_on_other_devices_are_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tile_in(Matrix(torch.empty(3072, 768, dtype=torch.bfloat16)), 128) is None
    monkeypatch.setattr(step_wgmma, "has_wgmma", lambda _: True)
    assert tile_in(Matrix(torch.empty(3072, 768, dtype=torch.bfloat16, device="meta")), 128) is not None
    assert tile_in(Matrix(torch.empty(3072, 768, dtype=torch.float16, device="meta")), 128) is None
    assert tile_in(Matrix(torch.empty(3072, 768, dtype=torch.int8, device="meta"), torch.empty(3072)), 128) is None
    assert tile_in(Matrix(torch.empty(3072, 750, dtype=torch.bfloat16, device="meta")), 128) is None
