"""The Mamba language model: one forward for padded, packed, chunked and single-token input, on every device."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mamba_core.bases import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    GenerationMixin,
    GradientCheckpointingLayer,
    PreTrainedModel,
    init,
)
from mamba_core.cache import MambaCache
from mamba_core.configuration_mamba import FalconMambaConfig, MambaConfig
from mamba_core.loss import IGNORED_LABEL, cross_entropy, cross_entropy_in_pieces, next_tokens
from mamba_core.mixer import MambaMixer, MambaRMSNorm, init_mixer
from mamba_core.ops import Packing, native
from mamba_core.padding import PaddedRows

if TYPE_CHECKING:
    from mamba_core.cpu_step import CpuStep
    from mamba_core.ops.triton.persistent_step import Weights

# arguments that generate(), Trainer and pipelines pass to any model and that mean nothing to one without attention
_MEANINGLESS = {"position_ids", "cache_position", "token_type_ids", "output_attentions"}


@dataclass
class MambaOutput(BaseModelOutputWithPast):  # type: ignore[misc]
    """last_hidden_state [B, L, H], past_key_values (a MambaCache) and hidden_states."""

    @property
    def cache_params(self) -> MambaCache | None:
        """The cache, under the name transformers' Mamba gives it."""
        return self.past_key_values  # type: ignore[no-any-return]


@dataclass
class MambaCausalLMOutput(CausalLMOutputWithPast):  # type: ignore[misc]
    """loss, logits [B, L, V] in fp32, past_key_values (a MambaCache) and hidden_states."""

    @property
    def cache_params(self) -> MambaCache | None:
        """The cache, under the name transformers' Mamba gives it."""
        return self.past_key_values  # type: ignore[no-any-return]


class MambaBlock(GradientCheckpointingLayer):  # type: ignore[misc]
    """Norm and mixer. The sum with the residual is left to the next norm, which does both in one pass."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = MambaRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = MambaMixer(config)

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        packing: Packing,
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
        wanted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """hidden [T, H], residual [T, H] or None -> (mixer output, residual before it), of ``wanted`` tokens alone."""
        normed, residual = self.norm(hidden, residual)
        if self.residual_in_fp32:
            residual = residual.float()
        if wanted is not None:
            residual = residual.index_select(0, wanted)
        return self.mixer(normed, packing, conv_state, ssm_state, wanted), residual


class MambaPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """Initialisation and loading."""

    config_class = MambaConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MambaBlock"]
    _keep_in_fp32_modules_strict = [r"mixer\.A_log$", r"mixer\.D$"]
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the paper's code does; transformers' init functions leave alone what was loaded."""
        if isinstance(module, nn.Linear | nn.Conv1d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None and isinstance(module, nn.Linear):
                init.zeros_(module.bias)
            elif module.bias is not None:
                bound = module.kernel_size[0] ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, MambaRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, MambaMixer):
            init_mixer(module)


