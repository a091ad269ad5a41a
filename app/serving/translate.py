"""From a checked body to what the engine is asked: text becomes tokens, every refusal names its field."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import cast

from app.engine.request import GenerationRequest, ModelInfo, SamplingParams
from app.schemas.completions import CompletionRequest, StreamOptions
from app.serving.detokenizer import make_detokenizer
from app.serving.errors import ContextLengthExceeded, InvalidRequest
from app.serving.limits import ServingLimits
from app.serving.prepared import PreparedCompletion, PreparedPrompt
from app.serving.tokenizer import Tokenizer
from app.serving.unsupported import refuse_unsupported

GREEDY_BELOW = 1e-5


def split_prompts(body: CompletionRequest) -> list[str | list[int]]:
    """The prompts of a request in one form. The schema has seen to it that there is one and that none is empty."""
    if isinstance(body.prompt, list) and not isinstance(body.prompt[0], int):
        return cast("list[str | list[int]]", body.prompt)
    return [body.prompt]


def num_sequences(body: CompletionRequest) -> int:
    """Rows of the engine that a request would take; known before anything is tokenized."""
    return len(split_prompts(body)) * body.n


class Translator:
    """Turns bodies into prepared completions for one model."""

    def __init__(self, tokenizer: Tokenizer, limits: ServingLimits) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._numbers = itertools.count()

    def translate(
        self, body: CompletionRequest, info: ModelInfo, *, model: str, fingerprint: str, request_id: str
    ) -> PreparedCompletion:
        """Raises InvalidRequest and its kin."""
        started = time.monotonic()
        self._check(body, info)
        options = body.stream_options or StreamOptions()
        return PreparedCompletion(
            id=f"cmpl-{request_id}",
            request_id=request_id,
            model=model,
            system_fingerprint=fingerprint,
            created=int(time.time()),
            started=started,
            prompts=self._prompts(body, info, request_id),
            n=body.n,
            logprobs=body.logprobs,
            stops=tuple(body.stop),
            end_of_text_ids=frozenset(info.eos_token_ids) - frozenset(body.stop_token_ids),
            is_stop_included=body.include_stop_str_in_output,
            is_special_skipped=body.skip_special_tokens,
            is_stream=body.stream,
            has_usage_chunk=options.include_usage,
            has_continuous_usage=options.include_usage and options.continuous_usage_stats,
        )

    def _check(self, body: CompletionRequest, info: ModelInfo) -> None:
        refuse_unsupported(body.model_extra, body.n)
        num_prompts = len(split_prompts(body))
        if num_prompts > self._limits.max_prompts:
            raise InvalidRequest(f"'prompt' should hold at most {self._limits.max_prompts} prompts", param="prompt")
        # the continuations of a prompt start together, each in a slot of its own
        max_n = min(self._limits.max_n, info.max_num_seqs)
        if body.n > max_n:
            raise InvalidRequest(f"'n' should be at most {max_n}", param="n")
        _check_ids(body.stop_token_ids, info.vocab_size, "stop_token_ids")
        _check_ids(body.logit_bias, info.vocab_size, "logit_bias")

    def _prompts(self, body: CompletionRequest, info: ModelInfo, request_id: str) -> tuple[PreparedPrompt, ...]:
        prompts = split_prompts(body)
        all_ids = [self._token_ids(prompt, body.add_special_tokens) for prompt in prompts]
        for ids in all_ids:
            _check_ids(ids, info.vocab_size, "prompt")
            self._check_length(len(ids), self._max_tokens(body, len(ids)))
        self._check_prompt_logprobs(body, sum(map(len, all_ids)))
        # two clients may send the same request id; the engine must not take one request for the other
        unique_id = f"{request_id}-{next(self._numbers)}"
        stop_ids = tuple(dict.fromkeys([*body.stop_token_ids, *(() if body.ignore_eos else info.eos_token_ids)]))
        return tuple(
            self._prompt(body, prompt, self._request(body, f"{unique_id}-{i}", ids, stop_ids, info.vocab_size))
            for i, (prompt, ids) in enumerate(zip(prompts, all_ids, strict=True))
        )

    def _token_ids(self, prompt: str | list[int], add_special_tokens: bool) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        ids = self._tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        if not ids:
            raise InvalidRequest("'prompt' holds no token", param="prompt")
        return ids

    def _max_tokens(self, body: CompletionRequest, num_prompt_tokens: int) -> int:
        """What was asked for; a default that nobody asked for gives way to the limit."""
        limit = self._limits.max_model_len
        if limit is None or "max_tokens" in body.model_fields_set:
            return body.max_tokens
        return max(1, min(body.max_tokens, limit - num_prompt_tokens))

    def _check_length(self, num_prompt_tokens: int, max_tokens: int) -> None:
        limit = self._limits.max_model_len
        if limit is not None and num_prompt_tokens + max_tokens > limit:
            raise ContextLengthExceeded(
                f"at most {limit} tokens are allowed, but {num_prompt_tokens + max_tokens} were requested: "
                f"{num_prompt_tokens} of the prompt and {max_tokens} of 'max_tokens'",
                param="prompt" if num_prompt_tokens >= limit else "max_tokens",
            )

    def _check_prompt_logprobs(self, body: CompletionRequest, num_prompt_tokens: int) -> None:
        if not body.echo or body.logprobs is None:
            return
        wanted = num_prompt_tokens * (body.logprobs + 1) * body.n
        if wanted > self._limits.max_prompt_logprobs:
            raise InvalidRequest(
                f"'echo' with 'logprobs' {body.logprobs} over {num_prompt_tokens} prompt tokens asks for {wanted} "
                f"numbers; at most {self._limits.max_prompt_logprobs} are allowed",
                param="logprobs",
            )

    def _request(
        self, body: CompletionRequest, request_id: str, ids: Sequence[int], stop_ids: tuple[int, ...], vocab_size: int
    ) -> GenerationRequest:
        prompt_logprobs = body.logprobs if body.echo else None
        if body.max_tokens == 0 and prompt_logprobs is None:
            # the engine knows no request without output, except to score a prompt
            prompt_logprobs = 0
        return GenerationRequest(
            request_id=request_id,
            prompt_token_ids=tuple(ids),
            sampling=_sampling(body, vocab_size),
            max_tokens=self._max_tokens(body, len(ids)),
            stop_token_ids=stop_ids,
            n=body.n,
            prompt_logprobs=prompt_logprobs,
        )

    def _prompt(self, body: CompletionRequest, prompt: str | list[int], request: GenerationRequest) -> PreparedPrompt:
        if not body.echo:
            return PreparedPrompt(request)
        needs_pieces = body.logprobs is not None or not isinstance(prompt, str)
        pieces = self._pieces(request.prompt_token_ids, body.skip_special_tokens) if needs_pieces else []
        text = prompt if isinstance(prompt, str) else "".join(pieces)
        if body.logprobs is None:
            return PreparedPrompt(request, text)
        starts = [0, *accumulate(map(len, pieces))][:-1]
        # a tokenizer that rewrites its input may decode to more than it was given
        return PreparedPrompt(request, text, tuple(min(start, len(text)) for start in starts))

    def _pieces(self, ids: Sequence[int], skip_special_tokens: bool) -> list[str]:
        detokenizer = make_detokenizer(self._tokenizer, (), skip_special_tokens=skip_special_tokens)
        return [detokenizer.push(token) for token in ids]


def _check_ids(ids: Iterable[int], vocab_size: int, param: str) -> None:
    largest = max(ids, default=0)
    if largest >= vocab_size:
        raise InvalidRequest(
            f"'{param}' holds token id {largest}; the vocabulary ends at {vocab_size - 1}", param=param
        )


def _sampling(body: CompletionRequest, vocab_size: int) -> SamplingParams:
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
        logprobs=body.logprobs,
    )
