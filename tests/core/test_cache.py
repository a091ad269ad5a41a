"""The state cache: exact memory, clean reuse, bit-equal snapshots, and no slot touched but the ones named."""

from __future__ import annotations

import pytest
import torch

from mamba_core import MambaCache, MambaConfig, StateSnapshot
from tests.core.ops_cases import by_taps

CONFIG = MambaConfig(vocab_size=8, hidden_size=6, state_size=3, num_hidden_layers=2, conv_kernel=4)


@pytest.fixture(params=["by channels", "by taps"])
def cache(request: pytest.FixtureRequest) -> MambaCache:
    made = MambaCache.from_config(CONFIG, 5, dtype=torch.bfloat16)
    if request.param == "by taps":
        made = MambaCache(by_taps(made.conv), made.ssm)
    torch.manual_seed(0)
    made.conv.normal_()
    made.ssm.normal_()
    return made


def bits(cache: MambaCache, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
    return cache.conv[:, slot].view(torch.int16).clone(), cache.ssm[:, slot].view(torch.int32).clone()


def is_equal(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_shapes_dtypes_and_bytes() -> None:
    cache = MambaCache.from_config(CONFIG, 5, dtype=torch.bfloat16)
    assert (cache.conv.shape, cache.conv.dtype) == ((2, 5, 12, 3), torch.bfloat16)
    assert (cache.ssm.shape, cache.ssm.dtype) == ((2, 5, 12, 3), torch.float32)
    assert cache.conv.count_nonzero() == cache.ssm.count_nonzero() == 0
    assert cache.bytes_per_slot == MambaCache.slot_bytes(CONFIG, torch.bfloat16) == 2 * 12 * 3 * (2 + 4)
    assert MambaCache.slot_bytes(CONFIG, torch.float32, torch.bfloat16) == cache.bytes_per_slot


@pytest.mark.gpu
def test_a_gpu_keeps_all_channels_of_a_tap_together() -> None:
    cache = MambaCache.from_config(CONFIG, 5, dtype=torch.bfloat16, device="cuda")
    assert cache.conv.shape == (2, 5, 12, 3)
    assert cache.conv.mT.is_contiguous()
    before = MambaCache.from_config(CONFIG, 1, dtype=torch.bfloat16)
    before.conv.normal_()
    cache.load(2, before.export(0).to("cuda"))
    cache.copy(2, [1, 4])
    for slot, is_copy in enumerate([False, True, True, False, True]):
        assert torch.equal(cache.conv[:, slot].cpu(), before.conv[:, 0]) == is_copy
        assert torch.equal(cache.export(slot).to("cpu").conv, before.conv[:, 0]) == is_copy


def test_bytes_of_a_published_size_need_no_memory() -> None:
    config = MambaConfig(hidden_size=2560, num_hidden_layers=64)
    assert MambaCache.slot_bytes(config, torch.bfloat16) == 64 * 5120 * (3 * 2 + 16 * 4)


@pytest.mark.parametrize(
    "slots", [[1, 3], (1, 3), torch.tensor([1, 3], dtype=torch.int32)], ids=["list", "tuple", "tensor"]
)
def test_zero_writes_even_over_nan_and_nowhere_else(cache: MambaCache, slots: list[int]) -> None:
    cache.conv[:, 1] = float("nan")
    cache.ssm[:, 3] = float("inf")
    before = [bits(cache, slot) for slot in range(5)]
    cache.zero(slots)
    for slot in (1, 3):
        assert cache.conv[:, slot].count_nonzero() == cache.ssm[:, slot].count_nonzero() == 0
    assert all(is_equal(bits(cache, slot), before[slot]) for slot in (0, 2, 4))


def test_copy_one_to_many_and_swap(cache: MambaCache) -> None:
    before = [bits(cache, slot) for slot in range(5)]
    cache.copy(0, [2, 4])
    assert all(is_equal(bits(cache, slot), before[0]) for slot in (0, 2, 4))
    assert all(is_equal(bits(cache, slot), before[slot]) for slot in (1, 3))
    cache.copy([1, 3], [3, 1])
    assert is_equal(bits(cache, 1), before[3])
    assert is_equal(bits(cache, 3), before[1])


def test_snapshot_is_a_copy_and_loads_bit_equal(cache: MambaCache) -> None:
    cache.ssm[0, 2, 0, 0] = float("nan")
    before = bits(cache, 2)
    snapshot = cache.export(2)
    assert snapshot.num_bytes == cache.bytes_per_slot
    cache.zero(2)
    cache.load(4, snapshot.to("cpu"))
    assert is_equal(bits(cache, 4), before)
    assert cache.ssm[:, 2].count_nonzero() == 0


def test_a_snapshot_of_another_model_or_dtype_is_refused(cache: MambaCache) -> None:
    snapshot, before = cache.export(0), bits(cache, 1)
    for strange in (
        StateSnapshot(snapshot.conv[:1], snapshot.ssm[:1]),
        StateSnapshot(snapshot.conv, snapshot.ssm.bfloat16()),
        StateSnapshot(snapshot.conv.float(), snapshot.ssm),
    ):
        with pytest.raises(ValueError, match="snapshot (conv|ssm) is"):
            cache.load(1, strange)
    assert is_equal(bits(cache, 1), before)


def test_reorder_moves_whole_slots(cache: MambaCache) -> None:
    before = [bits(cache, slot) for slot in range(5)]
    addresses = cache.conv.data_ptr(), cache.ssm.data_ptr()
    cache.reorder(torch.tensor([4, 4, 0, 1, 2]))
    assert all(is_equal(bits(cache, slot), before[origin]) for slot, origin in enumerate([4, 4, 0, 1, 2]))
    assert (cache.conv.data_ptr(), cache.ssm.data_ptr()) == addresses
    with pytest.raises(ValueError, match="beam_idx"):
        cache.reorder(torch.tensor([0, 1]))


@pytest.mark.parametrize("slot", [-1, 5])
def test_a_slot_outside_the_cache_is_refused(cache: MambaCache, slot: int) -> None:
    snapshot = cache.export(0)
    for call in (
        lambda: cache.zero([0, slot]),
        lambda: cache.copy(0, slot),
        lambda: cache.copy(slot, 0),
        lambda: cache.export(slot),
        lambda: cache.load(slot, snapshot),
    ):
        with pytest.raises(ValueError, match=f"slot {slot} is outside 0..4"):
            call()


def test_sizes_that_do_not_fit_are_refused(cache: MambaCache) -> None:
    with pytest.raises(ValueError, match="num_slots"):
        MambaCache.from_config(CONFIG, 0, dtype=torch.float32)
    with pytest.raises(ValueError, match="belong together"):
        MambaCache(cache.conv[:1], cache.ssm)
    with pytest.raises(ValueError, match="2 source slots for 3 destinations"):
        cache.copy([0, 1], [2, 3, 4])


def test_a_cache_made_under_inference_mode_is_writable_outside() -> None:
    with torch.inference_mode():
        cache = MambaCache.from_config(CONFIG, 2, dtype=torch.float32)
    cache.ssm.fill_(1)
    cache.zero([0, 1])
    assert cache.ssm.count_nonzero() == 0


@pytest.fixture
def lagging() -> MambaCache:
    made = MambaCache.from_config(CONFIG, 5, dtype=torch.bfloat16, may_lag=True)
    assert made.lag is not None
    for tensor in (made.conv, made.ssm, made.lag.inputs, made.lag.b):
        tensor.normal_()
    made.lag.phases[1:3] = 1
    return made


def flags(cache: MambaCache) -> list[int]:
    assert cache.lag is not None
    flags: list[int] = cache.lag.phases.tolist()
    return flags


def test_what_states_lack_counts_as_memory(lagging: MambaCache) -> None:
    plain = MambaCache.slot_bytes(CONFIG, torch.bfloat16)
    assert lagging.bytes_per_slot == MambaCache.slot_bytes(CONFIG, torch.bfloat16, may_lag=True)
    assert lagging.bytes_per_slot == plain + 4 + 2 * (2 * 12 * 2 + 3 * 4)


def test_only_states_that_are_not_rounded_may_lack_a_token() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        MambaCache.from_config(CONFIG, 5, dtype=torch.bfloat16, state_dtype=torch.bfloat16, may_lag=True)


def test_what_states_lack_goes_where_they_go(lagging: MambaCache) -> None:
    lag = lagging.lag
    assert lag is not None
    inputs, b = lag.inputs.clone(), lag.b.clone()
    lagging.copy([1, 0], [4, 2])
    assert flags(lagging) == [0, 1, 0, 0, 1]
    assert torch.equal(lag.inputs[:, 4], inputs[:, 1])
    assert torch.equal(lag.b[:, 4], b[:, 1])
    lagging.reorder(torch.tensor([1, 0, 0, 0, 3]))
    assert flags(lagging) == [1, 0, 0, 0, 0]
    assert torch.equal(lag.inputs[:, 0], inputs[:, 1])
    lagging.reset()
    assert flags(lagging) == [0] * 5


def test_a_fresh_or_loaded_slot_lacks_nothing(lagging: MambaCache) -> None:
    snapshot = lagging.export(3)
    lagging.zero([1])
    lagging.load(2, snapshot)
    assert flags(lagging) == [0] * 5


def test_a_slot_that_lacks_a_token_is_not_exported(lagging: MambaCache) -> None:
    with pytest.raises(ValueError, match="slot 2 lack a token"):
        lagging.export(2)
