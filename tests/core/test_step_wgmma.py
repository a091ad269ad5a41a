"""The large products of a decode step compile for Hopper into what they are meant to be."""

from __future__ import annotations

from typing import Any

import pytest

from mamba_core.ops.triton.step_wgmma import WideTile
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
