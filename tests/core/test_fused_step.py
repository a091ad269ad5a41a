"""The fused decode step against the layers one by one: hidden states, states, and what it must leave alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mamba_core import MambaCache, MambaForCausalLM
from mamba_core.fused_step import fused_step
from mamba_core.lagging import Settler
from mamba_core.ops import Packing
from mamba_core.ops.lag import BEHIND, WRITTEN
from mamba_core.ops.triton import step_tiles, step_wgmma
from mamba_core.ops.triton.quantized import Matrix, dequantize
from mamba_core.ops.triton.step_products import MAX_TILES, project_head
from mamba_core.ops.triton.step_tiles import FEW_ROWS, SOME_ROWS, SOME_ROWS_OF_HOPPER
from mamba_core.quantization import Int8Linear, quantize_int8
from tests.core.ops_cases import by_taps, poison_memory
from tests.core.step_cases import clone, error, in_dtype, widened
from tests.core.test_persistent_step import bf16_model

MakeModel = Callable[..., MambaForCausalLM]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter cuts bfloat16 off where a GPU rounds it; the kernels take either
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16


def warm_cache(model: MambaForCausalLM, num_slots: int, dtype: torch.dtype) -> MambaCache:
    """A cache whose slots look as if sequences had passed through them."""
    generator = torch.Generator().manual_seed(3)
    cache = MambaCache.from_config(model.config, num_slots, dtype=dtype, device=DEVICE)
    for state in (cache.conv, cache.ssm):
        state.copy_(torch.randn(state.shape, generator=generator))
    return cache


BIASED = {"use_bias": True, "use_conv_bias": False}
ODD = {"hidden_size": 96, "state_size": 5, "time_step_rank": 7, "conv_kernel": 3}


@pytest.mark.parametrize(
    ("family", "changes", "is_int8"),
    [
        ("mamba", {}, False),
        ("mamba", BIASED, False),
        ("mamba", ODD, False),
        ("falcon_mamba", {"state_size": 16, "time_step_rank": 20}, False),
        ("mamba", BIASED, True),
        ("mamba", ODD, True),
    ],
)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 17, 33, 65, 129])
@torch.inference_mode()
def test_fused_step_equals_the_layers(
    tiny_model: MakeModel,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    changes: dict[str, object],
    num_rows: int,
    is_int8: bool,
) -> None:
    model = tiny_model(family, **changes).to(DTYPE).to(DEVICE)
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "mixer.D")):
            parameter.data = parameter.data.float()
    if is_int8:
        quantize_int8(model)
    reference = widened(model, tiny_model(family, **changes)).to(DEVICE)
    slots = (1 + torch.randperm(num_rows + 3, generator=torch.Generator().manual_seed(1))[:num_rows]).to(DEVICE)
    tokens = (torch.arange(num_rows, device=DEVICE) * 7) % model.config.vocab_size
    cache = warm_cache(model, num_rows + 4, DTYPE)
    before, plain, exact = clone(cache, DTYPE), clone(cache, DTYPE), clone(cache, torch.float32)
    counters = torch.zeros(MAX_TILES, dtype=torch.int32, device=DEVICE)
    packing = Packing.step(slots)

    expected = reference.forward_packed(tokens, packing, exact)
    one_by_one = model.backbone.forward_packed(model.backbone.embeddings(tokens), packing, plain)
    poison_memory(monkeypatch)
    hidden = fused_step(model.backbone, tokens, slots, cache, counters)

    assert hidden.dtype == DTYPE
    assert error(hidden, expected) < 1.2 * error(one_by_one, expected) + 1e-3
    assert (
        error(cache.ssm[:, slots], exact.ssm[:, slots]) < 1.2 * error(plain.ssm[:, slots], exact.ssm[:, slots]) + 1e-3
    )
    assert error(cache.conv[:, slots], exact.conv[:, slots]) < 1e-2
    assert not counters.any()
    others = torch.ones(num_rows + 4, dtype=torch.bool)
    others[slots.cpu()] = False
    assert torch.equal(cache.ssm[:, others], before.ssm[:, others])
    assert torch.equal(cache.conv[:, others], before.conv[:, others])


@pytest.mark.parametrize("changes", [{}, ODD], ids=str)
@pytest.mark.parametrize("num_rows", [1, 3, 17, 33, 66])
@torch.inference_mode()
def test_a_convolutions_inputs_may_lie_by_channels_or_by_taps(
    tiny_model: MakeModel, changes: dict[str, object], num_rows: int
) -> None:
    model = tiny_model("mamba", **changes).to(DTYPE).to(DEVICE)
    slots = (1 + torch.randperm(num_rows + 3, generator=torch.Generator().manual_seed(1))[:num_rows]).to(DEVICE)
    tokens = torch.arange(num_rows, device=DEVICE) % model.config.vocab_size
    counters = torch.zeros(MAX_TILES, dtype=torch.int32, device=DEVICE)
    start = warm_cache(model, num_rows + 4, DTYPE)
    channels = MambaCache(start.conv.clone(memory_format=torch.contiguous_format), start.ssm.clone())
    taps = MambaCache(by_taps(start.conv), start.ssm.clone())
    for _ in range(3):
        hidden = fused_step(model.backbone, tokens, slots, taps, counters)
        assert torch.equal(hidden, fused_step(model.backbone, tokens, slots, channels, counters))
    assert torch.equal(taps.conv, channels.conv)
    assert torch.equal(taps.ssm, channels.ssm)


@torch.inference_mode()
def test_a_row_does_not_depend_on_its_neighbours(tiny_model: MakeModel) -> None:
    model = tiny_model().to(DTYPE).to(DEVICE)
    counters = torch.zeros(MAX_TILES, dtype=torch.int32, device=DEVICE)
    cache = warm_cache(model, 8, DTYPE)
    poisoned = clone(cache, DTYPE)
    poisoned.ssm[:, 5] = float("nan")
    poisoned.conv[:, 6] = float("nan")
    tokens, slots = torch.tensor([3, 1, 4, 1], device=DEVICE), torch.tensor([2, 5, 6, 3], device=DEVICE)
    hidden = fused_step(model.backbone, tokens, slots, cache, counters)
    beside = fused_step(model.backbone, tokens, slots, poisoned, counters)
    assert torch.equal(hidden[[0, 3]], beside[[0, 3]])
    assert beside[1:3].isnan().all()
    assert torch.equal(cache.ssm[:, [2, 3]], poisoned.ssm[:, [2, 3]])


@torch.inference_mode()
def test_padding_rows_share_the_scratch_slot(tiny_model: MakeModel) -> None:
    model = tiny_model().to(DTYPE).to(DEVICE)
    counters = torch.zeros(MAX_TILES, dtype=torch.int32, device=DEVICE)
    cache = warm_cache(model, 8, DTYPE)
    padded = clone(cache, DTYPE)
    tokens, slots = torch.tensor([3, 1, 4, 0, 0], device=DEVICE), torch.tensor([2, 5, 7, 0, 0], device=DEVICE)
    hidden = fused_step(model.backbone, tokens[:3], slots[:3], cache, counters)
    beside = fused_step(model.backbone, tokens, slots, padded, counters)
    assert torch.equal(hidden, beside[:3])
    assert torch.equal(cache.ssm[:, 1:], padded.ssm[:, 1:])
    assert torch.equal(cache.conv[:, 1:], padded.conv[:, 1:])


@pytest.mark.parametrize("num_rows", [1, 2, 3, 16, 31, 33])
@pytest.mark.parametrize(("size", "vocab_size"), [(96, 131), (40, 50), (640, 97)])
@torch.inference_mode()
def test_logits_of_a_head(monkeypatch: pytest.MonkeyPatch, num_rows: int, size: int, vocab_size: int) -> None:
    if num_rows > FEW_ROWS and DEVICE != "cuda":
        pytest.skip("the library has no such product on a CPU")
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(vocab_size, size, generator=generator).to(DTYPE).to(DEVICE)
    hidden = torch.randn(num_rows, size, generator=generator).to(DTYPE).to(DEVICE)
    poison_memory(monkeypatch)
    logits = project_head(hidden, Matrix(weight))
    assert logits.dtype == torch.float32
    assert error(logits, hidden.double() @ weight.double().T) < 1e-5


@pytest.mark.parametrize("num_rows", [1, 2, 3, 33, 64])
@pytest.mark.parametrize(("size", "vocab_size"), [(96, 131), (37, 50), (640, 97)])
@torch.inference_mode()
def test_logits_of_an_int8_head(monkeypatch: pytest.MonkeyPatch, num_rows: int, size: int, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(5)
    linear = torch.nn.Linear(size, vocab_size, bias=False)
    linear.weight.copy_(torch.randn(vocab_size, size, generator=generator) * torch.arange(vocab_size)[:, None])
    head = Int8Linear(linear).to(DEVICE)
    hidden = torch.randn(num_rows, size, generator=generator).to(DTYPE).to(DEVICE)
    expected = hidden.double() @ (head.weight.double() * head.scales.double()[:, None]).T
    poison_memory(monkeypatch)
    logits = project_head(hidden, Matrix.of(head))
    assert logits.dtype == torch.float32
    # matrix units cut sums off a little above fp32's precision
    assert error(logits, expected) < (1e-5 if DEVICE == "cuda" else 1e-6)
    assert not logits[:, 0].any()


@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (65, 96), (5, 4100)])
def test_dequantizing_is_right_to_the_rounding(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8).to(DEVICE)
    scales = torch.rand(shape[0], generator=generator).to(DEVICE)
    poison_memory(monkeypatch)
    assert torch.equal(dequantize(weight, scales, torch.float32), weight.float() * scales[:, None])
    assert torch.equal(dequantize(weight, scales, DTYPE), (weight.float() * scales[:, None]).to(DTYPE))


@pytest.mark.parametrize(
    ("family", "changes", "is_int8", "some_rows"),
    [
        ("mamba", ODD | {"hidden_size": 32}, False, SOME_ROWS),
        ("falcon_mamba", {"state_size": 16, "time_step_rank": 20}, False, SOME_ROWS),
        ("falcon_mamba", {"state_size": 16, "time_step_rank": 20}, False, SOME_ROWS_OF_HOPPER),
        ("mamba", BIASED, True, SOME_ROWS),
        ("mamba", BIASED, True, SOME_ROWS_OF_HOPPER),
    ],
    ids=["odd", "falcon", "falcon, fewer", "int8", "int8, fewer"],
)
@torch.inference_mode()
def test_steps_that_leave_states_behind_have_the_same_bits(
    tiny_model: MakeModel,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    changes: dict[str, object],
    is_int8: bool,
    some_rows: int,
) -> None:
    monkeypatch.setattr(step_tiles, "some_rows", lambda *_: some_rows)
    with torch.inference_mode(False):
        model = in_dtype(tiny_model(family, **changes), DTYPE).to(DEVICE)
    if is_int8:
        quantize_int8(model)
    num_slots = some_rows + 8
    plain = warm_cache(model, num_slots, DTYPE)
    late = MambaCache.from_config(model.config, num_slots, dtype=DTYPE, device=DEVICE, may_lag=True)
    late.conv.copy_(plain.conv)
    late.ssm.copy_(plain.ssm)
    lag = late.lag
    assert lag is not None
    # what was never kept must never be read
    lag.inputs.fill_(torch.nan)
    lag.b.fill_(torch.nan)
    settler = Settler(model.backbone, late)
    counters = torch.zeros(MAX_TILES, dtype=torch.int32, device=DEVICE)
    generator = torch.Generator().manual_seed(1)

    def advance(slots: torch.Tensor) -> None:
        """One token for each slot, in both caches."""
        tokens = torch.randint(model.config.vocab_size, slots.shape, generator=generator).to(DEVICE)
        expected = fused_step(model.backbone, tokens, slots, plain, counters)
        hidden = fused_step(model.backbone, tokens, slots, late, counters, may_lag=True)
        assert torch.equal(hidden, expected)
        assert torch.equal(late.conv, plain.conv)

    poison_memory(monkeypatch)
    for number in range(3):
        before = lag.phases.clone()
        # some come, some go, and some are there each time
        slots = (1 + torch.randperm(num_slots - 1, generator=generator)[: some_rows + 1]).to(DEVICE)
        advance(slots)
        is_left = (before == WRITTEN) | ((before == 0) & (torch.arange(num_slots, device=DEVICE) % 2 == 0))
        before[slots] = torch.where(is_left, BEHIND, WRITTEN).int()[slots]
        assert torch.equal(lag.phases, before)
        in_time = lag.phases != BEHIND
        assert torch.equal(late.ssm[:, in_time], plain.ssm[:, in_time])
        assert not torch.equal(late.ssm, plain.ssm)
        if number == 0:
            # one slot begins anew and another goes on from where a third is, though they lack a token
            fresh, source = (lag.phases == BEHIND).nonzero()[:2, 0]
            target = (lag.phases == WRITTEN).nonzero()[0, 0]
            for cache in (plain, late):
                cache.zero(fresh)
                cache.copy(source, target)
            assert lag.phases[torch.stack((fresh, source, target))].tolist() == [0, BEHIND, BEHIND]
    few = (lag.phases == BEHIND).nonzero()[:3, 0]
    assert len(few) == 3
    settler.settle(few)
    assert torch.equal(late.ssm[:, few], plain.ssm[:, few])
    # so few rows leave nothing behind
    advance(few)
    assert not lag.phases[few].any()
    assert lag.phases.any()
    settler.settle(torch.arange(num_slots, device=DEVICE))
    assert torch.equal(late.ssm, plain.ssm)
    assert not lag.phases.any()
    assert not counters.any()


@pytest.mark.parametrize(("num_rows", "changes"), [(65, {}), (130, {"use_bias": True})], ids=["plain", "biased"])
@torch.inference_mode()
def test_a_step_whose_products_the_units_of_hopper_make(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch, num_rows: int, changes: dict[str, object]
) -> None:
    asked: list[tuple[int, int]] = []

    def project(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, tile: step_wgmma.WideTile, **_: bool) -> None:
        assert tile.shares == 1
        asked.append((weight.shape[0], weight.shape[1]))
        y.copy_(x.float() @ weight.float().T)

    def share_out(
        x: torch.Tensor, weight: torch.Tensor, shares: torch.Tensor, tile: step_wgmma.WideTile, **_: bool
    ) -> None:
        asked.append((weight.shape[0], weight.shape[1]))
        size = 64 * -(-weight.shape[1] // (64 * tile.shares))
        parts = zip(x.float().split(size, 1), weight.float().split(size, 1), strict=True)
        shares.copy_(torch.stack([some @ rows.T for some, rows in parts]))

    changes = {"hidden_size": 128, "state_size": 16, "time_step_rank": 16} | changes
    model = in_dtype(tiny_model("mamba", **changes), DTYPE).to(DEVICE)
    reference = widened(model, tiny_model("mamba", **changes)).to(DEVICE)
    monkeypatch.setattr(step_wgmma, "_usable", lambda matrix, tile: tile if tile.fits(*matrix.shape) else None)
    monkeypatch.setattr(step_wgmma, "project", project)
    monkeypatch.setattr(step_wgmma, "share_out", share_out)
    slots = (1 + torch.randperm(num_rows + 3)[:num_rows]).to(DEVICE)
    tokens = (torch.arange(num_rows, device=DEVICE) * 7) % model.config.vocab_size
    cache = warm_cache(model, num_rows + 4, DTYPE)
    exact = clone(cache, torch.float32)
    counters = torch.zeros(MAX_TILES, dtype=torch.int32, device=DEVICE)
    hidden = fused_step(model.backbone, tokens, slots, cache, counters)
    assert asked == [(512, 128), (48, 256), (128, 256)] * len(model.backbone.layers)
    assert error(hidden, reference.forward_packed(tokens, Packing.step(slots), exact)) < 1e-2
    assert error(cache.ssm[:, slots], exact.ssm[:, slots]) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("hidden_size", "num_rows"),
    [
        *((2560, rows) for rows in (17, 33, 64, 100, 256)),
        *((2048, rows) for rows in (64, 97, 129)),
        *((1536, rows) for rows in (20, 65, 200)),
        *((1024, rows) for rows in (17, 250)),
        *((768, rows) for rows in (33, 66, 131)),
    ],
)
@torch.inference_mode()
def test_steps_of_published_widths_on_the_units_of_hopper(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch, hidden_size: int, num_rows: int
) -> None:
    changes = {"hidden_size": hidden_size, "state_size": 16, "time_step_rank": hidden_size // 16}
    with torch.inference_mode(False):
        model = bf16_model(tiny_model, "mamba", **changes)
        reference = widened(model, tiny_model("mamba", **changes)).to(DEVICE)
    cache = MambaCache.from_config(model.config, num_rows + 4, dtype=DTYPE, device=DEVICE, may_lag=True)
    cache.ssm.normal_()
    cache.conv.normal_()
    plain, exact = clone(cache, DTYPE), clone(cache, torch.float32)
    counters = torch.zeros(MAX_TILES, dtype=torch.int32, device=DEVICE)
    slots = (1 + torch.randperm(num_rows + 3)[:num_rows]).to(DEVICE)
    packing = Packing.step(slots)
    poison_memory(monkeypatch)
    for _ in range(3):
        tokens = torch.randint(model.config.vocab_size, (num_rows,), device=DEVICE)
        expected = reference.forward_packed(tokens, packing, exact)
        one_by_one = model.backbone.forward_packed(model.backbone.embeddings(tokens), packing, plain)
        hidden = fused_step(model.backbone, tokens, slots, cache, counters, may_lag=True)
        assert error(hidden, expected) < 1.2 * error(one_by_one, expected) + 1e-3
    assert cache.lag is not None
    assert cache.lag.phases.any()
    Settler(model.backbone, cache).settle(slots)
    assert (
        error(cache.ssm[:, slots], exact.ssm[:, slots]) < 1.2 * error(plain.ssm[:, slots], exact.ssm[:, slots]) + 1e-3
    )
    assert error(cache.conv[:, slots], exact.conv[:, slots]) < 1e-2
    assert not counters.any()
