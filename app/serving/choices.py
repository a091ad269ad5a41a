"""One choice of a completion while its tokens come."""

from __future__ import annotations

from collections import deque

from app.engine.request import FinishReason, PromptLogprobsEvent, TokenEvent
from app.serving.detokenizer import make_detokenizer
from app.serving.logprobs import LogprobEntry
from app.serving.prepared import PreparedCompletion, PreparedPrompt
from app.serving.stops import StopMatcher
from app.serving.tokenizer import Tokenizer


class Choice:
    """Text, log-probabilities and end of one sample.

    index: prompt number x n + sample number. num_tokens: generated so far. finish_reason: "stop", "length" or None.
    stop_reason: the stop string or the client's stop token id that ended it.
    """

    __slots__ = (
        "_decoded",
        "_detokenizer",
        "_entries",
        "_given",
        "_matcher",
        "_prepared",
        "_prompt",
        "_texts",
        "finish_reason",
        "index",
        "num_tokens",
        "stop_reason",
    )

    def __init__(self, index: int, prepared: PreparedCompletion, prompt: PreparedPrompt, tokenizer: Tokenizer) -> None:
        self.index = index
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._prepared = prepared
        self._prompt = prompt
        self._detokenizer = make_detokenizer(
            tokenizer, prompt.request.prompt_token_ids, skip_special_tokens=prepared.is_special_skipped
        )
        self._matcher = StopMatcher(prepared.stops, include_in_output=prepared.is_stop_included)
        self._texts = [prompt.echo_text] if prompt.echo_text else []
        # characters decoded and let out; between the two lies what may become a stop string
        self._decoded = self._given = len(prompt.echo_text)
        self._entries: deque[LogprobEntry] = deque()
        if prompt.echo_offsets:
            self._entries.append(LogprobEntry(prompt.request.prompt_token_ids[0], 0, None))

    def add_prompt_logprobs(self, event: PromptLogprobsEvent) -> None:
        """Log-probabilities of some echoed tokens."""
        ids, offsets = self._prompt.request.prompt_token_ids, self._prompt.echo_offsets
        if offsets:
            for position, logprobs in enumerate(event.logprobs, event.start):
                self._entries.append(LogprobEntry(ids[position], offsets[position], logprobs))

    def add_token(self, event: TokenEvent) -> bool:
        """Take one event in. True when a stop string ended the choice and the engine does not know of it yet."""
        if event.token_id is not None:
            self._decode(event, event.token_id)
        if event.finish_reason is not None and self._matcher.matched is None:
            self._let_out(self._detokenizer.flush())
        if self._matcher.matched is not None:
            self.finish_reason, self.stop_reason = "stop", self._matcher.matched
            return event.finish_reason is None
        if event.finish_reason is not None:
            self._finish(event)
        return False

    def take(self) -> tuple[str, list[LogprobEntry], int]:
        """What came since the last call and may be let out: text, entries, and where the text now ends.

        An entry waits until the text of its token has begun to be let out, so that its offset is final.
        """
        text = "".join(self._texts)
        self._texts.clear()
        entries = []
        while self._entries and (self.finish_reason is not None or self._entries[0].offset < self._given):
            entries.append(self._entries.popleft())
        return text, entries, self._given

    def _decode(self, event: TokenEvent, token_id: int) -> None:
        self.num_tokens += 1
        # only stop tokens end a sequence with this reason
        is_cut = event.finish_reason is FinishReason.STOP and not self._prepared.is_stop_included
        offset = self._decoded
        if not is_cut:
            self._let_out(self._detokenizer.push(token_id))
        if self._prepared.logprobs is not None:
            self._entries.append(LogprobEntry(token_id, offset, event.logprobs))

    def _let_out(self, piece: str) -> None:
        if piece:
            self._decoded += len(piece)
            self._append(self._matcher.push(piece))

    def _append(self, text: str) -> None:
        if text:
            self._given += len(text)
            self._texts.append(text)

    def _finish(self, event: TokenEvent) -> None:
        self._append(self._matcher.flush())
        if event.finish_reason is FinishReason.STOP:
            self.finish_reason = "stop"
            is_end_of_text = event.stop_reason in self._prepared.end_of_text_ids
            self.stop_reason = None if is_end_of_text else event.stop_reason
        else:
            self.finish_reason = "length"
