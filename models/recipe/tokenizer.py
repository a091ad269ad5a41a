"""A byte-level BPE tokenizer for Python: exact on any text, indentation in one token, tokens never span a line end.

A token that began before a prompt's end cannot be completed by a model, so what users stop at stays a boundary:
line ends and indentations are tokens of their own, and punctuation is not glued to the name behind it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from models.recipe.corpus import Documents

END_OF_TEXT = "<|endoftext|>"
FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX = "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX, IM_START, IM_END)
END_OF_TEXT_ID, FIM_PREFIX_ID, FIM_MIDDLE_ID, FIM_SUFFIX_ID = range(4)

MAX_TOKEN_CHARS = 32

_PIECES = "|".join(
    (
        r"\r?\n",
        r"(?<![^\n])[ \t]+",  # the indentation of a line, whole
        r" ?_*\p{L}+",
        r" ?\p{N}",  # digits one by one
        r" ?[^\s\p{L}\p{N}_]+",
        r" ?_+",
        r"[^\S\n]+(?!\S)",  # inner and trailing space, less the one that belongs to the next word
        r"\s",
    )
)


def new_tokenizer() -> Tokenizer:
    """The untrained tokenizer: how text is cut into pieces, and how tokens become text again."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(documents: Documents, vocab_size: int, sample_bytes: int, seed: int) -> Tokenizer:
    """Train on whole documents drawn at random up to ``sample_bytes``; special tokens get the first ids."""
    tokenizer = new_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_TOKEN_CHARS,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(documents, sample_bytes, seed), trainer)
    return tokenizer


def _sample(documents: Documents, sample_bytes: int, seed: int) -> Iterator[str]:
    taken = 0
    for index in np.random.default_rng(seed).permutation(len(documents)):
        if taken >= sample_bytes:
            return
        raw = documents[int(index)]
        taken += len(raw)
        yield raw.decode()


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer for documents: the special tokens' own spelling inside a document is ordinary text."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    return tokenizer


def save_tokenizer_files(tokenizer: Tokenizer, folder: Path) -> None:
    """Write what ``AutoTokenizer.from_pretrained(folder)`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    roles = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    extra = {"additional_special_tokens": list(SPECIAL_TOKENS[1:])}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
        **roles,
        **extra,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps({**roles, **extra}, indent=2) + "\n")
