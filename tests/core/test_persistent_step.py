"""The step of one sequence in a single launch: what it asks of a model, what it is compiled to, what it computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from mamba_core import MambaCache, MambaForCausalLM, fused_step, single_step
from mamba_core.ops import Packing
from mamba_core.ops.triton import persistent, persistent_step
from mamba_core.ops.triton.persistent_step import LayerWeights, Weights, is_applicable, locate, sizes_for
from mamba_core.ops.triton.step_products import MAX_TILES
from mamba_core.quantization import quantize_int8
from tests.compiling import records_of
from tests.core.ops_cases import poison_memory
from tests.core.step_cases import widened

MakeModel = Callable[..., MambaForCausalLM]
# a multiprocessor of compute capability 9.0 has 228 KiB, a block of threads at most
SHARED_BYTES = 227 * 1024


class LaunchedRows(Exception):
    """A step by several launches has begun."""


def make_layer(width: int = 512, rank: int = 32, states: int = 16, taps: int = 4) -> LayerWeights:
    def bf16(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    dim = 2 * width
    return LayerWeights(
        in_proj=bf16(2 * dim, width),
        x_proj=bf16(rank + 2 * states, dim),
        out_proj=bf16(width, dim),
        taps=bf16(dim, taps),
        conv_bias=None,
        dt_proj=bf16(dim, rank),
        dt_bias=bf16(dim),
        decay=torch.zeros(dim, states),
        skip=torch.zeros(dim),
        gain=bf16(width),
        in_bias=None,
        out_bias=None,
    )


def test_the_table_has_the_columns_the_kernel_reads() -> None:
    names = [field.name.upper() for field in fields(LayerWeights)]
    assert [getattr(persistent, name).value for name in names] == list(range(len(names)))
    assert persistent.FIELDS.value == len(names)


def test_the_table_holds_addresses_and_zero_for_what_is_missing() -> None:
    layers = [make_layer(), make_layer()]
    table = locate(layers, None).table
    assert table.dtype == torch.int64
    assert table.tolist() == [
        [0 if tensor is None else tensor.data_ptr() for tensor in layer.tensors()] for layer in layers
    ]
    assert (table == 0).sum(dim=1).tolist() == [6, 6]


def test_the_table_is_kept_until_a_weight_moves() -> None:
    layers = [make_layer(), make_layer()]
    known: Weights = locate(layers, None)
    assert locate([make_layer_of(layer) for layer in layers], known) is known
    moved = [layers[0], replace(layers[1], decay=layers[1].decay.clone())]
    assert locate(moved, known) is not known


def make_layer_of(layer: LayerWeights) -> LayerWeights:
    """Another object over the same memory, as every step makes one."""
    return replace(layer, taps=layer.taps.view_as(layer.taps))


def test_it_is_not_for_a_cpu() -> None:
    assert not is_applicable(make_layer())


class Recorder:
    """Takes the place of a kernel and keeps what it is launched with, by name."""

    def __init__(self, kernel: Any) -> None:
        self.names: list[str] = kernel.arg_names
        self.grid: tuple[int, ...] = ()
        self.arguments: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.grid = grid
        return self._launch

    def _launch(self, *values: Any, **named: Any) -> None:
        positional = dict(zip(self.names, values, strict=False))
        assert not positional.keys() & named.keys()
        self.arguments = positional | named


def check_launch(recorder: Recorder, programs: int) -> None:
    """Everything the kernel takes is given, addresses where it wants addresses, and no more programs than there are."""
    options = {"num_warps", "launch_cooperative_grid"}
    assert recorder.arguments.keys() == {*recorder.names, *options}
    for name, value in recorder.arguments.items():
        assert isinstance(value, Tensor) == name.endswith("_ptr"), name
    assert recorder.arguments["launch_cooperative_grid"]
    assert math.prod(recorder.grid) <= programs


def launch_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, width: int, rows: int
) -> tuple[Recorder, Tensor, Tensor]:
    recorder = Recorder(getattr(module, name))
    monkeypatch.setattr(module, name, recorder)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    weights = locate([make_layer(width), make_layer(width)], None)
    table = torch.zeros(97, width, dtype=torch.bfloat16)
    states = torch.zeros(2, rows, 2 * width, 3), torch.zeros(2, rows, 2 * width, 16)
    slots, counters = torch.arange(rows), torch.zeros(MAX_TILES, dtype=torch.int32)
    gained, squares = module.step(weights, slots, table, table[0], slots, *states, counters, 1e-5, None)
    check_launch(recorder, 132)
    return recorder, gained, squares


@pytest.mark.parametrize("width", [1024, 2560])
def test_its_launch_gives_the_kernel_what_it_takes(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    recorder, gained, squares = launch_on_a_cpu(monkeypatch, persistent_step, "persistent_step_kernel", width, rows=1)
    assert gained.shape == (1, width)
    assert squares.shape == (132, 1)
    assert recorder.grid == (132,)


@torch.inference_mode()
def test_it_is_taken_for_one_row_alone(tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_model().backbone
    steps: list[Tensor] = []

    def take(*arguments: Tensor) -> Tensor:
        steps.append(arguments[1])
        return arguments[1]

    monkeypatch.setattr(single_step, "single_step", take)
    monkeypatch.setattr(single_step, "is_applicable", lambda model: model is backbone)

    def embed(*arguments: Tensor) -> None:
        raise LaunchedRows(len(arguments[1]))

    monkeypatch.setattr(fused_step.ops, "embed", embed)
    cache = MambaCache.from_config(backbone.config, 3, dtype=torch.float32)
    counters = torch.zeros(MAX_TILES, dtype=torch.int32)
    one, two = torch.tensor([5]), torch.tensor([5, 6])
    assert fused_step.fused_step(backbone, one, torch.tensor([1]), cache, counters) is one
    with pytest.raises(LaunchedRows, match="2"):
        fused_step.fused_step(backbone, two, torch.tensor([1, 2]), cache, counters)
    assert steps == [one]


@pytest.mark.parametrize("width", [1024, 1536, 2048, 2560, 4096])
@pytest.mark.parametrize("programs", [78, 132, 148])
@pytest.mark.parametrize("weight_bytes", [1, 2])
def test_every_row_has_room(width: int, programs: int, weight_bytes: int) -> None:
    sizes = sizes_for(width, width // 16, 16, 4, programs, weight_bytes)
    stage_bytes = sizes.PARTS * 256 * weight_bytes * (width // 512)
    assert 2 * stage_bytes <= sizes.STAGES * stage_bytes < SHARED_BYTES
    rows = sizes.PARTS // 2
    for block, size, stage_rows in (
        ("BLOCK_C", 2 * width, rows),
        ("BLOCK_O", width, rows // 2),
        ("BLOCK_P", width // 16 + 32, rows // 2),
    ):
        stages = triton.cdiv(triton.cdiv(size, programs), stage_rows)
        assert getattr(sizes, block) >= stages * stage_rows
    assert sizes.R_HIGH + sizes.R_LOW >= sizes.R


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return records_of("tests.core.compile_persistent_step", tmp_path_factory.mktemp("triton"))


def test_it_compiles_and_fits(compiled: list[dict[str, Any]]) -> None:
    assert [(record["width"], record["weight_bytes"]) for record in compiled] == [
        (1024, 2),
        (2048, 2),
        (2560, 2),
        (1024, 1),
        (2560, 1),
        (512, 2),
    ]
    assert all(record["shared_bytes"] <= SHARED_BYTES for record in compiled)


def test_weights_are_copied_16_bytes_a_thread(compiled: list[dict[str, Any]]) -> None:
    assert not any(record["narrow_copies"] for record in compiled)
    assert all(record["copies"] % (record["width"] // 512) == 0 < record["copies"] for record in compiled)


def test_each_phase_is_counted_and_awaited(compiled: list[dict[str, Any]]) -> None:
    assert {(record["counts"], record["waits"]) for record in compiled} == {(4, 4)}


def error(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def warm_cache(model: MambaForCausalLM, num_slots: int) -> MambaCache:
    cache = MambaCache.from_config(model.config, num_slots, dtype=torch.bfloat16, device="cuda")
    generator = torch.Generator().manual_seed(3)
    for state in (cache.conv, cache.ssm):
        state.copy_(torch.randn(state.shape, generator=generator))
    return cache


def clone(cache: MambaCache, dtype: torch.dtype) -> MambaCache:
    return MambaCache(cache.conv.to(dtype, copy=True), cache.ssm.clone())


def bf16_model(make: MakeModel, family: str, **changes: object) -> MambaForCausalLM:
    model = make(family, **changes).to(torch.bfloat16).to("cuda")
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "mixer.D")):
            parameter.data = parameter.data.float()
        if name.endswith("proj.weight"):
            # so that sums of as many terms as there are channels stay near one
            parameter.data /= parameter.shape[1] ** 0.5 / 4
    return model


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mamba", {"hidden_size": 512, "num_hidden_layers": 3}),
        ("mamba", {"hidden_size": 1024, "state_size": 16}),
        ("mamba", {"hidden_size": 1536, "use_bias": True, "use_conv_bias": False}),
        ("mamba", {"hidden_size": 512, "state_size": 12, "time_step_rank": 40, "conv_kernel": 3}),
        ("falcon_mamba", {"hidden_size": 2560, "state_size": 16, "time_step_rank": 160, "num_hidden_layers": 1}),
    ],
)
@pytest.mark.parametrize("is_int8", [False, True], ids=["whole", "int8"])
@torch.inference_mode()
def test_it_equals_the_layers(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch, family: str, changes: dict[str, object], is_int8: bool
) -> None:
    with torch.inference_mode(False):
        model = bf16_model(tiny_model, family, **changes)
        if is_int8:
            quantize_int8(model)
    reference = widened(model, tiny_model(family, **changes)).to("cuda")
    assert is_applicable(single_step._weights_of_layer(model.backbone, 0))
    cache = warm_cache(model, 5)
    before, plain, exact = (clone(cache, dtype) for dtype in (torch.bfloat16, torch.bfloat16, torch.float32))
    counters = torch.zeros(MAX_TILES, dtype=torch.int32, device="cuda")
    slots = torch.tensor([3], device="cuda")
    packing = Packing.step(slots)
    poison_memory(monkeypatch)

    for token in (5, 77, 0):
        tokens = torch.tensor([token], device="cuda")
        expected = reference.backbone.forward_packed(reference.backbone.embeddings(tokens), packing, exact)
        one_by_one = model.backbone.forward_packed(model.backbone.embeddings(tokens), packing, plain)
        hidden = single_step.single_step(model.backbone, tokens, slots, cache, counters)
        assert error(hidden, expected) < 1.2 * error(one_by_one, expected) + 1e-3

    assert error(cache.ssm[:, 3], exact.ssm[:, 3]) < 1.2 * error(plain.ssm[:, 3], exact.ssm[:, 3]) + 1e-3
    assert error(cache.conv[:, 3], exact.conv[:, 3]) < 1.2 * error(plain.conv[:, 3], exact.conv[:, 3]) + 1e-3
    assert not counters.any()
    for other in (0, 1, 2, 4):
        assert torch.equal(cache.ssm[:, other], before.ssm[:, other])
        assert torch.equal(cache.conv[:, other], before.conv[:, other])


@pytest.mark.gpu
@torch.inference_mode()
def test_a_convolutions_inputs_may_lie_by_channels_or_by_taps(tiny_model: MakeModel) -> None:
    model = bf16_model(tiny_model, "mamba", hidden_size=1024)
    counters = torch.zeros(MAX_TILES, dtype=torch.int32, device="cuda")
    tokens, slots = torch.tensor([7], device="cuda"), torch.tensor([1], device="cuda")
    taps = warm_cache(model, 2)
    assert taps.conv.mT.is_contiguous()
    channels = MambaCache(taps.conv.clone(memory_format=torch.contiguous_format), taps.ssm.clone())
    for _ in range(3):
        hidden = single_step.single_step(model.backbone, tokens, slots, taps, counters)
        assert torch.equal(hidden, single_step.single_step(model.backbone, tokens, slots, channels, counters))
    assert torch.equal(taps.conv, channels.conv)
    assert torch.equal(taps.ssm, channels.ssm)


@pytest.mark.gpu
@torch.inference_mode()
def test_it_repeats_to_the_bit(tiny_model: MakeModel) -> None:
    model = bf16_model(tiny_model, "mamba", hidden_size=1024, num_hidden_layers=8)
    counters = torch.zeros(MAX_TILES, dtype=torch.int32, device="cuda")
    tokens, slots = torch.tensor([7], device="cuda"), torch.tensor([1], device="cuda")
    start = warm_cache(model, 2)
    first = clone(start, torch.bfloat16)
    hidden = single_step.single_step(model.backbone, tokens, slots, first, counters)
    for _ in range(100):
        again = clone(start, torch.bfloat16)
        assert torch.equal(single_step.single_step(model.backbone, tokens, slots, again, counters), hidden)
        assert torch.equal(again.ssm, first.ssm)
        assert torch.equal(again.conv, first.conv)
