"""Mamba, the model: configuration, modeling, state cache, checkpoints and the ops they are built from.

Importing this registers ``mamba`` and ``falcon_mamba`` with transformers' Auto classes, so that published checkpoints
load as the classes here. transformers' own stay importable by module.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from mamba_core.cache import MambaCache, StateSnapshot
from mamba_core.configuration_mamba import FalconMambaConfig, MambaConfig
from mamba_core.modeling_mamba import FalconMambaForCausalLM, FalconMambaModel, MambaForCausalLM, MambaModel

__all__ = [
    "FalconMambaConfig",
    "FalconMambaForCausalLM",
    "FalconMambaModel",
    "MambaCache",
    "MambaConfig",
    "MambaForCausalLM",
    "MambaModel",
    "StateSnapshot",
]

AutoConfig.register("mamba", MambaConfig, exist_ok=True)
AutoModel.register(MambaConfig, MambaModel, exist_ok=True)
AutoModelForCausalLM.register(MambaConfig, MambaForCausalLM, exist_ok=True)
AutoConfig.register("falcon_mamba", FalconMambaConfig, exist_ok=True)
AutoModel.register(FalconMambaConfig, FalconMambaModel, exist_ok=True)
AutoModelForCausalLM.register(FalconMambaConfig, FalconMambaForCausalLM, exist_ok=True)
