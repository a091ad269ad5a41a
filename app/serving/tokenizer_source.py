"""From the name of a tokenizer to a local directory: many a Mamba checkpoint comes without one of its own."""

from __future__ import annotations

from pathlib import Path

from app.serving.tokenizer import TokenizerError

_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"]
_FILES += ["chat_template.jinja", "chat_template.json"]


def find_tokenizer(name: str) -> Path:
    """The directory of ``name``: a directory, or a hub id whose tokenizer is downloaded unless it is in the cache.

    An existing directory never touches the network. Raises TokenizerError.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    # costs a third of a second, which a server with a tokenizer of its own does not spend
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except Exception as error:  # what a failing network raises depends on the hub client's transport
        raise TokenizerError(
            f"--tokenizer {name!r} is no directory here and cannot be fetched from the hub ({type(error).__name__})"
        ) from error
