"""The likeliest samples of each prompt, where more were generated than are answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from app.serving.choices import Choice
from app.serving.forms import ChoicePart


def best_parts(choices: Sequence[Choice], num_samples: int, num_best: int) -> list[ChoicePart]:
    """Of every ``num_samples`` choices, those of one prompt, the ``num_best`` with the highest log-probability per
    token, best first, and numbered as if there were no others.
    """
    best: list[Choice] = []
    for start in range(0, len(choices), num_samples):
        ranked = sorted(choices[start : start + num_samples], key=lambda choice: -choice.mean_logprob)
        best += ranked[:num_best]
    return [replace(choice.take(), index=index) for index, choice in enumerate(best)]
