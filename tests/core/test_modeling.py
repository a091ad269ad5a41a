"""One forward for every shape of input, equal to transformers' own Mamba and FalconMamba on the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mamba_core import FalconMambaConfig, MambaCache, MambaConfig, MambaForCausalLM
from mamba_core.ops import Packing

Make = Callable[..., MambaForCausalLM]
Theirs = Callable[[MambaForCausalLM], torch.nn.Module]
Tokens = Callable[..., Tensor]

TOLERANCE = 1e-4

pytestmark = pytest.mark.usefixtures("_no_grad")


@pytest.fixture
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def new_cache(model: MambaForCausalLM, num_slots: int, device: str = "cpu") -> MambaCache:
    return MambaCache.from_config(model.config, num_slots, dtype=model.dtype, device=device)


def error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"residual_in_fp32": False, "tie_word_embeddings": False},
        {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3, "state_size": 5},
        {"intermediate_size": 40, "time_step_rank": 7, "layer_norm_epsilon": 1e-2, "hidden_act": "swish"},
    ],
    ids=["plain", "untied", "biases", "odd sizes"],
)
def test_logits_and_hidden_states_equal_transformers(
    family: str, changes: dict[str, Any], tiny_model: Make, their_model: Theirs, tokens: Tokens
) -> None:
    model = tiny_model(family, **changes)
    input_ids = tokens(3, 33)
    ours = model(input_ids, output_hidden_states=True)
    theirs = their_model(model)(input_ids, output_hidden_states=True)
    assert theirs.logits.std() > 0.5
    assert ours.logits.dtype == torch.float32
    assert error(ours.logits, theirs.logits) <= TOLERANCE
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert error(a, b) <= TOLERANCE


def test_epsilon_of_the_inner_norm_counts(tiny_model: Make, their_model: Theirs, tokens: Tokens) -> None:
    model = tiny_model("falcon_mamba", mixer_rms_eps=0.5)
    usual = tiny_model("falcon_mamba")
    logits = model(tokens(1, 9)).logits
    assert error(logits, their_model(model)(tokens(1, 9)).logits) <= TOLERANCE
    assert error(logits, usual(tokens(1, 9)).logits) > 0.01


@pytest.mark.parametrize("side", ["left", "right", "inside", "scattered"])
def test_padding_anywhere_changes_no_answer(family: str, side: str, tiny_model: Make, tokens: Tokens) -> None:
    model = tiny_model(family)
    input_ids, mask = tokens(4, 20), torch.ones(4, 20, dtype=torch.int64)
    where = {
        "left": lambda row: slice(0, 3 * row),
        "right": lambda row: slice(20 - 3 * row, 20),
        "inside": lambda row: slice(4, 4 + 5 * row),
        "scattered": lambda row: slice(0, 20, row + 2),
    }[side]
    for row in range(1, 4):
        mask[row, where(row)] = 0
    output = model(input_ids, attention_mask=mask, output_hidden_states=True)
    for row in range(4):
        real = mask[row].bool()
        alone = model(input_ids[row : row + 1, real], output_hidden_states=True)
        assert error(output.logits[row, real], alone.logits[0]) <= 1e-5
        assert all(
            error(a[row, real], b[0]) <= 1e-5 for a, b in zip(output.hidden_states, alone.hidden_states, strict=True)
        )
        assert output.hidden_states[-1][row, ~real].count_nonzero() == 0


def test_padded_tokens_are_not_looked_at(tiny_model: Make, tokens: Tokens) -> None:
    model = tiny_model()
    embeds = model.get_input_embeddings()(tokens(2, 6)).clone()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1]])
    clean = model(inputs_embeds=embeds, attention_mask=mask).logits
    embeds[mask == 0] = float("nan")
    assert torch.equal(model(inputs_embeds=embeds, attention_mask=mask).logits, clean)


def test_left_padded_batch_equals_transformers_on_each_prompt_alone(
    family: str, tiny_model: Make, their_model: Theirs, tokens: Tokens
) -> None:
    model = tiny_model(family)
    theirs = their_model(model)
    input_ids, mask = tokens(3, 18), torch.ones(3, 18, dtype=torch.int64)
    mask[1, :7], mask[2, :17] = 0, 0
    logits = model(input_ids, attention_mask=mask).logits
    for row, padding in enumerate((0, 7, 17)):
        assert error(logits[row, padding:], theirs(input_ids[row : row + 1, padding:]).logits[0]) <= TOLERANCE


def test_rows_without_tokens_wait_unchanged(tiny_model: Make, tokens: Tokens) -> None:
    model, input_ids = tiny_model(), tokens(3, 12)
    whole = model(input_ids).logits
    cache = new_cache(model, 3)
    model(input_ids[:, :5], past_key_values=cache)
    states = cache.export(1)
    waiting = torch.tensor([[1] * 7, [0] * 7, [1] * 7])
    logits = model(input_ids[:, 5:], attention_mask=waiting, past_key_values=cache).logits
    assert error(logits[[0, 2]], whole[[0, 2], 5:]) <= 1e-5
    assert logits[1].count_nonzero() == 0
    assert torch.equal(cache.export(1).conv, states.conv)
    assert torch.equal(cache.export(1).ssm, states.ssm)
    nobody = model(input_ids, attention_mask=torch.zeros(3, 12), past_key_values=cache).logits
    assert nobody.shape == (3, 12, 97)
    assert nobody.count_nonzero() == 0


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_an_empty_batch_has_empty_logits(shape: tuple[int, int], tiny_model: Make, tokens: Tokens) -> None:
    model = tiny_model()
    assert model(tokens(*shape)).logits.shape == (*shape, 97)


@pytest.mark.parametrize("chunks", [[1, 1, 1, 20], [2, 21], [10, 1, 12], [23], [1] * 23], ids=str)
def test_chunks_with_a_carried_cache_equal_the_whole(
    family: str, chunks: list[int], tiny_model: Make, tokens: Tokens
) -> None:
    model, input_ids = tiny_model(family), tokens(2, 23)
    whole, cache, logits = model(input_ids).logits, None, []
    for chunk in input_ids.split(chunks, dim=1):
        output = model(chunk, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    assert error(torch.cat(logits, dim=1), whole) <= 1e-5
    assert cache.get_seq_length() == 23


def test_a_mask_as_wide_as_everything_seen_means_its_last_columns(tiny_model: Make, tokens: Tokens) -> None:
    model, input_ids = tiny_model(), tokens(2, 10)
    mask = torch.tensor([[1] * 10, [0] * 4 + [1] * 6])
    whole = model(input_ids, attention_mask=mask).logits
    cache = new_cache(model, 2)
    model(input_ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
    logits = model(input_ids[:, 6:], attention_mask=mask, past_key_values=cache).logits
    assert error(logits, whole[:, 6:]) <= 1e-5


def test_packed_equals_alone_and_leaves_other_slots_alone(family: str, tiny_model: Make, tokens: Tokens) -> None:
    model, cache = tiny_model(family), None
    lengths, slots = [1, 9, 0, 4, 17], torch.tensor([7, 2, 5, 0, 3])
    cache = new_cache(model, 9)
    cache.conv.normal_()
    cache.ssm.normal_()
    cache.zero(slots)
    untouched = {slot: cache.export(slot) for slot in (1, 4, 6, 8)}
    rows = [tokens(1, length, seed)[0] for seed, length in enumerate(lengths)]
    hidden = model.forward_packed(torch.cat(rows), Packing.from_lengths(lengths, slots), cache)
    assert hidden.shape == (31, 32)
    for row, slot, part in zip(rows, slots.tolist(), hidden.split(lengths), strict=True):
        if len(row) == 0:
            assert cache.ssm[:, slot].count_nonzero() == 0
            continue
        alone_cache = new_cache(model, 1)
        alone = model(row[None], past_key_values=alone_cache)
        assert error(model.compute_logits(part), alone.logits[0]) <= 1e-5
        assert error(cache.export(slot).ssm, alone_cache.export(0).ssm) <= 1e-5
        assert error(cache.export(slot).conv, alone_cache.export(0).conv) <= 1e-5
    for slot, before in untouched.items():
        assert torch.equal(cache.export(slot).conv, before.conv)
        assert torch.equal(cache.export(slot).ssm, before.ssm)


def test_wanted_tokens_alone_come_out_and_all_advance_the_states(tiny_model: Make, tokens: Tokens) -> None:
    model = tiny_model()
    whole, some = new_cache(model, 3), new_cache(model, 3)
    packing = Packing.from_lengths([5, 0, 8], torch.tensor([2, 0, 1]))
    row, wanted = tokens(1, 13)[0], torch.tensor([4, 0, 12, 12])
    hidden = model.forward_packed(row, packing, whole)
    assert error(model.forward_packed(row, packing, some, wanted), hidden[wanted]) <= 1e-5
    assert torch.equal(some.ssm, whole.ssm)
    assert torch.equal(some.conv, whole.conv)
    # and of a step
    packing, column = Packing.step(torch.tensor([2, 1])), row[:2]
    hidden = model.forward_packed(column, packing, whole)
    assert error(model.forward_packed(column, packing, some, torch.tensor([1])), hidden[1:]) <= 1e-5
    assert error(some.ssm, whole.ssm) <= 1e-5


def test_packed_without_a_cache_starts_every_row_from_zero(tiny_model: Make, tokens: Tokens) -> None:
    model = tiny_model()
    rows = [tokens(1, 5)[0], tokens(1, 8, 2)[0]]
    packing = Packing.from_lengths([5, 8], torch.tensor([40, 11]))
    hidden = model.forward_packed(torch.cat(rows), packing, None)
    again = model.forward_packed(torch.cat(rows), packing, None)
    assert torch.equal(hidden, again)
    assert error(model.compute_logits(hidden[5:]), model(rows[1][None]).logits[0]) <= 1e-5


def test_a_step_equals_a_scan_of_one(family: str, tiny_model: Make, tokens: Tokens) -> None:
    model, slots = tiny_model(family), torch.tensor([3, 1])
    packing = Packing.step(slots)
    assert packing.is_step
    stepping, scanning = new_cache(model, 4), new_cache(model, 4)
    for column in tokens(2, 6).T:
        stepped = model.forward_packed(column, packing, stepping)
        with torch.enable_grad():  # the step ops have no gradient, so the scan runs instead
            scanned = model.forward_packed(column, packing, scanning)
        assert scanned.requires_grad
        assert error(stepped, scanned.detach()) <= 1e-5
    assert error(stepping.ssm, scanning.ssm) <= 1e-5
    assert error(stepping.conv, scanning.conv) <= 1e-5


def test_embeddings_may_be_given_instead_of_ids(tiny_model: Make, tokens: Tokens) -> None:
    model, input_ids = tiny_model(), tokens(2, 7)
    embeds = model.get_input_embeddings()(input_ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(input_ids).logits)
    for arguments in ({}, {"input_ids": input_ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**arguments)


def test_logits_to_keep(tiny_model: Make, tokens: Tokens) -> None:
    model, input_ids = tiny_model(), tokens(2, 7)
    whole = model(input_ids).logits
    assert error(model(input_ids, logits_to_keep=1).logits, whole[:, -1:]) <= 1e-5
    assert error(model(input_ids, logits_to_keep=3).logits, whole[:, -3:]) <= 1e-5
    assert error(model(input_ids, logits_to_keep=torch.tensor([0, 4])).logits, whole[:, [0, 4]]) <= 1e-5
    each = model(input_ids, logits_to_keep=torch.tensor([[6], [2]])).logits
    assert error(each, torch.stack([whole[0, 6:], whole[1, 2:3]])) <= 1e-5


def test_low_precision_keeps_residual_states_and_logits_in_fp32(tiny_model: Make, tokens: Tokens) -> None:
    full = tiny_model()
    low = tiny_model().to(torch.bfloat16)
    output = low(tokens(2, 12), output_hidden_states=True, use_cache=True)
    assert output.logits.dtype == torch.float32
    assert output.hidden_states[0].dtype == torch.float32
    assert output.hidden_states[-1].dtype == torch.bfloat16
    assert (output.cache_params.conv.dtype, output.cache_params.ssm.dtype) == (torch.bfloat16, torch.float32)
    exact = full(tokens(2, 12)).logits
    assert (output.logits - exact).square().mean().sqrt() < 0.05 * exact.std()


def test_caches_are_returned_when_wanted(tiny_model: Make, tokens: Tokens) -> None:
    model, input_ids = tiny_model(), tokens(2, 3)
    assert isinstance(model(input_ids).past_key_values, MambaCache)
    assert model(input_ids, use_cache=False).past_key_values is None
    assert model.train()(input_ids).past_key_values is None
    output = model.eval()(input_ids)
    assert output.cache_params is output.past_key_values
    as_tuple = model(input_ids, return_dict=False)
    assert torch.equal(as_tuple[0], output.logits)
    assert isinstance(as_tuple[1], MambaCache)


def test_arguments_that_cannot_be_meant_are_refused(tiny_model: Make, tokens: Tokens) -> None:
    model, input_ids = tiny_model(), tokens(2, 3)
    ours, another = new_cache(model, 2), new_cache(model, 2)
    with pytest.raises(ValueError, match="past_key_values and cache_params"):
        model(input_ids, past_key_values=ours, cache_params=another)
    with pytest.raises(ValueError, match="holds 3 rows, the batch has 2"):
        model(input_ids, past_key_values=new_cache(model, 3))
    with pytest.raises(ValueError, match="must be a MambaCache, got tuple"):
        model(input_ids, past_key_values=(1, 2))
    with pytest.raises(ValueError, match="attention_mask must have shape"):
        model(input_ids, attention_mask=torch.ones(2, 2))
    with pytest.raises(ValueError, match="attention_mask must have shape"):
        model(input_ids, attention_mask=torch.ones(2, 1, 3, 3))
    with pytest.raises(ValueError, match="labels must have shape"):
        model(input_ids, labels=input_ids[:, 1:])
    with pytest.raises(TypeError, match="unexpected arguments: seq_idx"):
        model(input_ids, seq_idx=input_ids)
    assert (
        error(
            model(input_ids, cache_params=ours, past_key_values=ours).logits,
            model(input_ids, cache_params=another).logits,
        )
        == 0
    )


def test_the_kept_A_is_never_stale(tiny_model: Make, tokens: Tokens) -> None:
    model, other, input_ids = tiny_model(), tiny_model(seed=5), tokens(1, 6)
    mixer = model.backbone.layers[0].mixer
    model(input_ids)
    assert mixer.A() is mixer.A()

    model.load_state_dict(other.state_dict())
    assert torch.equal(model(input_ids).logits, other(input_ids).logits)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(mixer.A(), -torch.exp(mixer.A_log))

    mixer.A_log.data = other.backbone.layers[1].mixer.A_log.data.clone()
    assert torch.equal(mixer.A(), -torch.exp(mixer.A_log))
    model.train()
    mixer.A_log.data.mul_(0.5)
    model.eval()
    assert torch.equal(mixer.A(), -torch.exp(mixer.A_log))
    model.double()
    assert mixer.A().dtype == torch.float32
    assert torch.equal(mixer.A(), -torch.exp(mixer.A_log.float()))


def test_the_kept_A_is_not_part_of_the_model(tiny_model: Make, tokens: Tokens) -> None:
    model = tiny_model()
    names = set(model.state_dict())
    model(tokens(1, 3))
    assert set(model.state_dict()) == names
    assert {name.removeprefix("backbone.layers.0.mixer.") for name in names if ".0.mixer." in name} == {
        "A_log", "D", "conv1d.weight", "conv1d.bias", "in_proj.weight", "x_proj.weight",
        "dt_proj.weight", "dt_proj.bias", "out_proj.weight",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("family", "sizes", "num_parameters"),
    [
        ("mamba", {"hidden_size": 768, "num_hidden_layers": 24}, 129_135_360),
        ("mamba", {"hidden_size": 2560, "num_hidden_layers": 64}, 2_768_345_600),
        (
            "falcon_mamba",
            {
                "hidden_size": 4096,
                "num_hidden_layers": 64,
                "expand": 16,
                "intermediate_size": 8192,
                "vocab_size": 65024,
                "tie_word_embeddings": False,
            },
            7_272_665_088,
        ),
    ],
    ids=["mamba-130m", "mamba-2.8b", "falcon-mamba-7b"],
)
def test_published_models_have_their_published_sizes(family: str, sizes: dict[str, Any], num_parameters: int) -> None:
    config = {"mamba": MambaConfig, "falcon_mamba": FalconMambaConfig}[family](**sizes)
    with torch.device("meta"):
        model = MambaForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


def test_embeddings_can_be_resized(tiny_model: Make, tokens: Tokens) -> None:
    model, input_ids = tiny_model(), tokens(1, 5)
    before = model(input_ids).logits
    model.resize_token_embeddings(100, mean_resizing=False)
    after = model(input_ids).logits
    assert after.shape == (1, 5, 100)
    assert error(after[..., :97], before) <= 1e-5
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.vocab_size == 100


def test_a_copy_does_not_share_anything(tiny_model: Make, tokens: Tokens) -> None:
    model, input_ids = tiny_model(), tokens(1, 5)
    before = model(input_ids).logits
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.zero_()
    assert torch.equal(model(input_ids).logits, before)
    assert twin(input_ids).logits.count_nonzero() == 0


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_order_of_packed_chunks_equals_whole_sequences(data: st.DataObject) -> None:
    """Three sequences in shuffled slots, fed in calls that take any number of tokens from any of them."""
    with torch.no_grad():
        model = _model_of_the_property_test()
        lengths = data.draw(st.lists(st.integers(1, 12), min_size=3, max_size=3))
        slots = data.draw(st.permutations(range(4)))[:3]
        rows = [torch.randint(0, 97, (length,)) for length in lengths]
        cache, fed = new_cache(model, 4), [0, 0, 0]
        outputs: list[list[Tensor]] = [[], [], []]
        while any(done < length for done, length in zip(fed, lengths, strict=True)):
            takes = [data.draw(st.integers(0, length - done)) for done, length in zip(fed, lengths, strict=True)]
            if not any(takes):
                takes = [min(1, length - done) for done, length in zip(fed, lengths, strict=True)]
            order = data.draw(st.permutations([row for row in range(3) if takes[row] or row % 2]))
            parts = [rows[row][fed[row] : fed[row] + takes[row]] for row in order]
            packing = Packing.from_lengths([len(part) for part in parts], torch.tensor([slots[row] for row in order]))
            hidden = model.forward_packed(torch.cat(parts), packing, cache)
            for row, piece in zip(order, hidden.split([len(part) for part in parts]), strict=True):
                outputs[row].append(piece)
                fed[row] += len(piece)
        for row, pieces in zip(rows, outputs, strict=True):
            assert error(model.compute_logits(torch.cat(pieces)), model(row[None]).logits[0]) <= 1e-5


def _model_of_the_property_test() -> MambaForCausalLM:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, state_size=4)
    return MambaForCausalLM(config).eval()


@pytest.mark.gpu
@pytest.mark.parametrize("is_padded", [False, True])
def test_a_gpu_gives_the_logits_of_a_cpu(family: str, is_padded: bool, tiny_model: Make, tokens: Tokens) -> None:
    model, input_ids = tiny_model(family), tokens(3, 70)
    mask = torch.ones(3, 70, dtype=torch.int64)
    if is_padded:
        mask[1, :30], mask[2, 5:60:3] = 0, 0
    expected = model(input_ids, attention_mask=mask, output_hidden_states=True)
    model, input_ids, mask = model.cuda(), input_ids.cuda(), mask.cuda()
    whole = model(input_ids, attention_mask=mask, output_hidden_states=True)
    assert error(whole.logits.cpu(), expected.logits) <= TOLERANCE
    for a, b in zip(whole.hidden_states, expected.hidden_states, strict=True):
        assert error(a.cpu(), b) <= TOLERANCE
    cache, logits = new_cache(model, 3, "cuda"), []
    for begin, end in ((0, 33), (33, 34), (34, 70)):
        part = model(input_ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
        logits.append(part.logits.cpu())
    assert error(torch.cat(logits, dim=1), expected.logits) <= TOLERANCE


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_without_padding_nothing_waits_for_the_gpu(family: str, tiny_model: Make, tokens: Tokens) -> None:
    model, input_ids = tiny_model(family).cuda(), tokens(2, 9).cuda()
    model(input_ids, labels=input_ids)
    model(input_ids[:, :1])
    try:
        torch.cuda.set_sync_debug_mode("error")
        output = model(input_ids, labels=input_ids)
        model(input_ids[:, :1], past_key_values=output.past_key_values)
    finally:
        torch.cuda.set_sync_debug_mode("default")
