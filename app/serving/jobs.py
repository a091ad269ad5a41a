"""A checked request on its way in: what is known of it before anything is tokenized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from app.schemas.completions import CompletionRequest
from app.serving.output_format import is_constrained
from app.serving.prepared import PreparedCompletion
from app.serving.preparing import Target
from app.serving.translate import Translator, num_sequences, split_prompts

_CHARACTERS_PER_TOKEN = 4
# preparing this many characters takes about a millisecond
_SHORT = 4096

FindTarget = Callable[[str | None], Target]


class Job(Protocol):
    """One request of any kind."""

    @property
    def num_sequences(self) -> int:
        """Rows of the engine that it takes."""

    @property
    def estimated_tokens(self) -> int:
        """Prompt tokens, known for ids and guessed for text."""

    @property
    def is_short(self) -> bool:
        """Whether preparing it takes so little that no thread is worth its while."""

    def prepare(self, request_id: str) -> PreparedCompletion:
        """Check and tokenize. Blocks in proportion to the prompts, asks nothing of the engine, may run in a thread.

        Raises RequestError: InvalidRequest, ModelNotFound, Unavailable while no model is loaded.
        """


@dataclass(frozen=True, slots=True)
class CompletionJob:
    """A ``Job`` of ``/v1/completions``."""

    body: CompletionRequest
    translator: Translator
    find_target: FindTarget

    @property
    def num_sequences(self) -> int:
        return num_sequences(self.body)

    @property
    def estimated_tokens(self) -> int:
        return sum(
            estimate_tokens(len(prompt)) if isinstance(prompt, str) else len(prompt)
            for prompt in split_prompts(self.body)
        )

    @property
    def is_short(self) -> bool:
        body = self.body
        if is_constrained(body):
            return False
        prompts = split_prompts(body)
        num_extra = len(body.suffix or "") * len(prompts) + sum(map(len, body.bad_words))
        return sum(map(len, prompts)) + num_extra <= _SHORT

    def prepare(self, request_id: str) -> PreparedCompletion:
        return self.translator.translate(self.body, self.find_target(self.body.model), request_id)


def estimate_tokens(num_characters: int) -> int:
    """A guess for text that is not tokenized yet."""
    return num_characters // _CHARACTERS_PER_TOKEN + 1