class MambaModel(MambaPreTrainedModel):
    """Embeddings, blocks and the final norm."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([MambaBlock(config) for _ in range(config.num_hidden_layers)])
        self.norm_f = MambaRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        # where a step of one sequence has last found them
        self.located_weights: Weights | None = None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, new_embeddings: nn.Embedding) -> None:
        self.embeddings = new_embeddings

    def forward_packed(
        self,
        hidden: Tensor,
        packing: Packing,
        cache: MambaCache | None,
        layer_outputs: list[Tensor] | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Embedded tokens [T, H] of packed sequences -> hidden states [T, H] after the final norm.

        With ``wanted`` [W] int64 those of the tokens at these places alone, [W, H], and none in ``layer_outputs``.

        With a cache, row b continues slot ``packing.slots[b]`` and leaves its new state there; without one every row
        starts from zero. The output of each block is appended to ``layer_outputs`` if given. Raises ValueError when
        carried states meet gradient checkpointing, whose second pass would advance them again.
        """
        if packing.num_tokens == 0:
            return hidden
        if cache is None:
            packing = dataclasses.replace(packing, slots=torch.arange(packing.num_rows, device=hidden.device))
        elif self._is_recomputed:
            raise ValueError("a cache cannot be carried under gradient checkpointing: pass use_cache=False")
        residual: Tensor | None = None
        for index, block in enumerate(self.layers):
            conv_state, ssm_state = (None, None) if cache is None else cache.layer(index)
            of_block = wanted if index == len(self.layers) - 1 else None
            hidden, residual = block(hidden, residual, packing, conv_state, ssm_state, of_block)
            if layer_outputs is not None:
                layer_outputs.append(residual + hidden)
        return self.norm_f(hidden, residual)[0]  # type: ignore[no-any-return]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: MambaCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_params: MambaCache | None = None,
        **kwargs: Any,
    ) -> MambaOutput | tuple[Any, ...]:
        """input_ids [B, L] or inputs_embeds [B, L, H] -> last_hidden_state [B, L, H], zero at padding.

        attention_mask: 1 at real tokens, 0 at padding anywhere, [B, L] or wider, of which the last L columns count;
        padded positions do not exist for the model. ``past_key_values`` (or ``cache_params``) continues the rows.
        """
        _refuse_unknown(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        embeds = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        rows = PaddedRows.of(embeds, attention_mask)
        cache = self._pick_cache(past_key_values, cache_params, use_cache, embeds)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        layer_outputs: list[Tensor] | None = [] if output_hidden_states else None

        last = rows.unpack(self.forward_packed(rows.pack(embeds), rows.packing, cache, layer_outputs))
        hidden_states = None
        if layer_outputs is not None:
            hidden_states = (*(rows.unpack(output) for output in layer_outputs), last)
        if cache is not None:
            cache.advance(embeds.shape[1])
        output = MambaOutput(last, past_key_values=cache, hidden_states=hidden_states)
        return output if self._wants_dict(return_dict) else output.to_tuple()

    @property
    def _is_recomputed(self) -> bool:
        """Whether the backward pass will run the blocks a second time."""
        return bool(self.training and any(block.gradient_checkpointing for block in self.layers))

    def _wants_dict(self, return_dict: bool | None) -> bool:
        return bool(self.config.return_dict if return_dict is None else return_dict)

    def _pick_cache(
        self,
        past_key_values: MambaCache | None,
        cache_params: MambaCache | None,
        use_cache: bool | None,
        embeds: Tensor,
    ) -> MambaCache | None:
        """The cache passed in under either name, a new one if one is wanted, or None."""
        if past_key_values is not None and cache_params is not None and past_key_values is not cache_params:
            raise ValueError("past_key_values and cache_params are the same argument and differ")
        cache = past_key_values if past_key_values is not None else cache_params
        if cache is not None:
            if not isinstance(cache, MambaCache):
                raise ValueError(f"past_key_values must be a MambaCache, got {type(cache).__name__}")
            if cache.num_slots != embeds.shape[0]:
                raise ValueError(f"past_key_values holds {cache.num_slots} rows, the batch has {embeds.shape[0]}")
            return cache
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if not use_cache or self._is_recomputed or embeds.shape[0] == 0:
            return None
        return MambaCache.from_config(self.config, embeds.shape[0], dtype=embeds.dtype, device=embeds.device)


class MambaForCausalLM(MambaPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Mamba with a language modeling head."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        self.backbone = MambaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._counters: Tensor | None = None
        self._cpu_step: CpuStep | None = None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, new_embeddings: nn.Embedding) -> None:
        self.backbone.set_input_embeddings(new_embeddings)

    def forward_packed(
        self, input_ids: Tensor, packing: Packing, cache: MambaCache | None, wanted: Tensor | None = None
    ) -> Tensor:
        """Token ids [T] of packed sequences -> hidden states [T, H]; see ``MambaModel.forward_packed``."""
        hidden = self._try_step(input_ids, packing, cache)
        if hidden is None:
            return self.backbone.forward_packed(self.backbone.embeddings(input_ids), packing, cache, wanted=wanted)
        return hidden if wanted is None else hidden.index_select(0, wanted)

    def _try_step(self, input_ids: Tensor, packing: Packing, cache: MambaCache | None) -> Tensor | None:
        """Hidden states [B, H] of one token for each row, if it is that and there is a quicker way for it."""
        if cache is not None and packing.is_step and input_ids.is_cuda:
            from mamba_core.fused_step import fused_step, is_applicable

            if is_applicable(self.backbone):
                counters = self._step_counters()
                return fused_step(self.backbone, input_ids, packing.slots, cache, counters, may_lag=packing.may_lag)
        elif cache is not None and (step := self._native_step(cache)) is not None and step.suits(packing):
            return step.step(self.backbone, input_ids, packing.token_slots, cache)
        return None

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [*, H] -> logits [*, V] in fp32, the products in the weights' dtype."""
        weight, scales = self.lm_head.weight, getattr(self.lm_head, "scales", None)
        hidden = hidden.to(weight.dtype if scales is None else self.backbone.norm_f.weight.dtype)
        if hidden.is_cuda and hidden.dtype.itemsize == 2 and not torch.is_grad_enabled():
            # what the matrix units have summed in fp32 is not rounded on its way out
            from mamba_core.ops.triton.quantized import Matrix
            from mamba_core.ops.triton.step_products import project_head

            logits = project_head(hidden.reshape(-1, hidden.shape[-1]), Matrix(weight, scales))
            return logits.view(*hidden.shape[:-1], -1)
        if (step := self._native_step()) is not None and step.can_project(hidden, weight):
            return step.project(hidden.reshape(-1, hidden.shape[-1]), weight, scales).view(*hidden.shape[:-1], -1)
        return self.lm_head(hidden).float()  # type: ignore[no-any-return]

    def _native_step(self, cache: MambaCache | None = None) -> CpuStep | None:
        """What makes steps on a CPU; None on a GPU, while learning, and where it cannot advance this cache."""
        if self.lm_head.weight.device.type != "cpu" or self.training or torch.is_grad_enabled():
            return None
        if self._cpu_step is None and native.is_available():
            from mamba_core.cpu_step import CpuStep

            self._cpu_step = CpuStep()
        step = self._cpu_step
        return None if step is None or (cache is not None and not step.can_step(self.backbone, cache)) else step

    def _step_counters(self) -> Tensor:
        """What the programs of a fused step count themselves with; made once, zero between steps."""
        from mamba_core.ops.triton.step_products import MAX_TILES

        device = self.lm_head.weight.device
        if self._counters is None or self._counters.device != device:
            self._counters = torch.zeros(MAX_TILES, dtype=torch.int32, device=device)
        return self._counters

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: MambaCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache_params: MambaCache | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> MambaCausalLMOutput | tuple[Any, ...]:
        """Logits of the last ``logits_to_keep`` positions, and the loss.

        logits_to_keep: 0 for all; or positions [n], the same for all rows; or positions [B, n] of each row.

        labels [B, L] are shifted here; -100 is ignored, and so is what a padded position would predict. The loss is
        the mean over what is left, or the sum over ``num_items_in_batch``. With ``fuse_linear_cross_entropy`` in the
        configuration the logits of all positions never exist together and none are returned beside a loss.
        Other arguments as in ``MambaModel.forward``.
        """
        outputs = self.backbone(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            cache_params=cache_params,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        logits, loss = None, None
        if labels is None or not self.config.fuse_linear_cross_entropy:
            logits = self.compute_logits(_keep(hidden, logits_to_keep))
        if labels is not None:
            if labels.shape != hidden.shape[:2]:
                raise ValueError(f"labels must have shape {tuple(hidden.shape[:2])}, got {tuple(labels.shape)}")
            targets = next_tokens(labels.to(hidden.device), attention_mask)
            count = (targets != IGNORED_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
            loss = self._loss(hidden, logits, targets) / count
        output = MambaCausalLMOutput(loss, logits, outputs.past_key_values, outputs.hidden_states)
        return output if self.backbone._wants_dict(return_dict) else output.to_tuple()

    def _loss(self, hidden: Tensor, logits: Tensor | None, targets: Tensor) -> Tensor:
        """Summed cross entropy, from the logits if there are some of every position."""
        if logits is not None and logits.shape[:2] == targets.shape:
            return cross_entropy(logits, targets)
        return cross_entropy_in_pieces(hidden, targets, self.compute_logits, self.config.vocab_size)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: MambaCache | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if next_sequence_length == 1 and past_key_values is not None and not is_first_iteration:
            # every row has exactly one new token, and looking at the mask would wait for the device
            inputs["attention_mask"] = None
        mask = inputs.get("attention_mask")
        if mask is not None and isinstance(kept := inputs.get("logits_to_keep"), int) and kept == 1:
            inputs["logits_to_keep"] = _last_real_columns(mask, _num_columns(inputs))
        return inputs

    def _prepare_cache_for_generation(
        self, _generation_config: Any, model_kwargs: dict[str, Any], *_args: Any, **_kwargs: Any
    ) -> None:
        # the first forward makes the cache, whose size depends on nothing but the number of rows
        if (cache := model_kwargs.pop("cache_params", None)) is not None:
            model_kwargs["past_key_values"] = cache


class FalconMambaModel(MambaModel):
    """``MambaModel`` under the configuration of FalconMamba."""

    config_class = FalconMambaConfig


class FalconMambaForCausalLM(MambaForCausalLM):
    """``MambaForCausalLM`` under the configuration of FalconMamba."""

    config_class = FalconMambaConfig


def _keep(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    if isinstance(logits_to_keep, int):
        return hidden[:, -logits_to_keep:]
    if logits_to_keep.dim() == 2:
        return hidden.take_along_dim(logits_to_keep[..., None], dim=1)
    return hidden[:, logits_to_keep]


def _num_columns(inputs: dict[str, Any]) -> int:
    embeds = inputs.get("inputs_embeds")
    return int((inputs["input_ids"] if embeds is None else embeds).shape[1])


def _last_real_columns(attention_mask: Tensor, num_columns: int) -> Tensor:
    """The column of each row's last real token among the last columns of the mask [B, 1]."""
    real = attention_mask[:, -num_columns:] != 0
    return num_columns - 1 - real.flip(1).int().argmax(1, keepdim=True)


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    unknown = sorted(set(kwargs) - _MEANINGLESS)
    if unknown:
        raise TypeError(f"forward() got unexpected arguments: {', '.join(unknown)}")
