"""The compiled decode step of a CPU against the layers one by one: hidden states, states, what it must leave alone."""

from __future__ import annotations

import copy
import pickle
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numba
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mamba_core.cpu_step import CpuStep
from mamba_core.ops import Packing
from mamba_core.ops.machine import compiling
from mamba_core.ops.machine.compiling import compiled_callback
from mamba_core.ops.native import callbacks, threads
from mamba_core.ops.native.callbacks import head_callback
from mamba_core.ops.native.step_kernels import HeadField
from mamba_core.ops.native.threads import RecordField, Team, find_place, wait_for_all
from mamba_core.ops.native.units import Kind, has_pairs, has_words
from mamba_core.ops.numba_ops import conv, norm, scan
from mamba_core.quantization import Int8Linear
from tests.core.step_cases import (
    SHAPES,
    MakeModel,
    check_int8_step,
    check_step,
    clone,
    error,
    in_dtype,
    layer_by_layer,
    warm_cache,
)

# how weights are multiplied: their type, and whether pairs may be used
KINDS = [
    pytest.param(torch.float32, False, id="float32"),
    pytest.param(torch.bfloat16, False, id="bfloat16-widened"),
    pytest.param(
        torch.bfloat16,
        True,
        id="bfloat16-pairs",
        marks=pytest.mark.skipif(not has_pairs(), reason="this CPU does not multiply pairs of bfloat16"),
    ),
]


@pytest.fixture(autouse=True)
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("dtype", "may_use_pairs"), KINDS)
@pytest.mark.parametrize(("family", "changes"), SHAPES)
def test_step_equals_the_layers(
    tiny_model: MakeModel,
    family: str,
    changes: dict[str, object],
    dtype: torch.dtype,
    may_use_pairs: bool,
) -> None:
    check_step(tiny_model, family, changes, dtype, CpuStep(may_use_pairs=may_use_pairs))


@pytest.mark.parametrize(("dtype", "may_use_pairs"), KINDS)
@pytest.mark.parametrize(("num_outputs", "length"), [(1, 1), (3, 31), (16, 32), (97, 45), (130, 100)])
@torch.inference_mode()
def test_product_equals_torch(
    num_outputs: int,
    length: int,
    dtype: torch.dtype,
    may_use_pairs: bool,
) -> None:
    step = CpuStep(may_use_pairs=may_use_pairs)
    generator = torch.Generator().manual_seed(num_outputs)
    weight = torch.randn(num_outputs, length, generator=generator).to(dtype)
    for num_rows in (1, 2, 3, 4, 5, 33):
        hidden = torch.randn(num_rows, length, generator=generator).to(dtype)
        logits = step.project(hidden, weight)
        assert logits.dtype == torch.float32
        # products of such inputs are exact in fp32, only their sums are rounded
        assert error(logits, F.linear(hidden.double(), weight.double())) < 1e-6


@pytest.mark.parametrize(("dtype", "may_use_pairs"), KINDS)
@torch.inference_mode()
def test_a_row_does_not_depend_on_its_neighbours(
    tiny_model: MakeModel, dtype: torch.dtype, may_use_pairs: bool
) -> None:
    with torch.inference_mode(False):
        model = in_dtype(tiny_model(state_size=16), dtype)
    step = CpuStep(may_use_pairs=may_use_pairs)
    cache = warm_cache(model, 8, dtype)
    poisoned, alone = clone(cache, dtype), clone(cache, dtype)
    poisoned.ssm[:, 5] = float("nan")
    poisoned.conv[:, 6] = float("nan")
    tokens, slots = torch.tensor([3, 1, 4, 1]), torch.tensor([2, 5, 6, 3])
    hidden = step.step(model.backbone, tokens, slots, cache)
    beside = step.step(model.backbone, tokens, slots, poisoned)
    assert torch.equal(hidden[[0, 3]], beside[[0, 3]])
    assert beside[1:3].isnan().all()
    assert torch.equal(cache.ssm[:, [2, 3]], poisoned.ssm[:, [2, 3]])
    assert torch.equal(hidden[3:], step.step(model.backbone, tokens[3:], slots[3:], alone))
    logits = step.project(beside, model.lm_head.weight)
    assert torch.equal(logits[[0, 3]], step.project(hidden, model.lm_head.weight)[[0, 3]])
    assert logits[1:3].isnan().all()


