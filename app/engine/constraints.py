"""What one sample may draw next, given what it has drawn: on the host, a bit per token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from app.engine.matchers import Matcher, MatchError, Words, num_words
from app.engine.request import FinishReason, GenerationRequest
from app.engine.sequence import RowEnd

NOTHING_ALLOWED = "no token may follow: together, the request's rules forbid all of them"


@dataclass(frozen=True, slots=True)
class Rules:
    """What a request says of every token of its samples.

    allowed: what may follow whatever came before. stops: the stop tokens, which are forbidden at first. bad_words:
    those of several tokens. is_endless: whether there is more than ``min_tokens``.
    """

    allowed: Words
    stops: Words
    min_tokens: int
    bad_words: tuple[tuple[int, ...], ...]
    prompt_tail: tuple[int, ...]
    is_endless: bool

    @classmethod
    def of(cls, request: GenerationRequest, vocab_size: int, unwanted: Iterable[int] = ()) -> Rules:
        """The rules of a request; ``unwanted`` tokens never follow."""
        sampling = request.sampling
        allowed_ids = range(vocab_size) if sampling.allowed_token_ids is None else sampling.allowed_token_ids
        single = [word[0] for word in sampling.bad_words if len(word) == 1]
        longer = tuple(word for word in sampling.bad_words if len(word) > 1)
        longest = max(map(len, longer), default=1)
        return cls(
            allowed=_words(allowed_ids, vocab_size) & ~_words([*single, *unwanted], vocab_size),
            stops=_words((token for token in request.stop_token_ids if 0 <= token < vocab_size), vocab_size),
            min_tokens=sampling.min_tokens,
            bad_words=longer,
            prompt_tail=request.prompt_token_ids[-(longest - 1) :] if longest > 1 else (),
            is_endless=sampling.allowed_token_ids is not None or bool(sampling.bad_words),
        )


class Constraint:
    """One sample under the rules of its request, and under its grammar if it has one.

    When the grammar is complete and none of the request's stop tokens may end the sample, the sample ends there.
    """

    def __init__(self, rules: Rules, matcher: Matcher | None = None) -> None:
        self._rules = rules
        self._matcher = matcher
        self._tail = list(rules.prompt_tail)
        self._num_tokens = 0
        self._is_broken = False

    @property
    def is_over(self) -> bool:
        """Whether every token may follow from now on."""
        return self._matcher is None and not self._rules.is_endless and self._num_tokens >= self._rules.min_tokens

    def restart(self, output: Sequence[int]) -> None:
        """Stand behind this output."""
        self._tail = [*self._rules.prompt_tail, *output]
        self._num_tokens = len(output)
        self._is_broken = False
        if self._matcher is not None:
            self._matcher.restart(output)

    def accept(self, token: int) -> None:
        """Stand behind one more token; a negative one says that the sample is lost."""
        if token < 0:
            self._is_broken = True
            return
        self._num_tokens += 1
        if self._rules.bad_words:
            self._tail.append(token)
        if self._matcher is not None:
            self._matcher.accept(token)

    def write(self, words: Words) -> RowEnd | None:
        """Set the bits [W] of the tokens that may follow. All are set where the sample ends instead, which is told."""
        end = None if self._is_broken else self._write(words)
        if end is not None or self._is_broken:
            words[:] = -1
        return end

    def _write(self, words: Words) -> RowEnd | None:
        rules = self._rules
        np.copyto(words, rules.allowed)
        if self._matcher is not None:
            try:
                words &= self._matcher.allowed()
            except MatchError as error:
                return RowEnd(FinishReason.ERROR, str(error))
        if self._num_tokens < rules.min_tokens:
            words &= ~rules.stops
        for word in rules.bad_words:
            if tuple(self._tail[1 - len(word) :]) == word[:-1]:
                words[word[-1] // 32] &= ~(np.uint32(1) << np.uint32(word[-1] % 32)).view(np.int32)
        if words.any():
            return None
        if self._matcher is not None and self._matcher.is_complete:
            return RowEnd(FinishReason.STOP)
        return RowEnd(FinishReason.ERROR, NOTHING_ALLOWED)


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


def _words(tokens: Iterable[int], vocab_size: int) -> Words:
    bits = np.zeros(num_words(vocab_size) * 32, dtype=np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)
