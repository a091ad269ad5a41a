"""From a checked body to what the engine is asked: text becomes tokens, every refusal names its field."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate
from typing import cast

from app.engine.request import GenerationRequest, ModelInfo
from app.schemas.completions import CompletionRequest
from app.schemas.generation import StreamOptions
from app.serving.detokenizer import make_detokenizer
from app.serving.errors import InvalidRequest
from app.serving.payloads import AnswerHead, CompletionForm
from app.serving.prepared import PreparedCompletion, PreparedPrompt
from app.serving.preparing import Preparation, Target, check_ids
from app.serving.tokenizer import Tokenizer
from app.serving.unsupported import refuse_unsupported


def split_prompts(body: CompletionRequest) -> list[str | list[int]]:
    """The prompts of a request in one form. The schema has seen to it that there is one and that none is empty."""
    if isinstance(body.prompt, list) and not isinstance(body.prompt[0], int):
        return cast("list[str | list[int]]", body.prompt)
    return [body.prompt]


def num_sequences(body: CompletionRequest) -> int:
    """Rows of the engine that a request would take; known before anything is tokenized."""
    return len(split_prompts(body)) * body.n


class Translator:
    """Turns bodies of ``/v1/completions`` into what is run."""

    def __init__(self, tokenizer: Tokenizer, preparation: Preparation) -> None:
        self._tokenizer = tokenizer
        self._preparation = preparation
        self._limits = preparation.limits

    def translate(self, body: CompletionRequest, target: Target, request_id: str) -> PreparedCompletion:
        """Raises InvalidRequest and its kin."""
        started = time.monotonic()
        info = target.info
        self._check(body, info)
        options = body.stream_options or StreamOptions()
        has_continuous_usage = options.include_usage and options.continuous_usage_stats
        form = CompletionForm(
            AnswerHead(f"cmpl-{request_id}", int(time.time()), target.model, target.fingerprint),
            self._tokenizer,
            num_choices=num_sequences(body),
            has_logprobs=body.logprobs is not None,
            has_usage_chunk=options.include_usage,
            has_continuous_usage=has_continuous_usage,
        )
        return PreparedCompletion(
            form=form,
            started=started,
            prompts=self._prompts(body, info, request_id),
            n=body.n,
            logprobs=body.logprobs,
            stops=tuple(body.stop),
            end_of_text_ids=frozenset(info.eos_token_ids) - frozenset(body.stop_token_ids),
            is_stop_included=body.include_stop_str_in_output,
            is_special_skipped=body.skip_special_tokens,
            is_stream=body.stream,
            has_continuous_usage=has_continuous_usage,
        )

    def _check(self, body: CompletionRequest, info: ModelInfo) -> None:
        refuse_unsupported(body.model_extra, body.n)
        num_prompts = len(split_prompts(body))
        if num_prompts > self._limits.max_prompts:
            raise InvalidRequest(f"'prompt' should hold at most {self._limits.max_prompts} prompts", param="prompt")
        self._preparation.check(body, info)

    def _prompts(self, body: CompletionRequest, info: ModelInfo, request_id: str) -> tuple[PreparedPrompt, ...]:
        prompts = split_prompts(body)
        all_ids = [self._token_ids(prompt, body.add_special_tokens) for prompt in prompts]
        for ids in all_ids:
            check_ids(ids, info.vocab_size, "prompt")
            self._preparation.check_length(len(ids), self._max_tokens(body, len(ids)))
        self._check_prompt_logprobs(body, sum(map(len, all_ids)))
        unique_id = self._preparation.unique_id(request_id)
        return tuple(
            self._prompt(body, prompt, self._request(body, info, f"{unique_id}-{i}", ids))
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
        if "max_tokens" in body.model_fields_set:
            return body.max_tokens
        return self._preparation.default_max_tokens(body.max_tokens, num_prompt_tokens)

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
        self, body: CompletionRequest, info: ModelInfo, unique_id: str, ids: Sequence[int]
    ) -> GenerationRequest:
        prompt_logprobs = body.logprobs if body.echo else None
        if body.max_tokens == 0 and prompt_logprobs is None:
            # the engine knows no request without output, except to score a prompt
            prompt_logprobs = 0
        return self._preparation.engine_request(
            body,
            info,
            unique_id,
            ids,
            max_tokens=self._max_tokens(body, len(ids)),
            logprobs=body.logprobs,
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