@torch.inference_mode()
def test_padding_rows_share_the_scratch_slot(tiny_model: MakeModel) -> None:
    with torch.inference_mode(False):
        model = tiny_model()
    step = CpuStep()
    cache = warm_cache(model, 8, torch.float32)
    padded = clone(cache, torch.float32)
    tokens, slots = torch.tensor([3, 1, 4, 0, 0]), torch.tensor([2, 5, 7, 0, 0])
    hidden = step.step(model.backbone, tokens[:3], slots[:3], cache)
    assert torch.equal(hidden, step.step(model.backbone, tokens, slots, padded)[:3])
    assert torch.equal(cache.ssm[:, 1:], padded.ssm[:, 1:])
    assert torch.equal(cache.conv[:, 1:], padded.conv[:, 1:])


@pytest.mark.parametrize(("dtype", "may_use_pairs"), KINDS)
@pytest.mark.parametrize(("family", "changes"), SHAPES)
@torch.inference_mode()
def test_tokens_that_follow_one_another_may_be_rows_of_one_step(
    tiny_model: MakeModel, family: str, changes: dict[str, object], dtype: torch.dtype, may_use_pairs: bool
) -> None:
    with torch.inference_mode(False):
        model = in_dtype(tiny_model(family, **changes), dtype)
    step = CpuStep(may_use_pairs=may_use_pairs)
    together = warm_cache(model, 8, dtype)
    apart = clone(together, dtype)
    tokens, slots = torch.arange(20) % 7, torch.tensor([4] * 9 + [2] + [6] * 5 + [1] + [4] * 4)
    hidden = step.step(model.backbone, tokens, slots, together)
    for index in range(len(tokens)):
        alone = step.step(model.backbone, tokens[index : index + 1], slots[index : index + 1], apart)
        assert torch.equal(hidden[index : index + 1], alone)
    assert torch.equal(together.ssm, apart.ssm)
    assert torch.equal(together.conv, apart.conv)


