"""The kernels of a fused step compile for the GPU they are meant for, and each waits for the one before it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from tests.compiling import records_of
from tests.core.compile_step_kernels import MODULES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One record per kernel, from a process that compiles where this one interprets."""
    return records_of("tests.core.compile_step_kernels", tmp_path_factory.mktemp("triton"))


def test_every_kernel_compiles(compiled: list[dict[str, Any]]) -> None:
    written = {name for module in MODULES for name, _ in inspect.getmembers(module) if name.endswith("_kernel")}
    assert {record["kernel"] for record in compiled} == written
    assert all(record["cubin_bytes"] > 0 for record in compiled)


def test_every_kernel_waits_once_for_its_predecessor(compiled: list[dict[str, Any]]) -> None:
    # one that did not would end before its predecessor, and let its successor read too early
    assert {(record["waits"], record["launches"]) for record in compiled} == {(1, 1)}


def test_one_kernel_of_a_layer_waits_before_it_lets_the_next_start(compiled: list[dict[str, Any]]) -> None:
    # what others read before they wait was then written before they were launched
    assert {record["kernel"] for record in compiled if record["waits_first"]} == {"delta_kernel"}


def test_products_of_several_rows_use_the_matrix_units(compiled: list[dict[str, Any]]) -> None:
    products = {record["kernel"]: record["has_matrix_instructions"] for record in compiled}
    assert [name for name, has in products.items() if has] == [
        "product_in_kernel",
        "product_shared_kernel",
        "product_out_kernel",
        "delta_kernel",
    ]


def test_no_number_of_rows_is_compiled_for(compiled: list[dict[str, Any]]) -> None:
    assert not [record["kernel"] for record in compiled if "num_rows" in record["specialised"]]


def test_nothing_is_overwritten_before_every_thread_has_read_it(compiled: list[dict[str, Any]]) -> None:
    # an element of a small tile lies in several threads, and the compiler may let others store it than those that read
    rewriting = {"matvec_in_kernel", "matvec_out_kernel", "product_in_kernel", "gather_kernel", "advance_kernel"}
    # the first of each kernel: without a convolution ``matvec_in_kernel`` overwrites nothing
    early = {record["kernel"]: record["stores_before_barrier"] for record in reversed(compiled)}
    assert {name: early[name] for name in rewriting} == dict.fromkeys(rewriting, 0)


def test_states_of_many_rows_are_copied_ahead_sixteen_bytes_a_thread(compiled: list[dict[str, Any]]) -> None:
    # those of the first row, and in the loop those of the next: 2 KB by 32 threads
    records = [record for record in compiled if record["kernel"] == "advance_many_kernel"]
    assert [record["copies"] for record in records] == [8, 8]
    # as many registers as let all programs be at work at once hold what they need
    assert [record["local_accesses"] for record in records] == [0, 0]
