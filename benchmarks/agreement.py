"""Whether two continuations of one prompt part only where plain fp32 holds both next tokens for all but equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.plain import PlainMamba
from mamba_core.modeling_mamba import MambaForCausalLM


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of all prompts. gaps: at each first difference, how much less likely than the likeliest token fp32 holds the
    worse of the two, in log-probability."""

    num_prompts: int
    num_equal_tokens: int
    num_distinct_tokens: int
    gaps: tuple[float, ...]

    def is_near(self, near_tie: float) -> bool:
        return all(gap <= near_tie for gap in self.gaps)

    def describe(self) -> dict[str, Any]:
        return {
            "prompts": self.num_prompts,
            "equal_to_the_end": self.num_prompts - len(self.gaps),
            "equal_tokens": self.num_equal_tokens,
            # a model that says one word for ever agrees with everything
            "distinct_tokens": self.num_distinct_tokens,
            "gaps": [round(gap, 5) for gap in self.gaps],
        }


def compare(
    model: MambaForCausalLM,
    prompts: Sequence[Sequence[int]],
    ours: Sequence[Sequence[int]],
    theirs: Sequence[Sequence[int]],
) -> Agreement:
    """Raises ValueError where two answers differ in length."""
    plain = PlainMamba(model)
    num_equal, gaps = 0, []
    for prompt, one, other in zip(prompts, ours, theirs, strict=True):
        position = first_difference(one, other)
        num_equal += len(one) if position is None else position
        if position is not None:
            logprobs = next_logprobs(plain, [*prompt, *one[:position]])
            gaps.append(float(logprobs.max() - logprobs[[one[position], other[position]]].min()))
    distinct = {token for answer in ours for token in answer}
    return Agreement(len(prompts), num_equal, len(distinct), tuple(gaps))


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    if len(one) != len(other):
        raise ValueError(f"one answer has {len(one)} tokens, the other {len(other)}")
    return next((index for index, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), None)


def next_logprobs(plain: PlainMamba, tokens: Sequence[int]) -> Tensor:
    """Of every token of the vocabulary [V], after ``tokens``."""
    hidden = plain.hidden(torch.tensor([list(tokens)]), plain.fresh_state(1))[0, -1]
    return plain.logits(hidden).log_softmax(-1)
