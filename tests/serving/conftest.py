"""Small real tokenizers, trained when the tests start, and a service over a fake engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from app.serving.completions import CompletionService
from app.serving.limits import ServingLimits
from app.serving.tokenizer import Tokenizer
from tests.fakes import FakeEngine, make_info

EOS = "<|endoftext|>"
CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "def add(a, b):\n    return a + b\n\n\nclass Fox:\n    pass\n",
    "日本語の文章です。 Grüße aus Köln, señor! naïve café 👩‍👩‍👧 🙂 ÅÄÖ",
] * 20


def train_byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def make_byte_fallback() -> Backend:
    """A vocabulary in sentencepiece's way: words with a mark for the space before, other characters by bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz,.", "▁t", "▁th", "▁the", "▁d", "▁do", "▁dog"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "d"), ("▁d", "o"), ("▁do", "g")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return Tokenizer(train_byte_level())


@pytest.fixture(scope="session")
def byte_fallback() -> Tokenizer:
    return Tokenizer(make_byte_fallback())


@pytest.fixture
def engine(byte_level: Tokenizer) -> FakeEngine:
    return FakeEngine(make_info(byte_level.vocab_size, (0,)))


@pytest.fixture
def make_service(byte_level: Tokenizer, engine: FakeEngine) -> Callable[..., CompletionService]:
    def make(observer: Any = None, **limits: Any) -> CompletionService:
        return CompletionService(engine, byte_level, ["fox", "wolf"], ServingLimits(**limits), observer)

    return make


@pytest.fixture
def service(make_service: Callable[..., CompletionService]) -> CompletionService:
    return make_service()
