"""``generate()`` gives the tokens transformers' own classes give, with our cache flowing through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_core import MambaCache, MambaForCausalLM

Make = Callable[..., MambaForCausalLM]
Theirs = Callable[[MambaForCausalLM], torch.nn.Module]
Tokens = Callable[..., Tensor]

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}


def spread(model: MambaForCausalLM) -> MambaForCausalLM:
    """The model with logits so far apart that no two are nearly equal."""
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    return model


def test_200_greedy_tokens_equal_transformers(
    family: str, tiny_model: Make, their_model: Theirs, tokens: Tokens
) -> None:
    model = spread(tiny_model(family, tie_word_embeddings=False))
    ours = model.generate(tokens(2, 9), max_new_tokens=200, **GREEDY)
    theirs = their_model(model).generate(tokens(2, 9), max_new_tokens=200, **GREEDY)
    assert ours.shape == (2, 209)
    assert len(ours[0].unique()) > 5
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_padded_prompts_generate_what_each_alone_does(family: str, side: str, tiny_model: Make, tokens: Tokens) -> None:
    model = spread(tiny_model(family, tie_word_embeddings=False))
    input_ids, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.int64)
    for row, padding in enumerate((0, 5, 11)):
        begin = {"left": 0, "right": 12 - padding, "inside": 1}[side]
        mask[row, begin : begin + padding] = 0
    together = model.generate(input_ids, attention_mask=mask, max_new_tokens=30, **GREEDY)
    for row in range(3):
        prompt = input_ids[row : row + 1, mask[row].bool()]
        alone = model.generate(prompt, max_new_tokens=30, **GREEDY)
        assert torch.equal(together[row, 12:], alone[0, prompt.shape[1] :])


def test_decoding_feeds_one_column_and_no_mask(
    tiny_model: Make, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = tiny_model(), []
    forward = model.backbone.forward

    def spy(input_ids: Tensor, **kwargs: Any) -> Any:
        seen.append((input_ids.shape[1], kwargs["attention_mask"] is None))
        return forward(input_ids, **kwargs)

    monkeypatch.setattr(model.backbone, "forward", spy)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    model.generate(tokens(1, 7), attention_mask=mask, max_new_tokens=4, **GREEDY)
    assert seen == [(7, False), (1, True), (1, True), (1, True)]


def test_beam_search_equals_transformers(family: str, tiny_model: Make, their_model: Theirs, tokens: Tokens) -> None:
    model = spread(tiny_model(family, tie_word_embeddings=False))
    arguments = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 12} | GREEDY
    ours = model.generate(tokens(2, 6), **arguments)
    assert ours.shape == (4, 18)
    # without a cache, because older versions of transformers do not reorder theirs between beams
    assert torch.equal(ours, their_model(model).generate(tokens(2, 6), use_cache=False, **arguments))


@pytest.mark.parametrize("name", ["past_key_values", "cache_params"])
def test_a_conversation_goes_on_from_its_cache(name: str, tiny_model: Make, tokens: Tokens) -> None:
    model = spread(tiny_model(tie_word_embeddings=False))
    cache = MambaCache.from_config(model.config, 1, dtype=model.dtype)
    first = model.generate(tokens(1, 8), max_new_tokens=5, **{name: cache}, **GREEDY)
    assert cache.get_seq_length() == 12
    second = torch.cat([first, tokens(1, 4, seed=9)], dim=1)
    went_on = model.generate(second, max_new_tokens=10, **{name: cache}, **GREEDY)
    assert torch.equal(went_on, model.generate(second, max_new_tokens=10, **GREEDY))


def test_prefill_in_chunks(tiny_model: Make, tokens: Tokens) -> None:
    model = spread(tiny_model(tie_word_embeddings=False))
    input_ids, mask = tokens(2, 11), torch.ones(2, 11, dtype=torch.int64)
    mask[1, 2:6] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 8} | GREEDY
    cache = MambaCache.from_config(model.config, 2, dtype=model.dtype)
    chunked = model.generate(input_ids, past_key_values=cache, prefill_chunk_size=4, **arguments)
    assert torch.equal(chunked, model.generate(input_ids, **arguments))


def test_without_a_cache_the_tokens_are_the_same(tiny_model: Make, tokens: Tokens) -> None:
    model = spread(tiny_model(tie_word_embeddings=False))
    arguments = {"max_new_tokens": 12} | GREEDY
    without = model.generate(tokens(2, 5), use_cache=False, **arguments)
    assert torch.equal(without, model.generate(tokens(2, 5), **arguments))


def test_generation_from_embeddings(tiny_model: Make, tokens: Tokens) -> None:
    model = spread(tiny_model(tie_word_embeddings=False))
    embeds = model.get_input_embeddings()(tokens(2, 5))
    from_embeds = model.generate(inputs_embeds=embeds, max_new_tokens=12, **GREEDY)
    assert torch.equal(from_embeds, model.generate(tokens(2, 5), max_new_tokens=12, **GREEDY)[:, 5:])


def test_sampling_and_the_returned_cache(tiny_model: Make, tokens: Tokens) -> None:
    model = tiny_model()
    torch.manual_seed(3)
    output = model.generate(
        tokens(1, 5), do_sample=True, num_return_sequences=3, max_new_tokens=6, return_dict_in_generate=True,
        eos_token_id=None,
    )  # fmt: skip
    assert output.sequences.shape == (3, 11)
    assert output.past_key_values.num_slots == 3
    assert output.past_key_values.get_seq_length() == 10


def test_assisted_generation_is_refused(tiny_model: Make, tokens: Tokens) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="stateful"):
        model.generate(tokens(1, 5), assistant_model=tiny_model(seed=2), max_new_tokens=4, **GREEDY)
