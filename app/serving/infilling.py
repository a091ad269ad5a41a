"""Text between a prompt and a suffix, by models whose tokenizer has tokens for that (Bavarian et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from app.engine.request import ModelInfo
from app.serving.errors import InvalidRequest
from app.serving.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class _Markers:
    """How a family of tokenizers spells them. ``middle`` is None where what is asked for follows the prompt, and the
    suffix comes first. end: what ends the middle, beside end-of-text.
    """

    prefix: str
    suffix: str
    middle: str | None
    end: str | None = None


_FAMILIES = (
    _Markers("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    _Markers("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    _Markers("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    _Markers("<|fim▁begin|>", "<|fim▁hole|>", "<|fim▁end|>"),
    _Markers("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    _Markers("<PRE>", "<SUF>", "<MID>", "<EOT>"),
    _Markers("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"),
    _Markers("<|prefix|>", "<|suffix|>", "<|middle|>"),
    # Codestral
    _Markers("[PREFIX]", "[SUFFIX]", None),
)


@dataclass(frozen=True, slots=True)
class Infilling:
    """The marker tokens of one tokenizer. end: ids that end the middle, beside end-of-text."""

    prefix: int
    suffix: int
    middle: int | None
    end: tuple[int, ...]

    def arrange(self, prompt: list[int], suffix: list[int]) -> list[int]:
        """Tokens after which a model writes what belongs between the two."""
        if self.middle is None:
            return [self.suffix, *suffix, self.prefix, *prompt]
        return [self.prefix, *prompt, self.suffix, *suffix, self.middle]


def find_infilling(tokenizer: Tokenizer) -> Infilling | None:
    """The markers of a tokenizer; None if it has none that are known."""
    for markers in _FAMILIES:
        prefix, suffix = tokenizer.find_added(markers.prefix), tokenizer.find_added(markers.suffix)
        middle = tokenizer.find_added(markers.middle) if markers.middle is not None else None
        if prefix is None or suffix is None or (markers.middle is not None and middle is None):
            continue
        end = tokenizer.find_added(markers.end) if markers.end is not None else None
        return Infilling(prefix, suffix, middle, () if end is None else (end,))
    return None


class Infiller:
    """Makes prompts of prompt and suffix with the tokens of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._infilling = find_infilling(tokenizer)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end the middle, beside end-of-text."""
        return self._infilling.end if self._infilling is not None else ()

    def encode(self, prompt: str, suffix: str, info: ModelInfo, *, add_special_tokens: bool) -> list[int]:
        """Tokens of a prompt with a suffix. Raises InvalidRequest where the tokenizer has no tokens for that."""
        if self._infilling is None:
            raise InvalidRequest(
                "'suffix' is not supported: the model's tokenizer has no tokens to fill in the middle", param="suffix"
            )
        encode = self._tokenizer.encode
        first = encode("", add_special_tokens=True)[:1] if add_special_tokens else []
        ids = (encode(text, add_special_tokens=False) for text in (prompt, suffix))
        return [*(token for token in first if token == info.bos_token_id), *self._infilling.arrange(*ids)]
