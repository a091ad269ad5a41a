"""A request that was checked and tokenized, ready to be run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from app.engine.request import GenerationRequest
from app.serving.forms import AnswerForm, LastWords


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """One prompt: what the engine is asked, and what each of its choices starts with.

    echo_text: the prompt's text, empty unless it is echoed. echo_offsets: where each prompt token starts in it, empty
    unless log-probabilities are echoed.
    """

    request: GenerationRequest
    echo_text: str = ""
    echo_offsets: Sequence[int] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_token_ids)


@dataclass(frozen=True, slots=True)
class PreparedCompletion:
    """Everything that running one request needs.

    form: how it is answered. started: ``time.monotonic`` when preparing began. logprobs: None or the number of
    alternatives. end_of_text_ids: stop tokens that are no ``stop_reason``. n: samples per prompt, of which the
    ``num_best`` likeliest are answered, or all. prompt_logprobs: None or the number of alternatives for the tokens of
    the prompt, told beside the choice. names_ids: log-probabilities name tokens by their ids. min_tokens: before so
    many nothing is a stop string. last_words: how a stream ends, None for the way of most.
    """

    form: AnswerForm
    started: float
    prompts: tuple[PreparedPrompt, ...]
    n: int
    logprobs: int | None
    stops: tuple[str, ...]
    end_of_text_ids: frozenset[int]
    is_stop_included: bool
    is_special_skipped: bool
    is_stream: bool
    has_continuous_usage: bool
    num_best: int | None = None
    prompt_logprobs: int | None = None
    has_token_ids: bool = False
    names_ids: bool = False
    min_tokens: int = 0
    max_waiting_bytes: int | None = None
    last_words: LastWords | None = None

    @property
    def num_sequences(self) -> int:
        """Rows of the engine that the request takes."""
        return len(self.prompts) * self.n

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(prompt.num_tokens for prompt in self.prompts)
