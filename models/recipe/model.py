"""The model to train, and its loss computed slice by slice so that no [tokens, V] matrix is ever whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mamba_core.configuration_mamba import MambaConfig
from mamba_core.modeling_mamba import MambaForCausalLM
from models.recipe.tokenizer import END_OF_TEXT_ID

SLICE_TOKENS = 8192


def new_config(vocab_size: int, hidden_size: int, num_layers: int) -> MambaConfig:
    """The shipped model's shape: state 16, expansion 2, convolution 4, tied embeddings, the paper's initialisation."""
    return MambaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        state_size=16,
        expand=2,
        conv_kernel=4,
        initializer_range=0.02,
        rescale_prenorm_residual=True,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=END_OF_TEXT_ID,
    )


def new_model(config: MambaConfig, seed: int, device: torch.device) -> MambaForCausalLM:
    """A freshly initialised model in fp32, the same on every device."""
    torch.manual_seed(seed)
    model: MambaForCausalLM = MambaForCausalLM(config).to(device)
    return model


def num_parameters(model: torch.nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _slice_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def _slices(hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for begin in range(0, len(targets), SLICE_TOKENS):
        yield hidden[begin : begin + SLICE_TOKENS], targets[begin : begin + SLICE_TOKENS]


def mean_loss(model: Any, tokens: Tensor) -> Tensor:
    """Mean cross-entropy in nats of rows [B, L+1]: every token but the first is a target. Differentiable."""
    hidden = model.base_model(tokens[:, :-1], use_cache=False).last_hidden_state  # [B, L, H]
    hidden, targets = hidden.flatten(0, 1), tokens[:, 1:].flatten()
    weight = model.get_output_embeddings().weight
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, wanted in _slices(hidden, targets):
        total = total + checkpoint(_slice_loss, part, weight, wanted, use_reentrant=False)
    mean: Tensor = total / targets.numel()
    return mean


@torch.no_grad()
def token_losses(model: Any, tokens: Tensor) -> Tensor:
    """Cross-entropy in nats of each target of rows [B, L+1], as [B, L] fp32; every row starts from a zero state."""
    hidden = model.base_model(tokens[:, :-1], use_cache=False).last_hidden_state  # [B, L, H]
    hidden, targets = hidden.flatten(0, 1), tokens[:, 1:].flatten()
    # the layer itself and not its weight, which may be in int8
    head = model.get_output_embeddings()
    losses = [
        F.cross_entropy(head(part).float(), wanted, reduction="none") for part, wanted in _slices(hidden, targets)
    ]
    return torch.cat(losses).view(tokens.shape[0], -1)
