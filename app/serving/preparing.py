"""What all kinds of requests have in common on their way to the engine."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from app.engine.request import GenerationRequest, Grammar, ModelInfo, SamplingParams
from app.schemas.generation import GenerationFields
from app.serving.bad_words import bad_word_ids
from app.serving.errors import ContextLengthExceeded, InvalidRequest
from app.serving.grammars import GrammarChecker
from app.serving.limits import ServingLimits
from app.serving.output_format import grammar_of
from app.serving.tokenizer import Tokenizer

GREEDY_BELOW = 1e-5


@dataclass(frozen=True, slots=True)
class Target:
    """The model that a request is for: its description, the name that was asked for, and a fingerprint."""

    info: ModelInfo
    model: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Demands:
    """What a request forbids its outputs, in the engine's words."""

    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: Grammar | None = None


class Preparation:
    """Checks and engine requests for bodies of any kind; one per server, for all threads."""

    def __init__(self, limits: ServingLimits, tokenizer: Tokenizer) -> None:
        self.limits = limits
        self._tokenizer = tokenizer
        self._grammars = GrammarChecker()
        self._numbers = itertools.count()

    def check(self, body: GenerationFields, info: ModelInfo) -> None:
        """Raises InvalidRequest for what only the model or the operator makes wrong."""
        self.check_samples(body.n, info, "n")
        check_ids(body.stop_token_ids, info.vocab_size, "stop_token_ids")
        check_ids(body.logit_bias, info.vocab_size, "logit_bias")
        check_ids(body.allowed_token_ids or (), info.vocab_size, "allowed_token_ids")

    def check_samples(self, num_samples: int, info: ModelInfo, param: str) -> None:
        """Raises InvalidRequest for more samples of a prompt than there may be."""
        # they start together, each in a slot of its own
        limit = min(self.limits.max_n, info.max_num_seqs)
        if num_samples > limit:
            raise InvalidRequest(f"'{param}' should be at most {limit}", param=param)

    def truncate(self, body: GenerationFields, ids: Sequence[int], max_tokens: int) -> Sequence[int]:
        """The part of a prompt that the client wants to keep, beside at most ``max_tokens`` of output."""
        num_kept = body.truncate_prompt_tokens
        if num_kept == -1:
            limit = self.limits.max_model_len
            num_kept = None if limit is None else max(1, limit - max_tokens)
        return ids if num_kept is None else ids[-num_kept:]

    def check_prompt_logprobs(self, num_top: int | None, num_prompt_tokens: int, n: int, param: str) -> None:
        """Raises InvalidRequest for more log-probabilities of prompts in one answer than it may hold."""
        if num_top is None:
            return
        wanted = num_prompt_tokens * (num_top + 1) * n
        if wanted > self.limits.max_prompt_logprobs:
            raise InvalidRequest(
                f"'{param}' {num_top} over {num_prompt_tokens} prompt tokens asks for {wanted} numbers; "
                f"at most {self.limits.max_prompt_logprobs} are allowed in an answer that is not streamed",
                param=param,
            )

    def check_length(self, num_prompt_tokens: int, max_tokens: int, max_tokens_name: str = "max_tokens") -> None:
        """Raises ContextLengthExceeded."""
        limit = self.limits.max_model_len
        if limit is not None and num_prompt_tokens + max_tokens > limit:
            # clients that read messages and no codes know these words, LangChain among them
            cause = "the prompt is too long: " if num_prompt_tokens >= limit else ""
            raise ContextLengthExceeded(
                f"{cause}at most {limit} tokens are allowed, but {num_prompt_tokens + max_tokens} were requested: "
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

    def demands(self, body: GenerationFields, grammar: Grammar | None = None) -> Demands:
        """What holds for the outputs of all prompts of a request; ``grammar`` is one that its tools make.

        Blocks for up to half a second where there is a grammar. Raises InvalidRequest.
        """
        param = "tools"
        if grammar is None and (found := grammar_of(body)) is not None:
            grammar, param = found
        if grammar is not None:
            if not self._tokenizer.has_file:
                raise InvalidRequest(
                    "the model's tokenizer has no tokenizer.json, which structured output needs", param=param
                )
            self._grammars.check(grammar, param)
        return Demands(bad_word_ids(self._tokenizer, body.bad_words), grammar)

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
        n: int | None = None,
        grammar: Grammar | None = None,
        demands: Demands | None = None,
    ) -> GenerationRequest:
        """What the engine is asked for one prompt. Raises InvalidRequest.

        prompt_logprobs: beside those that the body asks for. n: samples, where they are not those of the body.
        grammar: one that its tools make. demands: what ``demands`` has given for this body, if it was asked.
        """
        if body.min_tokens > max_tokens:
            raise InvalidRequest(
                f"'min_tokens' should be at most the number of tokens that may be generated, {max_tokens}",
                param="min_tokens",
            )
        demands = demands or self.demands(body, grammar)
        nums_top = [each for each in (prompt_logprobs, body.prompt_logprobs) if each is not None]
        stop_ids = [*body.stop_token_ids, *(() if body.ignore_eos else info.eos_token_ids)]
        return GenerationRequest(
            request_id=unique_id,
            prompt_token_ids=tuple(ids),
            sampling=_sampling(body, info.vocab_size, logprobs, demands),
            max_tokens=max_tokens,
            stop_token_ids=tuple(dict.fromkeys(stop_ids)),
            n=body.n if n is None else n,
            prompt_logprobs=max(nums_top, default=None),
            priority=body.priority,
        )


def check_ids(ids: Iterable[int], vocab_size: int, param: str) -> None:
    """Raises InvalidRequest for ids outside the vocabulary."""
    largest = max(ids, default=0)
    if largest >= vocab_size:
        raise InvalidRequest(
            f"'{param}' holds token id {largest}; the vocabulary ends at {vocab_size - 1}", param=param
        )


def _sampling(body: GenerationFields, vocab_size: int, logprobs: int | None, demands: Demands) -> SamplingParams:
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
        min_tokens=body.min_tokens,
        allowed_token_ids=None if body.allowed_token_ids is None else tuple(dict.fromkeys(body.allowed_token_ids)),
        bad_words=demands.bad_words,
        grammar=demands.grammar,
    )
