"""From the name of a model to a local directory."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from mamba_core.checkpoints.errors import CheckpointNotFound, HubUnavailable

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SAFE_FILES = ["*.json", "model*.safetensors", "*.jinja", "merges.txt", "tokenizer.model"]
_PICKLES = ["pytorch_model*.bin"]


def resolve(model: str, revision: str | None = None) -> Path:
    """The directory of ``model``: a directory, or a hub id whose files are downloaded unless they are in the cache.

    An existing directory never touches the network. Pickles are downloaded only where there are no safetensors.
    Raises CheckpointNotFound or HubUnavailable.
    """
    path = Path(os.path.expanduser(model))
    if model and path.is_dir():
        return path
    if path.is_file():
        raise CheckpointNotFound(f"{model!r} is a file: give the directory it is in")
    if not _HUB_ID.fullmatch(model):
        raise CheckpointNotFound(f"there is no directory {model!r}")
    directory = _download(model, revision, _SAFE_FILES)
    if not any(directory.glob("model*.safetensors")):
        directory = _download(model, revision, _SAFE_FILES + _PICKLES)
    return directory


def _download(model: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise CheckpointNotFound(f"{model!r} is gated on the hub: log in with an account that may read it") from error
    except RepositoryNotFoundError as error:
        raise CheckpointNotFound(
            f"{model!r} is neither a directory here nor a model on the hub that this account may read"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointNotFound(f"{model!r} has no revision {revision!r} on the hub") from error
    except Exception as error:  # what a failing network raises depends on the hub client's transport
        raise HubUnavailable(
            f"{model!r} is no directory here and cannot be fetched from the hub ({type(error).__name__})"
        ) from error
