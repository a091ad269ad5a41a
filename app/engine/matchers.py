"""Where one output stands in its grammar, and which tokens may follow: llguidance over the model's tokenizer."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from app.engine.grammars import GrammarError, error_of, limits, to_lark
from app.engine.request import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

logger = logging.getLogger(__name__)

# compiled grammars that are kept for the next request
MAX_KEPT = 128

# tokens that are taken together at most, so that what runs beside them does not wait for long
MAX_FORCED = 64

Words = NDArray[np.int32]


class MatchError(Exception):
    """The library gave up: the grammar is too complex where the output stands. The message is for the client."""


def num_words(vocab_size: int) -> int:
    """Words that hold one bit per token, the lowest bit of the first word for token 0."""
    return (vocab_size + 31) // 32


class Matcher:
    """One output of a compiled grammar. Tokens go in as they are drawn, masks come out."""

    def __init__(self, grammar: Grammar, origin: LLMatcher, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self.eos_token_ids = eos_token_ids
        self._grammar = grammar
        # never moved: what has failed once does not work again
        self._origin = origin
        self._matcher = origin.deep_copy()
        self._num_words = num_words(vocab_size)
        # the tokenizer may know more tokens than the model, or fewer
        self._vocab_size = vocab_size
        self._num_consumed = 0

    def copy(self) -> Matcher:
        """Another output of the same grammar, at its start."""
        return Matcher(self._grammar, self._origin, self._vocab_size, self.eos_token_ids)

    def restart(self) -> None:
        """Stand at the start again."""
        if self._num_consumed:
            self._matcher = self._origin.deep_copy()
            self._num_consumed = 0

    def accept(self, token: int) -> None:
        """Stand behind one more token."""
        self._num_consumed += 1
        self._matcher.consume_token(token)

    def force(self) -> list[int]:
        """Stand behind the tokens that follow in any case, which are returned: none where there is a choice.

        They spell what must follow as the tokenizer would. Taken one by one, only the first would be the library's
        answer for sure: it may cut what is left in another way.
        """
        matcher = self._matcher
        if matcher.is_stopped():
            return []
        try:
            tokens = matcher.compute_ff_tokens()[:MAX_FORCED]
        except ValueError:
            # told by the next mask
            return []
        unknown = next((place for place, token in enumerate(tokens) if token >= self._vocab_size), len(tokens))
        del tokens[unknown:]
        if tokens:
            self._num_consumed += len(tokens)
            matcher.consume_tokens(tokens)
        return tokens

    @property
    def is_stopped(self) -> bool:
        """Whether nothing but the end may follow."""
        return self._matcher.is_stopped()

    @property
    def is_complete(self) -> bool:
        """Whether the output may end here."""
        return not self._matcher.is_error() and self._matcher.is_accepting()

    def allowed(self) -> Words:
        """The tokens that may follow, end-of-text among them where the output may end. Raises MatchError."""
        matcher = self._matcher
        try:
            mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        except ValueError:
            mask = b""
        if matcher.is_error():
            raise self._failure()
        words = np.zeros(max(self._num_words, len(mask) // 4), dtype=np.int32)
        words[: len(mask) // 4] = np.frombuffer(mask, dtype=np.int32)
        words = words[: self._num_words]
        if excess := self._num_words * 32 - self._vocab_size:
            words[-1:].view(np.uint32)[:] &= np.uint32(0xFFFFFFFF >> excess)
        return words

    def _failure(self) -> MatchError:
        return MatchError(str(error_of(self._grammar, self._matcher.get_error() or "no token continues it")))


class Compiler:
    """Makes matchers of grammars, over one tokenizer, which is read when the first grammar comes.

    tokenizer: the directory of ``tokenizer.json``, or a hub id in the cache. vocab_size: rows of logits, which may be
    more than the tokenizer has tokens. eos_token_ids: the model's ends of text; without any, the tokenizer's own. For
    one thread at a time.
    """

    def __init__(self, tokenizer: str | Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._source = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(token for token in eos_token_ids if 0 <= token < vocab_size)
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[Grammar, Matcher] = OrderedDict()

    def compile(self, grammar: Grammar) -> Matcher:
        """A matcher at the start of its output. Raises GrammarError."""
        found = self._kept.get(grammar)
        if found is None:
            found = self._kept[grammar] = self._compile(grammar)
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(grammar)
        return found.copy()

    def load(self) -> LLTokenizer:
        """Read the tokenizer unless that has been done. Raises GrammarError."""
        if self._tokenizer is None:
            self._tokenizer = self._read()
        return self._tokenizer

    def _compile(self, grammar: Grammar) -> Matcher:
        from llguidance import LLMatcher

        tokenizer = self.load()
        made = LLMatcher(tokenizer, to_lark(grammar), log_level=0, limits=limits())
        if made.is_error():
            raise error_of(grammar, made.get_error())
        matcher = Matcher(grammar, made, self._vocab_size, tuple(tokenizer.eos_tokens))
        try:
            is_empty = not matcher.allowed().any()
        except MatchError as error:
            raise GrammarError(str(error)) from None
        if is_empty and not matcher.is_complete:
            raise error_of(grammar, "no text follows it")
        return matcher

    def _read(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        path = _find(self._source)
        if path is None:
            raise GrammarError("structured output is not possible: the model's tokenizer has no tokenizer.json")
        text = path.read_text(encoding="utf-8")
        ends = list(self._eos_token_ids) or None
        try:
            try:
                return LLTokenizer(text, n_vocab=self._vocab_size, eos_token=ends)
            except ValueError as error:
                if "vocab size too small" not in str(error):
                    raise
                return LLTokenizer(text, eos_token=ends)
        except Exception as error:
            logger.warning("no structured output: the tokenizer cannot be used for it: %s", error)
            raise GrammarError("structured output is not possible with this model's tokenizer") from None


def _find(source: str | Path) -> Path | None:
    directory = Path(source).expanduser()
    if directory.is_dir():
        path = directory / "tokenizer.json"
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(str(source), "tokenizer.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
