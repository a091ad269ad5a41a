"""What all kinds of requests have in common on their way to the engine."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from app.engine.request import GenerationRequest, ModelInfo, SamplingParams
from app.schemas.generation import GenerationFields
from app.serving.errors import ContextLengthExceeded, InvalidRequest
from app.serving.limits import ServingLimits

GREEDY_BELOW = 1e-5


@dataclass(frozen=True, slots=True)
class Target:
    """The model that a request is for: its description, the name that was asked for, and a fingerprint."""

    info: ModelInfo
    model: str
    fingerprint: str


class Preparation:
    """Checks and engine requests for bodies of any kind; one per server, for all threads."""

    def __init__(self, limits: ServingLimits) -> None:
        self.limits = limits
        self._numbers = itertools.count()

    def check(self, body: GenerationFields, info: ModelInfo) -> None:
        """Raises InvalidRequest for what only the model or the operator makes wrong."""
        # the continuations of a prompt start together, each in a slot of its own
        max_n = min(self.limits.max_n, info.max_num_seqs)
        if body.n > max_n:
            raise InvalidRequest(f"'n' should be at most {max_n}", param="n")
        check_ids(body.stop_token_ids, info.vocab_size, "stop_token_ids")
        check_ids(body.logit_bias, info.vocab_size, "logit_bias")

    def check_length(self, num_prompt_tokens: int, max_tokens: int, max_tokens_name: str = "max_tokens") -> None:
        """Raises ContextLengthExceeded."""
        limit = self.limits.max_model_len
        if limit is not None and num_prompt_tokens + max_tokens > limit:
            raise ContextLengthExceeded(
                f"at most {limit} tokens are allowed, but {num_prompt_tokens + max_tokens} were requested: "
                f"{num_prompt_tokens} of the prompt and {max_tokens} of '{max_tokens_name}'",
                param="prompt" if num_prompt_tokens >= limit else max_tokens_name,
            )

    def default_max_tokens(self, default: int, num_prompt_tokens: int) -> int:
        """A number that nobody asked for gives way to the limit."""
        limit = self.limits.max_model_len
        return default if limit is None else max(1, min(default, limit - num_prompt_tokens))

    def unique_id(self, request_id: str) -> str:
        """Two clients may send the same request id; the engine must not take one request for the other."""
        return f"{request_id}-{next(self._numbers)}"

    def engine_request(
        self,
        body: GenerationFields,
        info: ModelInfo,
        unique_id: str,
        ids: Sequence[int],
        *,
        max_tokens: int,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> GenerationRequest:
        """What the engine is asked for one prompt."""
        stop_ids = [*body.stop_token_ids, *(() if body.ignore_eos else info.eos_token_ids)]
        return GenerationRequest(
            request_id=unique_id,
            prompt_token_ids=tuple(ids),
            sampling=_sampling(body, info.vocab_size, logprobs),
            max_tokens=max_tokens,
            stop_token_ids=tuple(dict.fromkeys(stop_ids)),
            n=body.n,
            prompt_logprobs=prompt_logprobs,
        )


def check_ids(ids: Iterable[int], vocab_size: int, param: str) -> None:
    """Raises InvalidRequest for ids outside the vocabulary."""
    largest = max(ids, default=0)
    if largest >= vocab_size:
        raise InvalidRequest(
            f"'{param}' holds token id {largest}; the vocabulary ends at {vocab_size - 1}", param=param
        )


def _sampling(body: GenerationFields, vocab_size: int, logprobs: int | None) -> SamplingParams:
    return SamplingParams(
        temperature=0.0 if body.temperature < GREEDY_BELOW else body.temperature,
        top_k=0 if body.top_k <= 0 or body.top_k >= vocab_size else body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=tuple(body.logit_bias.items()),
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        logprobs=logprobs,
    )
