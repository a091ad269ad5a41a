"""Published Mamba checkpoints: find them, check them before anything is loaded, load them.

Four layouts are understood: transformers' ``mamba`` and ``falcon_mamba``, the paper's own files, and
flash-linear-attention's.
"""

from __future__ import annotations

from mamba_core.checkpoints.errors import (
    CheckpointError,
    CheckpointNotFound,
    HubUnavailable,
    InvalidConfig,
    InvalidWeights,
    UnsupportedModel,
)
from mamba_core.checkpoints.hub import resolve
from mamba_core.checkpoints.inspection import CheckpointInfo, inspect
from mamba_core.checkpoints.layouts import Layout, eos_token_ids
from mamba_core.checkpoints.loading import load

__all__ = [
    "CheckpointError",
    "CheckpointInfo",
    "CheckpointNotFound",
    "HubUnavailable",
    "InvalidConfig",
    "InvalidWeights",
    "Layout",
    "UnsupportedModel",
    "eos_token_ids",
    "inspect",
    "load",
    "resolve",
]