@torch.inference_mode()
def test_the_model_takes_tokens_as_those_of_steps_where_it_is_told_to(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.inference_mode(False):
        model = tiny_model(state_size=16)
    backbone, calls = model.backbone, []
    make = CpuStep.step
    monkeypatch.setattr(CpuStep, "step", lambda *arguments: calls.append(1) or make(*arguments))
    cases = [
        ([3, 0, 2], True, True),
        ([3, 0, 2], False, False),
        ([1, 1], False, True),
        ([65], True, True),
        ([1] * 70 + [80], True, True),
        ([0], True, False),
    ]
    for lengths, in_steps, is_step in cases:
        calls.clear()
        slots = torch.arange(1, len(lengths) + 1)
        packing = Packing.from_lengths(lengths, slots, in_steps=in_steps)
        tokens = torch.arange(packing.num_tokens) % 5
        cache = warm_cache(model, 72, torch.float32)
        plain = clone(cache, torch.float32)
        hidden = model.forward_packed(tokens, packing, cache)
        expected = backbone.forward_packed(backbone.embeddings(tokens), packing, plain)
        assert bool(calls) is is_step
        if packing.num_tokens:
            assert error(hidden, expected) < 2e-6
            assert error(cache.ssm, plain.ssm) < 2e-6
    # tokens of no sequence
    padded = Packing(torch.tensor([1, 2]), torch.tensor([0, 2, 5], dtype=torch.int32), 8, 3, in_steps=True)
    calls.clear()
    model.forward_packed(torch.arange(8) % 5, padded, warm_cache(model, 8, torch.float32))
    assert not calls


@pytest.mark.parametrize(("family", "changes"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "may_use_pairs",
    [False, pytest.param(True, marks=pytest.mark.skipif(not has_words(), reason="this CPU has no AVX-512"))],
)
def test_int8_equals_what_it_stands_for(
    tiny_model: MakeModel, family: str, changes: dict[str, object], dtype: torch.dtype, may_use_pairs: bool
) -> None:
    check_int8_step(tiny_model, family, changes, dtype, CpuStep(may_use_pairs=may_use_pairs), may_use_pairs)


@torch.no_grad()
def test_int8_passes_nan_on_and_bears_zeros_and_large_values() -> None:
    linear = torch.nn.Linear(70, 40, bias=False)
    linear.weight[3] = 0
    weights = Int8Linear(linear)
    hidden = torch.randn(6, 70)
    hidden[1] *= 1e30
    hidden[2] *= 1e-25
    hidden[3, 69] = float("nan")
    hidden[4, 1] = float("inf")
    hidden[5] = 0
    for may_use_pairs in (False, True):
        logits = CpuStep(may_use_pairs=may_use_pairs).project(hidden, weights.weight, weights.scales)
        expected = hidden @ (weights.weight.float() * weights.scales[:, None]).T
        for row in range(3):
            assert error(logits[row], expected[row]) < 1e-3
        assert not logits[3:5].isfinite().any(1).all()
        assert not logits[5].any()
        assert not logits[:3, 3].any()


@pytest.mark.parametrize("num_threads", [1, 2, 3, 5])
@pytest.mark.parametrize("has_openmp", [True, False])
@torch.inference_mode()
def test_the_number_of_threads_changes_nothing(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch, num_threads: int, has_openmp: bool
) -> None:
    with torch.inference_mode(False):
        model = tiny_model(hidden_size=72)
    tokens, slots = torch.tensor([3, 1, 4]), torch.tensor([2, 5, 7])
    cache = warm_cache(model, 8, torch.float32)
    again = clone(cache, torch.float32)
    torch.set_num_threads(1)
    expected = CpuStep().step(model.backbone, tokens, slots, cache)
    if not has_openmp:
        monkeypatch.setattr(threads, "find_openmp", lambda: None)
    torch.set_num_threads(num_threads)
    step = CpuStep()
    hidden = step.step(model.backbone, tokens, slots, again)
    assert torch.equal(hidden, expected)
    assert torch.equal(cache.ssm, again.ssm)
    # the threads are still there for the next
    assert torch.equal(step.project(hidden, model.lm_head.weight), CpuStep().project(expected, model.lm_head.weight))


class HeadProduct:
    """A product of a head, as a record that a team runs."""

    def __init__(self) -> None:
        self.hidden, self.weight, self.results = torch.randn(3, 32), torch.randn(50, 32), torch.zeros(3, 50)
        self.inputs = torch.zeros(3, 64)
        self.record = record = np.zeros(HeadField.SIZE, np.int64)
        record[[HeadField.HIDDEN_STATES, HeadField.WEIGHTS]] = self.hidden.data_ptr(), self.weight.data_ptr()
        record[[HeadField.INPUTS, HeadField.INPUTS_STRIDE]] = self.inputs.data_ptr(), 256
        record[[HeadField.NUM_ROWS, HeadField.LENGTH]] = 3, 32
        record[[HeadField.NUM_OUTPUTS, HeadField.RESULTS]] = 50, self.results.data_ptr()

    def run(self, team: Team, amount: int | None = None) -> torch.Tensor:
        self.results.zero_()
        team.run(head_callback(Kind.of(torch.float32, torch.float32)), self.record, amount)
        return self.results.clone()


def test_a_team_that_lost_threads_is_gathered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "find_openmp", lambda: None)
    team, product = Team(), HeadProduct()
    for process in (1, 2):
        monkeypatch.setattr(threads, "os", SimpleNamespace(getpid=lambda process=process: process))
        assert error(product.run(team), product.hidden @ product.weight.T) < 1e-6


@pytest.mark.parametrize("has_openmp", [True, False])
def test_a_team_works_with_as_many_threads_as_its_crew_says(monkeypatch: pytest.MonkeyPatch, has_openmp: bool) -> None:
    if not has_openmp:
        monkeypatch.setattr(threads, "find_openmp", lambda: None)
    seen = []
    sizes = iter([3, 1, 2, 1, 3])
    crew = SimpleNamespace(size=lambda _: next(sizes), observe=lambda *told: seen.append(told))
    monkeypatch.setattr(threads, "Crew", lambda: crew)
    team, product = Team(), HeadProduct()

    results = [product.run(team, amount=7) for _ in range(5)]

    assert error(results[0], product.hidden @ product.weight.T) < 1e-6
    assert all(torch.equal(result, results[0]) for result in results)
    assert [amount for amount, _, _ in seen] == [7] * 5
    assert all(seconds > 0 and 0 <= sleepiness <= 1 for _, seconds, sleepiness in seen)
    # a thread alone waits for nobody
    assert seen[1][2] == seen[3][2] == 0


@torch.no_grad()
def test_the_model_takes_the_step_and_follows_its_weights(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(state_size=16)
    tokens, slots = torch.tensor([3, 1, 4]), torch.tensor([2, 5, 7])
    calls = []
    make = CpuStep.step
    monkeypatch.setattr(CpuStep, "step", lambda *arguments: calls.append(1) or make(*arguments))
    for _ in range(3):
        cache = warm_cache(model, 8, torch.float32)
        plain = clone(cache, torch.float32)
        hidden = model.forward_packed(tokens, Packing.step(slots), cache)
        assert error(hidden, layer_by_layer(model, tokens, slots, plain)) < 2e-6
        # in place, and by another tensor
        model.backbone.layers[0].mixer.A_log.add_(0.3)
        model.backbone.layers[1].mixer.in_proj.weight.mul_(1.1)
        model.backbone.layers[1].mixer.out_proj.weight = torch.nn.Parameter(torch.randn(32, 64))
    assert len(calls) == 3
    with torch.enable_grad():
        assert model.forward_packed(tokens, Packing.step(slots), cache).requires_grad
    assert len(calls) == 3


@torch.no_grad()
def test_what_is_kept_between_steps_is_not_copied(tiny_model: MakeModel) -> None:
    model = tiny_model()
    cache = warm_cache(model, 4, torch.float32)
    tokens, slots = torch.tensor([3]), torch.tensor([2])
    copies = clone(cache, torch.float32), clone(cache, torch.float32)
    hidden = model.forward_packed(tokens, Packing.step(slots), cache)
    for other, states in zip((copy.deepcopy(model), pickle.loads(pickle.dumps(model))), copies, strict=True):
        assert torch.equal(other.forward_packed(tokens, Packing.step(slots), states), hidden)


@torch.inference_mode()
def test_what_does_not_exist_is_refused(tiny_model: MakeModel) -> None:
    with torch.inference_mode(False):
        model = tiny_model()
    cache = warm_cache(model, 4, torch.float32)
    before = clone(cache, torch.float32)
    for token, slot, message in ((97, 1, "token 97"), (-1, 1, "token -1"), (3, 4, "slot 4"), (3, -1, "slot -1")):
        with pytest.raises(IndexError, match=message):
            CpuStep().step(model.backbone, torch.tensor([2, token]), torch.tensor([0, slot]), cache)
    assert torch.equal(cache.ssm, before.ssm)


def test_without_a_place_to_keep_it_machine_code_is_made_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    make = numba.cfunc

    def refuse(signature: object, cache: bool = False, **options: object) -> object:
        if cache:
            raise RuntimeError("cannot cache function 'seven': no locator available")
        return make(signature, **options)

    monkeypatch.setattr(numba, "cfunc", refuse)
    callback = compiled_callback(numba.types.int64(numba.types.int64), lambda x: x + 7)
    assert callback.ctypes(5) == 12


def test_machine_code_of_other_sources_is_not_taken_for_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = compiling.fingerprint()
    monkeypatch.setattr(compiling, "__file__", str(tmp_path / "machine" / "compiling.py"))
    numbers = {before, compiling.fingerprint.__wrapped__()}
    for room in ("machine", "native", "numba_ops"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "kernels.py").write_text("changed")
        numbers.add(compiling.fingerprint.__wrapped__())
    assert len(numbers) == 5
    # numba looks at what a function refers to, so that each number has machine code of its own
    for function in (callbacks.step_callback, callbacks.head_callback):
        callback = function(Kind.of(torch.float32, torch.float32))
        assert before in [cell.cell_contents for cell in callback._pyfunc.__closure__]
    for callback in (conv._conv_tasks, norm._norm_tasks, scan._scan_tasks):
        assert before in [cell.cell_contents for cell in callback._pyfunc.__closure__]


def _keep_waiting(record: int) -> int:
    thread, num_threads = find_place(record)
    total = 0.0
    for _ in range(50):
        if thread == 0:
            for number in range(3_000_000):
                total += number * 0.5
        wait_for_all(record, num_threads)
    return int(total > 0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads sleep by a system call of Linux")
def test_a_thread_that_waits_for_long_sleeps() -> None:
    record = np.zeros(RecordField.SIZE, np.int64)
    callback = compiled_callback(numba.types.int64(numba.types.int64), _keep_waiting)
    cpu, wall = time.process_time(), time.perf_counter()
    Team().run(callback, record)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    assert list(record[[RecordField.ARRIVALS, RecordField.SLEEPERS]]) == [2 * 50, 0]
    assert 25 < record[RecordField.NUM_SLEEPS] <= 50
    # one worked, and the other did not look on all the time
    assert cpu < 1.5 * wall
