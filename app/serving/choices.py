"""One choice of a completion while its tokens come."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from app.engine.interface import EngineError
from app.engine.request import Event, FinishReason, PromptLogprobsEvent, TokenEvent
from app.serving.detokenizer import make_detokenizer
from app.serving.errors import ClientTooSlow, RequestError
from app.serving.failures import request_error, token_failure
from app.serving.forms import ChoicePart
from app.serving.logprobs import LogprobEntry, PromptScores
from app.serving.prepared import PreparedCompletion, PreparedPrompt
from app.serving.scores import PromptScorer
from app.serving.stops import LateMatcher, StopMatcher
from app.serving.tokenizer import Tokenizer


class Choice:
    """Text, log-probabilities and end of one sample, of which it is the engine's ``SampleSink``.

    What arrives only waits until ``take_in``; ``on_arrival`` is told when there was nothing before it.

    index: prompt number x n + sample number. num_tokens: generated so far. finish_reason: "stop", "length" or None.
    stop_reason: the stop string or the client's stop token id that ended it. failure: why it has no end.
    is_over: nothing that arrives changes it any more. is_cut: a stop string ended it, which the engine has to be told.
    """

    __slots__ = (
        "_arrived",
        "_decoded",
        "_detokenizer",
        "_entries",
        "_given",
        "_is_prompt_owed",
        "_matcher",
        "_on_arrival",
        "_prepared",
        "_prompt",
        "_prompt_scores",
        "_push",
        "_scorer",
        "_texts",
        "_token_ids",
        "_total_logprob",
        "_waiting_bytes",
        "failure",
        "finish_reason",
        "index",
        "is_cut",
        "is_over",
        "num_tokens",
        "stop_reason",
    )

    def __init__(
        self,
        index: int,
        prepared: PreparedCompletion,
        prompt: PreparedPrompt,
        tokenizer: Tokenizer,
        on_arrival: Callable[[Choice], None],
        scorer: PromptScorer | None = None,
    ) -> None:
        self.index = index
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.failure: RequestError | None = None
        self.is_over = False
        self.is_cut = False
        self._on_arrival = on_arrival
        self._arrived: list[int | Event | EngineError] = []
        self._prepared = prepared
        self._prompt = prompt
        self._detokenizer = make_detokenizer(
            tokenizer, prompt.request.prompt_token_ids, skip_special_tokens=prepared.is_special_skipped
        )
        self._push: Callable[[int], str] = self._detokenizer.push
        self._matcher: StopMatcher | LateMatcher | None = None
        if prepared.stops:
            self._matcher = StopMatcher(prepared.stops, include_in_output=prepared.is_stop_included)
            if prepared.min_tokens:
                self._matcher = LateMatcher(self._matcher)
                self._push = _waking(self._push, self._matcher, prepared.min_tokens)
        # those that have not been told yet
        self._token_ids: list[int] | None = None
        if prepared.has_token_ids:
            self._token_ids = []
            self._push = _recording(self._push, self._token_ids)
        self._is_prompt_owed = prepared.has_token_ids
        self._total_logprob = 0.0
        self._texts = [prompt.echo_text] if prompt.echo_text else []
        # characters decoded and let out; between the two lies what may become a stop string
        self._decoded = self._given = len(prompt.echo_text)
        self._entries: deque[LogprobEntry] = deque()
        self._scorer = scorer
        self._prompt_scores = [scorer.first] if scorer is not None else []
        self._waiting_bytes = 0

    @property
    def mean_logprob(self) -> float:
        """Of the tokens so far, where the engine tells them."""
        return self._total_logprob / max(1, self.num_tokens)

    def on_token(self, token_id: int) -> None:
        arrived = self._arrived
        if not arrived:
            self._on_arrival(self)
        arrived.append(token_id)

    def on_event(self, event: Event) -> None:
        if not self._arrived:
            self._on_arrival(self)
        self._arrived.append(event)

    def on_lost(self, error: EngineError) -> None:
        if not self._arrived:
            self._on_arrival(self)
        self._arrived.append(error)

    def take_in(self) -> None:
        """Make text of all that has arrived, up to the choice's end."""
        arrived = self._arrived
        for item in arrived:
            if self.is_over:
                break
            if isinstance(item, int):
                self.num_tokens += 1
                self._let_out(self._push(item))
            elif isinstance(item, TokenEvent):
                self._take_event(item)
            elif isinstance(item, PromptLogprobsEvent):
                self._take_prompt_logprobs(item)
            else:
                self._fail(request_error(item))
        arrived.clear()

    def take_text(self) -> str:
        """The text that came since the last call and may be let out."""
        texts = self._texts
        text = texts[0] if len(texts) == 1 else "".join(texts)
        texts.clear()
        return text

    def take(self) -> ChoicePart:
        """All that came since the last call and may be let out.

        An entry waits until the text of its token has begun to be let out, so that its offset is final.
        """
        entries = []
        while self._entries and (self.finish_reason is not None or self._entries[0].offset < self._given):
            entries.append(self._entries.popleft())
        return ChoicePart(
            self.index,
            self.take_text(),
            entries,
            self._given,
            self.finish_reason,
            self.stop_reason,
            self._take_scores(),
            *self._take_ids(),
        )

    def _take_scores(self) -> Sequence[PromptScores]:
        if not self._prompt_scores:
            return ()
        scores, self._prompt_scores, self._waiting_bytes = self._prompt_scores, [], 0
        return scores

    def _take_ids(self) -> tuple[list[int] | None, Sequence[int] | None]:
        """Ids of the output and, the first time, of the prompt."""
        if self._token_ids is None:
            return None, None
        ids, is_first = self._token_ids.copy(), self._is_prompt_owed
        self._token_ids.clear()
        self._is_prompt_owed = False
        return ids, self._prompt.request.prompt_token_ids if is_first else None

    def _take_prompt_logprobs(self, event: PromptLogprobsEvent) -> None:
        if self._scorer is None:
            return
        scores = self._scorer.take(event)
        self._prompt_scores.append(scores)
        self._waiting_bytes += sum(map(len, scores))
        limit = self._prepared.max_waiting_bytes
        if limit is not None and self._waiting_bytes > limit:
            self._fail(ClientTooSlow("the client reads more slowly than its prompt is scored"))

    def _take_event(self, event: TokenEvent) -> None:
        failure = token_failure(event)
        if failure is not None:
            self._fail(failure)
            return
        if event.token_id is not None:
            self._decode(event, event.token_id)
        if event.finish_reason is None:
            return
        if not self.is_over:
            self._let_out(self._detokenizer.flush())
        if self.is_over:
            # a stop string, but the engine has ended the sample already
            self.is_cut = False
        else:
            self._finish(event)

    def _decode(self, event: TokenEvent, token_id: int) -> None:
        self.num_tokens += 1
        # only stop tokens end a sequence with this reason
        is_hidden = event.finish_reason is FinishReason.STOP and not self._prepared.is_stop_included
        offset = self._decoded
        if not is_hidden:
            self._let_out(self._push(token_id))
        elif self._token_ids is not None:
            self._token_ids.append(token_id)
        if event.logprobs is not None:
            self._total_logprob += event.logprobs.logprob
        if self._prepared.logprobs is not None:
            self._entries.append(LogprobEntry(token_id, offset, event.logprobs))

    def _let_out(self, piece: str) -> None:
        if not piece:
            return
        self._decoded += len(piece)
        matcher = self._matcher
        if matcher is not None:
            piece = matcher.push(piece)
        self._given += len(piece)
        self._texts.append(piece)
        if matcher is not None and matcher.matched is not None:
            self.finish_reason, self.stop_reason = "stop", matcher.matched
            self.is_over = self.is_cut = True

    def _finish(self, event: TokenEvent) -> None:
        if self._matcher is not None:
            held = self._matcher.flush()
            self._given += len(held)
            self._texts.append(held)
        if event.finish_reason is FinishReason.STOP:
            self.finish_reason = "stop"
            is_end_of_text = event.stop_reason in self._prepared.end_of_text_ids
            self.stop_reason = None if is_end_of_text else event.stop_reason
        else:
            self.finish_reason = "length"
        self.is_over = True

    def _fail(self, failure: RequestError) -> None:
        self.failure = failure
        self.is_over = True


# functions instead of methods: a choice that refers to itself stays in memory for long
def _recording(push: Callable[[int], str], token_ids: list[int]) -> Callable[[int], str]:
    """Note each token that is pushed."""

    def record(token_id: int) -> str:
        token_ids.append(token_id)
        return push(token_id)

    return record


def _waking(push: Callable[[int], str], matcher: LateMatcher, min_tokens: int) -> Callable[[int], str]:
    """Let the matcher see the text of the tokens after the first ``min_tokens``."""
    num_pushed = 0

    def wake(token_id: int) -> str:
        nonlocal num_pushed
        num_pushed += 1
        matcher.is_awake = num_pushed > min_tokens
        return push(token_id)

    return wake
