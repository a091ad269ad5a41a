"""A tokenizer that can spell every text: one token for each byte, and one that ends a text."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

END = 0
VOCAB_SIZE = 257


def write_byte_tokenizer(directory: Path) -> Path:
    """Write ``tokenizer.json``; token 0 is ``<end>``."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({"<end>": END} | {letter: index for index, letter in enumerate(letters, 1)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    backend.save(str(directory / "tokenizer.json"))
    return directory
