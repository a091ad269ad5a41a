"""What one sample may draw next, given what it has drawn: on the host, a bit per token."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from app.engine.matchers import Matcher, MatchError, Words, num_words
from app.engine.request import FinishReason, GenerationRequest
from app.engine.sequence import Forced, Outlook, RowEnd

NOTHING_ALLOWED = "no token may follow: together, the request's rules forbid all of them"


@dataclass(frozen=True, slots=True)
class Rules:
    """What a request says of every token of its samples.

    allowed: what may follow whatever came before. stops: the stop tokens, which are forbidden at first. bad_words:
    those of several tokens. is_endless: whether there is more than ``min_tokens``. must_draw: whether no token is
    to be known before its step is done, since log-probabilities come with it or before it.
    """

    allowed: Words
    stops: Words
    min_tokens: int
    bad_words: tuple[tuple[int, ...], ...]
    prompt_tail: tuple[int, ...]
    is_endless: bool
    must_draw: bool

    @classmethod
    def of(cls, request: GenerationRequest, vocab_size: int, unwanted: Iterable[int] = ()) -> Rules:
        """The rules of a request; ``unwanted`` tokens never follow."""
        sampling = request.sampling
        single = [word[0] for word in sampling.bad_words if len(word) == 1]
        longer = tuple(word for word in sampling.bad_words if len(word) > 1)
        longest = max(map(len, longer), default=1)
        return cls(
            allowed=_words(sampling.allowed_token_ids, vocab_size) & ~_words([*single, *unwanted], vocab_size),
            stops=_words((token for token in request.stop_token_ids if 0 <= token < vocab_size), vocab_size),
            min_tokens=sampling.min_tokens,
            bad_words=longer,
            prompt_tail=request.prompt_token_ids[-(longest - 1) :] if longest > 1 else (),
            is_endless=sampling.allowed_token_ids is not None or bool(sampling.bad_words),
            must_draw=sampling.logprobs is not None or request.prompt_logprobs is not None,
        )


class Constraint:
    """One sample under the rules of its request, and under its grammar if it has one.

    When the grammar is complete and none of the request's stop tokens may end the sample, the sample ends there. Where
    the grammar forces several tokens, the sample keeps to them, whether they are drawn one by one or taken at once.
    """

    def __init__(self, rules: Rules, matcher: Matcher | None = None) -> None:
        self._rules = rules
        self._matcher = matcher
        self._output: list[int] = []
        # what the grammar forces next; the matcher stands behind it
        self._ahead: deque[int] = deque()
        self._is_broken = False

    @property
    def is_over(self) -> bool:
        """Whether every token may follow from now on."""
        return self._matcher is None and not self._rules.is_endless and len(self._output) >= self._rules.min_tokens

    @property
    def outlook(self) -> Outlook:
        """What is known, after a ``write``, of the tokens that follow whatever is drawn."""
        if self._matcher is None or self._is_broken or self._rules.must_draw:
            return Outlook(0, False)
        return Outlook(len(self._ahead), self._matcher.is_stopped)

    def restart(self, output: Sequence[int]) -> None:
        """Stand behind this output."""
        self._is_broken = False
        if list(output) == self._output:
            return
        self._output = []
        self._ahead.clear()
        if self._matcher is not None:
            self._matcher.restart()
        for token in output:
            # the same as when they were drawn
            self._look_ahead()
            self.accept(token)

    def accept(self, token: int) -> None:
        """Stand behind one more token; a negative one says that the sample is lost."""
        if token < 0:
            self._is_broken = True
            return
        self._output.append(token)
        if self._matcher is None:
            return
        if not self._ahead:
            self._matcher.accept(token)
        elif self._ahead.popleft() != token:
            self._ahead.clear()
            self._matcher.restart()
            for drawn in self._output:
                self._matcher.accept(drawn)

    def write(self, words: Words) -> RowEnd | None:
        """Set the bits [W] of the tokens that may follow. All are set where the sample ends instead, which is told."""
        end = None if self._is_broken else self._write(words)
        if end is not None or self._is_broken:
            words[:] = -1
        return end

    def run_ahead(self) -> Forced:
        """Stand behind all tokens that follow whatever is drawn."""
        tokens: list[int] = []
        words = np.empty_like(self._rules.allowed)
        while self._ahead and self._write(words) is None:
            tokens.append(self._ahead[0])
            self.accept(tokens[-1])
        if self._matcher is None or self._ahead or not self._matcher.is_stopped:
            return Forced(tuple(tokens))
        end = self._write(words)
        if end is None and (last := _only_bit(words)) is not None:
            tokens.append(last)
            self.accept(last)
        return Forced(tuple(tokens), end)

    def opening(self, most: int) -> tuple[int, ...]:
        """Up to ``most`` tokens with which every sample begins, none of which ends it; asked before anything else."""
        self._look_ahead()
        if not self.outlook.num_tokens:
            return ()
        tokens = self.run_ahead().tokens[: max(most, 0)]
        stops = self._rules.stops
        return tuple(takewhile(lambda token: not stops[token // 32] & _bit(token), tokens))

    def _look_ahead(self) -> None:
        if self._matcher is not None and not self._ahead:
            self._ahead.extend(self._matcher.force())

    def _write(self, words: Words) -> RowEnd | None:
        rules = self._rules
        np.copyto(words, rules.allowed)
        if self._matcher is not None:
            self._look_ahead()
            try:
                if self._ahead:
                    _keep_only(words, self._ahead[0])
                else:
                    words &= self._matcher.allowed()
            except MatchError as error:
                return RowEnd(FinishReason.INVALID, str(error))
        if len(self._output) < rules.min_tokens:
            words &= ~rules.stops
        for word in rules.bad_words:
            if self._ends_with(word[:-1]):
                words[word[-1] // 32] &= ~_bit(word[-1])
        if words.any():
            return None
        if self._matcher is not None and not self._ahead and self._matcher.is_complete:
            return RowEnd(FinishReason.STOP)
        return RowEnd(FinishReason.INVALID, NOTHING_ALLOWED)

    def _ends_with(self, tokens: tuple[int, ...]) -> bool:
        tail = self._output[-len(tokens) :]
        if missing := len(tokens) - len(tail):
            tail = [*self._rules.prompt_tail[-missing:], *tail]
        return tuple(tail) == tokens


def constraints_of(request: GenerationRequest, vocab_size: int, matcher: Matcher | None = None) -> list[Constraint]:
    """One for each sample of a request, or none where nothing is forbidden. ``matcher`` is used up."""
    sampling = request.sampling
    if matcher is not None:
        # an end of text that does not end the sample is no use to a grammar
        unwanted = [token for token in matcher.eos_token_ids if token not in request.stop_token_ids]
        rules = Rules.of(request, vocab_size, unwanted)
        return [Constraint(rules, matcher.copy()) for _ in range(request.n)]
    has_stops = sampling.min_tokens > 0 and request.stop_token_ids
    if not has_stops and sampling.allowed_token_ids is None and not sampling.bad_words:
        return []
    rules = Rules.of(request, vocab_size)
    return [Constraint(rules) for _ in range(request.n)]


def _words(tokens: Iterable[int] | None, vocab_size: int) -> Words:
    """The bits of these tokens, or of all."""
    bits = np.zeros(num_words(vocab_size) * 32, dtype=np.uint8)
    bits[slice(vocab_size) if tokens is None else list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def _bit(token: int) -> np.int32:
    return (np.uint32(1) << np.uint32(token % 32)).view(np.int32)


def _keep_only(words: Words, token: int) -> None:
    kept = words[token // 32] & _bit(token)
    words[:] = 0
    words[token // 32] = kept


def _only_bit(words: Words) -> int | None:
    """The token whose bit is set, if there is just one."""
    (places,) = words.nonzero()
    if len(places) != 1:
        return None
    word = int(words.view(np.uint32)[places[0]])
    return None if word & (word - 1) else int(places[0]) * 32 + word.bit_length() - 1
