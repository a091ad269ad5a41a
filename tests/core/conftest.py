"""Tiny random models, ours and transformers' own, holding the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.falcon_mamba.configuration_falcon_mamba import FalconMambaConfig as TheirFalconConfig
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaForCausalLM as TheirFalcon
from transformers.models.mamba.configuration_mamba import MambaConfig as TheirConfig
from transformers.models.mamba.modeling_mamba import MambaForCausalLM as TheirMamba

from mamba_core import FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM

FAMILIES = ("mamba", "falcon_mamba")
SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tiny_model() -> Callable[..., MambaForCausalLM]:
    """A function (family, seed, **configuration) -> model in eval mode, its weights far from their initial symmetry."""

    def make(family: str = "mamba", seed: int = 0, **changes: Any) -> MambaForCausalLM:
        config_class, model_class = {
            "mamba": (MambaConfig, MambaForCausalLM),
            "falcon_mamba": (FalconMambaConfig, FalconMambaForCausalLM),
        }[family]
        torch.manual_seed(seed)
        model = model_class(config_class(**(SIZES | changes)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return model.eval()

    return make


@pytest.fixture
def their_model() -> Callable[[MambaForCausalLM], torch.nn.Module]:
    """A function from one of our models to transformers' own class with the same configuration and weights."""

    def make(model: MambaForCausalLM) -> torch.nn.Module:
        config_class, model_class = {
            "mamba": (TheirConfig, TheirMamba),
            "falcon_mamba": (TheirFalconConfig, TheirFalcon),
        }[model.config.model_type]
        theirs = model_class(config_class(**model.config.to_dict()))
        theirs.load_state_dict(model.state_dict())
        return theirs.eval()

    return make


@pytest.fixture
def tokens() -> Callable[..., torch.Tensor]:
    """A function (rows, columns, seed) -> random token ids [rows, columns]."""

    def make(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
        return torch.randint(0, SIZES["vocab_size"], (rows, columns), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def source(tiny_model: Callable[..., MambaForCausalLM]) -> MambaForCausalLM:
    """The model that a checkpoint is written from."""
    return tiny_model(vocab_size=104)


@pytest.fixture
def saved(source: MambaForCausalLM, tmp_path: Path) -> Path:
    """A directory as transformers writes it."""
    source.save_pretrained(tmp_path)
    return tmp_path
