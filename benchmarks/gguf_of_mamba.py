"""Write a Mamba checkpoint as a GGUF file, which llama.cpp reads. Needs the ``gguf`` package.

Names, shapes and metadata are those of gguf's own table for the architecture ``mamba``. The vocabulary is that of
``benchmarks.words`` under the tokenizer that takes the longest match; none of its tokens ends an answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from benchmarks.words import word
from mamba_core.configuration_mamba import MambaConfig
from mamba_core.modeling_mamba import MambaForCausalLM

WEIGHT_TYPES = ("F32", "F16", "BF16", "Q8_0")
# llama.cpp expects the inner width to be twice the outer one
_EXPAND = 2
# a recurrent model has no longest context; the file wants a number
_CONTEXT_LENGTH = 2**20
_BLOCK = re.compile(r"backbone\.layers\.(\d+)\.(.+)")
_NAMES = {
    "backbone.embeddings.weight": "token_embd.weight",
    "backbone.norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_BLOCK_NAMES = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight",
    "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.dt_proj.bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.out_proj.weight": "ssm_out.weight",
}
_PRODUCTS = ("token_embd.weight", "output.weight", "ssm_in.weight", "ssm_x.weight", "ssm_dt.weight", "ssm_out.weight")


def write_gguf(model: MambaForCausalLM, path: Path, weight_type: str) -> None:
    """The matrices in ``weight_type``, everything else in fp32.

    A matrix whose rows are no whole number of the type's blocks is F16. Raises ValueError for a model that llama.cpp
    has no room for: with biases in its projections, norms inside the mixer, or another inner width.
    """
    check(model.config)
    writer = gguf.GGUFWriter(path, "mamba")
    write_metadata(writer, model.config, weight_type)
    for name, tensor in tensors(model.config, model.state_dict()):
        quantization = type_of(name, tensor, weight_type)
        data = gguf.quantize(tensor.numpy(), quantization)
        writer.add_tensor(name, data, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check(config: MambaConfig) -> None:
    if config.use_bias:
        raise ValueError("llama.cpp's mamba has no biases in its projections (use_bias)")
    if config.model_type != "mamba":
        raise ValueError(f"a model of type {config.model_type!r} is not written, 'mamba' is")
    if config.intermediate_size != _EXPAND * config.hidden_size:
        raise ValueError(f"llama.cpp wants an inner width of {_EXPAND} times the outer, not {config.intermediate_size}")


def write_metadata(writer: Any, config: MambaConfig, weight_type: str) -> None:
    writer.add_name("mamba")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{weight_type}" if weight_type != "F32" else "ALL_F32"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(_CONTEXT_LENGTH)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(config.intermediate_size)
    writer.add_ssm_state_size(config.state_size)
    writer.add_ssm_time_step_rank(int(config.time_step_rank))
    writer.add_ssm_dt_b_c_rms(False)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list([word(token) for token in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)


def tensors(config: MambaConfig, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file in fp32, under its name there. Raises ValueError for a weight that has none."""
    for name, weight in weights.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target = name_of(name)
        yield target, converted(target, weight.detach().cpu().float())
    if not config.use_conv_bias:
        for block in range(config.num_hidden_layers):
            yield f"blk.{block}.ssm_conv1d.bias", torch.zeros(config.intermediate_size)


def name_of(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in _BLOCK_NAMES:
        raise ValueError(f"llama.cpp's mamba has no weight like {name}")
    return f"blk.{match[1]}.{_BLOCK_NAMES[match[2]]}"


def converted(target: str, weight: Tensor) -> Tensor:
    if target.endswith("ssm_a"):
        return -torch.exp(weight)
    if target.endswith("ssm_conv1d.weight"):
        return weight.squeeze(1).contiguous()  # [D, 1, K] -> [D, K]
    return weight.contiguous()


def type_of(name: str, tensor: Tensor, weight_type: str) -> Any:
    if not name.endswith(_PRODUCTS):
        return gguf.GGMLQuantizationType.F32
    quantization = gguf.GGMLQuantizationType[weight_type]
    block_size = gguf.GGML_QUANT_SIZES[quantization][0]
    return quantization if tensor.shape[-1] % block_size == 0 else gguf.GGMLQuantizationType.F16


def read_tensor(tensor: Any) -> np.ndarray[Any, Any]:
    """A tensor of gguf's reader in fp32, in the shape that it has in torch."""
    values = gguf.dequantize(tensor.data, tensor.tensor_type)
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return np.asarray(values, dtype=np.float32).reshape(shape)
