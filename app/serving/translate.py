"""From a checked body to what the engine is asked: text becomes tokens, every refusal names its field."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from app.engine.request import GenerationRequest, ModelInfo
from app.schemas.completions import CompletionRequest
from app.schemas.generation import StreamOptions
from app.serving.detokenizer import make_detokenizer
from app.serving.errors import InvalidRequest
from app.serving.infilling import Infiller
from app.serving.logprobs import token_names
from app.serving.payloads import AnswerHead, CompletionForm
from app.serving.prepared import PreparedCompletion, PreparedPrompt
from app.serving.preparing import Demands, Preparation, Target, check_ids
from app.serving.tokenizer import Tokenizer
from app.serving.unsupported import refuse_unsupported


def split_prompts(body: CompletionRequest) -> list[str | list[int]]:
    """The prompts of a request in one form. The schema has seen to it that there is one and that none is empty."""
    if isinstance(body.prompt, list) and not isinstance(body.prompt[0], int):
        return cast("list[str | list[int]]", body.prompt)
    return [body.prompt]


def num_sequences(body: CompletionRequest) -> int:
    """Rows of the engine that a request would take; known before anything is tokenized."""
    return len(split_prompts(body)) * body.num_samples


class Translator:
    """Turns bodies of ``/v1/completions`` into what is run."""

    def __init__(self, tokenizer: Tokenizer, preparation: Preparation) -> None:
        self._tokenizer = tokenizer
        self._preparation = preparation
        self._limits = preparation.limits
        self._infiller = Infiller(tokenizer)

    def translate(self, body: CompletionRequest, target: Target, request_id: str) -> PreparedCompletion:
        """Raises InvalidRequest and its kin."""
        started = time.monotonic()
        info = target.info
        self._check(body, info)
        has_suffix = bool(body.suffix)
        options = body.stream_options or StreamOptions()
        has_continuous_usage = options.include_usage and options.continuous_usage_stats
        form = CompletionForm(
            AnswerHead(f"cmpl-{request_id}", int(time.time()), target.model, target.fingerprint),
            token_names(self._tokenizer, as_ids=body.return_tokens_as_token_ids),
            num_choices=len(split_prompts(body)) * body.n,
            has_logprobs=body.logprobs is not None,
            has_usage_chunk=options.include_usage,
            has_continuous_usage=has_continuous_usage,
            has_token_ids=body.return_token_ids,
        )
        end_ids = (*info.eos_token_ids, *(self._infiller.end_ids if has_suffix else ()))
        return PreparedCompletion(
            form=form,
            started=started,
            prompts=self._prompts(body, info, request_id),
            n=body.num_samples,
            logprobs=body.logprobs,
            stops=tuple(body.stop),
            end_of_text_ids=frozenset(end_ids) - frozenset(body.stop_token_ids),
            is_stop_included=body.include_stop_str_in_output,
            is_special_skipped=body.skip_special_tokens,
            is_stream=body.stream,
            has_continuous_usage=has_continuous_usage,
            num_best=body.n if body.num_samples > body.n else None,
            prompt_logprobs=body.prompt_logprobs,
            has_token_ids=body.return_token_ids,
            names_ids=body.return_tokens_as_token_ids,
            min_tokens=body.min_tokens,
            max_waiting_bytes=self._limits.max_waiting_bytes if body.stream else None,
        )

    def _check(self, body: CompletionRequest, info: ModelInfo) -> None:
        refuse_unsupported(body.model_extra)
        num_prompts = len(split_prompts(body))
        if num_prompts > self._limits.max_prompts:
            raise InvalidRequest(f"'prompt' should hold at most {self._limits.max_prompts} prompts", param="prompt")
        self._preparation.check(body, info)
        self._preparation.check_samples(body.num_samples, info, "best_of")

    def _prompts(self, body: CompletionRequest, info: ModelInfo, request_id: str) -> tuple[PreparedPrompt, ...]:
        prompts = split_prompts(body)
        all_ids = [self._token_ids(body, prompt, info) for prompt in prompts]
        for ids in all_ids:
            check_ids(ids, info.vocab_size, "prompt")
            self._preparation.check_length(len(ids), self._max_tokens(body, len(ids)))
        self._check_prompt_logprobs(body, sum(map(len, all_ids)))
        unique_id = self._preparation.unique_id(request_id)
        demands = self._preparation.demands(body)
        return tuple(
            self._prompt(body, prompt, self._request(body, info, f"{unique_id}-{i}", ids, demands))
            for i, (prompt, ids) in enumerate(zip(prompts, all_ids, strict=True))
        )

    def _token_ids(self, body: CompletionRequest, prompt: str | list[int], info: ModelInfo) -> Sequence[int]:
        ids = prompt if not isinstance(prompt, str) else self._encode(body, prompt, info)
        if not ids:
            raise InvalidRequest("'prompt' holds no token", param="prompt")
        return self._preparation.truncate(body, ids, body.max_tokens)

    def _encode(self, body: CompletionRequest, prompt: str, info: ModelInfo) -> list[int]:
        if body.suffix:
            return self._infiller.encode(prompt, body.suffix, info, add_special_tokens=body.add_special_tokens)
        return self._tokenizer.encode(prompt, add_special_tokens=body.add_special_tokens)

    def _max_tokens(self, body: CompletionRequest, num_prompt_tokens: int) -> int:
        if "max_tokens" in body.model_fields_set:
            return body.max_tokens
        return self._preparation.default_max_tokens(body.max_tokens, num_prompt_tokens)

    def _check_prompt_logprobs(self, body: CompletionRequest, num_prompt_tokens: int) -> None:
        # what a stream holds is bounded while it runs
        if body.stream:
            return
        if body.echo:
            self._preparation.check_prompt_logprobs(body.logprobs, num_prompt_tokens, body.n, "logprobs")
        self._preparation.check_prompt_logprobs(body.prompt_logprobs, num_prompt_tokens, body.n, "prompt_logprobs")

    def _request(
        self, body: CompletionRequest, info: ModelInfo, unique_id: str, ids: Sequence[int], demands: Demands
    ) -> GenerationRequest:
        prompt_logprobs = body.logprobs if body.echo else None
        if body.max_tokens == 0 and prompt_logprobs is None:
            # the engine knows no request without output, except to score a prompt
            prompt_logprobs = 0
        logprobs = body.logprobs
        if logprobs is None and body.num_samples > body.n:
            # the best samples are those whose tokens are likeliest
            logprobs = 0
        request = self._preparation.engine_request(
            body,
            info,
            unique_id,
            ids,
            max_tokens=self._max_tokens(body, len(ids)),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            n=body.num_samples,
            demands=demands,
        )
        if not body.suffix or body.ignore_eos:
            return request
        stop_ids = dict.fromkeys((*request.stop_token_ids, *self._infiller.end_ids))
        return replace(request, stop_token_ids=tuple(stop_ids))

    def _prompt(self, body: CompletionRequest, prompt: str | list[int], request: GenerationRequest) -> PreparedPrompt:
        if not body.echo:
            return PreparedPrompt(request)
        # a prompt that was cut is told as it was used
        text = prompt if isinstance(prompt, str) and body.truncate_prompt_tokens is None else None
        if text is not None and body.logprobs is None:
            return PreparedPrompt(request, text)
        pieces, starts = self._pieces(request.prompt_token_ids, body.skip_special_tokens)
        text = "".join(pieces) if text is None else text
        if body.logprobs is None:
            return PreparedPrompt(request, text)
        # a tokenizer that rewrites its input may decode to more than it was given
        if starts[-1] > len(text):
            starts = array("I", (min(start, len(text)) for start in starts))
        return PreparedPrompt(request, text, starts)

    def _pieces(self, ids: Sequence[int], skip_special_tokens: bool) -> tuple[list[str], array[int]]:
        """The text of each token that has any, and where each token starts."""
        push = make_detokenizer(self._tokenizer, (), skip_special_tokens=skip_special_tokens).push
        pieces, starts, end = [], array("I"), 0
        for token_id in ids:
            starts.append(end)
            piece = push(token_id)
            if piece:
                pieces.append(piece)
                end += len(piece)
        return pieces, starts
