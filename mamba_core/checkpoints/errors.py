"""What can be wrong with a checkpoint. Messages are one line for the operator and name files, not directories."""

from __future__ import annotations


class CheckpointError(Exception):
    """Root of the tree.

    CheckpointError
      CheckpointNotFound   neither a directory nor a model on the hub
      HubUnavailable       the hub does not answer and its cache does not have the model
      InvalidConfig        config.json or generation_config.json is missing, unreadable or makes no sense
      UnsupportedModel     a model of another kind: Mamba-2, LayerNorm, attention layers, quantized weights ...
      InvalidWeights       weights are missing, damaged, unsafe, or not those of the model config.json describes
    """


class CheckpointNotFound(CheckpointError):
    """Neither a directory nor a model on the hub."""


class HubUnavailable(CheckpointError):
    """The hub does not answer and its cache does not have the model."""


class InvalidConfig(CheckpointError):
    """A configuration file is missing, unreadable or makes no sense."""


class UnsupportedModel(CheckpointError):
    """A model of another kind."""


class InvalidWeights(CheckpointError):
    """The weights are missing, damaged, unsafe, or not those of the model config.json describes."""
