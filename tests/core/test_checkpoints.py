"""Four layouts, one model; what is damaged, unsafe or of another kind is refused by name before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.errors
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mamba_core import FalconMambaForCausalLM, MambaForCausalLM, checkpoints
from mamba_core.checkpoints import (
    CheckpointError,
    CheckpointNotFound,
    HubUnavailable,
    InvalidConfig,
    InvalidWeights,
    Layout,
    UnsupportedModel,
    hub,
)

Make = Callable[..., MambaForCausalLM]
Tokens = Callable[..., Tensor]

STATE_SPACES = {
    "d_model": 32,
    "n_layer": 2,
    "vocab_size": 101,
    "ssm_cfg": {"d_state": 8},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}
FLA = {
    "model_type": "mamba",
    "architectures": ["MambaForCausalLM"],
    "hidden_size": 32,
    "state_size": 8,
    "num_hidden_layers": 2,
    "vocab_size": 104,
    "norm_eps": 1e-5,
    "residual_in_fp32": True,
    "fuse_norm": True,
    "fuse_cross_entropy": True,
    "use_conv_bias": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


@pytest.fixture
def source(tiny_model: Make) -> MambaForCausalLM:
    return tiny_model(vocab_size=104)


def state_of(model: MambaForCausalLM) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def write_json(directory: Path, content: Any, name: str = "config.json") -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(json.dumps(content))


def save(tensors: dict[str, Tensor], path: Path) -> None:
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path, metadata={"format": "pt"})


def save_shards(tensors: dict[str, Tensor], directory: Path, stem: str, suffix: str) -> None:
    names = sorted(tensors)
    shards = {f"{stem}-0000{i + 1}-of-00003{suffix}": names[i::3] for i in range(3)}
    for shard, members in shards.items():
        save({name: tensors[name] for name in members}, directory / shard)
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    write_json(directory, {"metadata": {}, "weight_map": weight_map}, f"{stem}{suffix}.index.json")


def write_state_spaces(model: MambaForCausalLM, directory: Path, **changes: Any) -> None:
    write_json(directory, STATE_SPACES | changes)
    tensors = {name.replace("embeddings", "embedding"): t for name, t in state_of(model).items()}
    save(tensors, directory / "pytorch_model.bin")


def write_fla(model: MambaForCausalLM, directory: Path, **changes: Any) -> None:
    write_json(directory, FLA | changes)
    save(state_of(model), directory / "model.safetensors")


@pytest.fixture
def saved(source: MambaForCausalLM, tmp_path: Path) -> Path:
    """A directory as transformers writes it."""
    source.save_pretrained(tmp_path)
    return tmp_path


def assert_same(model: MambaForCausalLM, source: MambaForCausalLM, tokens: Tokens) -> None:
    assert not model.training
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(tokens(2, 9)).logits, source(tokens(2, 9)).logits)


@pytest.mark.parametrize("layout", list(Layout), ids=str)
def test_every_layout_gives_the_same_logits(
    layout: Layout, source: MambaForCausalLM, tiny_model: Make, tokens: Tokens, tmp_path: Path
) -> None:
    if layout is Layout.FALCON_MAMBA:
        source = tiny_model("falcon_mamba", tie_word_embeddings=False)
    if layout is Layout.STATE_SPACES:
        write_state_spaces(source, tmp_path)
    elif layout is Layout.FLASH_LINEAR_ATTENTION:
        write_fla(source, tmp_path)
    else:
        source.save_pretrained(tmp_path)
    info = checkpoints.inspect(tmp_path)
    assert info.layout is layout
    assert info.num_parameters == sum(p.numel() for p in source.parameters()) + (
        source.lm_head.weight.numel() if layout is Layout.FLASH_LINEAR_ATTENTION else 0
    )
    model = checkpoints.load(tmp_path, show_progress=False)
    assert isinstance(model, FalconMambaForCausalLM) is (layout is Layout.FALCON_MAMBA)
    assert_same(model, source, tokens)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("is_sharded", [False, True], ids=["single", "sharded"])
def test_every_kind_of_file_gives_the_same_logits(
    suffix: str, is_sharded: bool, source: MambaForCausalLM, saved: Path, tokens: Tokens
) -> None:
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    if is_sharded:
        save_shards(tensors, saved, stem, suffix)
    else:
        save(tensors, saved / f"{stem}{suffix}")
    assert len(checkpoints.inspect(saved).files) == (3 if is_sharded else 1)
    assert_same(checkpoints.load(saved, show_progress=False), source, tokens)


def test_a_bin_file_from_before_torch_1_6_loads(source: MambaForCausalLM, tokens: Tokens, tmp_path: Path) -> None:
    write_json(tmp_path, STATE_SPACES)
    torch.save(state_of(source), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same(checkpoints.load(tmp_path, show_progress=False), source, tokens)


def test_safetensors_come_first(source: MambaForCausalLM, saved: Path, tokens: Tokens) -> None:
    (saved / "pytorch_model.bin").write_bytes(b"never read")
    assert_same(checkpoints.load(saved, show_progress=False), source, tokens)


def test_names_of_a_bare_backbone(source: MambaForCausalLM, saved: Path, tokens: Tokens) -> None:
    source.backbone.save_pretrained(saved)
    assert "embeddings.weight" in load_file(saved / "model.safetensors")
    assert_same(checkpoints.load(saved, show_progress=False), source, tokens)


def test_converted_files_that_kept_the_papers_keys_are_transformers(
    source: MambaForCausalLM, saved: Path, tokens: Tokens
) -> None:
    leftovers = {"d_model": 32, "n_layer": 2, "d_inner": 160, "ssm_cfg": {}, "rms_norm": True, "fused_add_norm": True}
    raw = json.loads((saved / "config.json").read_text()) | leftovers
    del raw["tie_word_embeddings"]
    write_json(saved, raw)
    assert checkpoints.inspect(saved).layout is Layout.MAMBA
    assert_same(checkpoints.load(saved, show_progress=False), source, tokens)


def test_settings_of_the_papers_layout(tiny_model: Make, tokens: Tokens, tmp_path: Path) -> None:
    source = tiny_model(
        vocab_size=104, state_size=4, conv_kernel=3, expand=3, time_step_rank=5, use_bias=True, use_conv_bias=False,
        residual_in_fp32=False,
    )  # fmt: skip
    ssm = {"layer": "Mamba1", "d_state": 4, "d_conv": 3, "expand": 3, "dt_rank": 5, "bias": True, "conv_bias": False}
    write_state_spaces(source, tmp_path, ssm_cfg=ssm, residual_in_fp32=False, attn_layer_idx=[], d_intermediate=0)
    assert_same(checkpoints.load(tmp_path, show_progress=False), source, tokens)


def test_flash_linear_attention_always_has_a_convolution_bias(
    source: MambaForCausalLM, tokens: Tokens, tmp_path: Path
) -> None:
    write_fla(source, tmp_path, use_conv_bias=False)
    assert_same(checkpoints.load(tmp_path, show_progress=False), source, tokens)


def test_a_tied_head_is_shared_and_a_different_one_is_kept(
    source: MambaForCausalLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_state_spaces(source, tmp_path)
    model = checkpoints.load(tmp_path, show_progress=False)
    assert model.lm_head.weight is model.backbone.embeddings.weight
    assert not caplog.records
    tensors = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 2
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    model = checkpoints.load(tmp_path, show_progress=False)
    assert "lm_head.weight differs" in caplog.text
    assert torch.equal(model.lm_head.weight, 2 * model.backbone.embeddings.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_come_in_the_wanted_dtype(dtype: torch.dtype, source: MambaForCausalLM, saved: Path) -> None:
    model = checkpoints.load(saved, dtype, "cpu", show_progress=False)
    for name, parameter in model.named_parameters():
        is_kept = name.endswith(("mixer.A_log", "mixer.D"))
        assert parameter.dtype == (torch.float32 if is_kept else dtype), name
        assert torch.equal(parameter, source.get_parameter(name).to(parameter.dtype)), name
    assert model.config.dtype == dtype


@pytest.mark.gpu
@pytest.mark.parametrize("is_pickle", [False, True])
def test_weights_arrive_on_the_gpu(is_pickle: bool, source: MambaForCausalLM, saved: Path) -> None:
    if is_pickle:
        save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
        (saved / "model.safetensors").unlink()
    model = checkpoints.load(saved, torch.bfloat16, "cuda", show_progress=False)
    for name, parameter in model.named_parameters():
        assert parameter.device.type == "cuda", name
        assert torch.equal(parameter.cpu(), source.get_parameter(name).to(parameter.dtype)), name


def test_the_model_does_not_depend_on_the_file_any_more(source: MambaForCausalLM, saved: Path, tokens: Tokens) -> None:
    model = checkpoints.load(saved, show_progress=False)
    size = (saved / "model.safetensors").stat().st_size
    with (saved / "model.safetensors").open("r+b") as file:
        file.write(b"\0" * size)
    assert_same(model, source, tokens)


def test_a_model_loaded_under_inference_mode_can_be_trained(saved: Path, tokens: Tokens) -> None:
    with torch.inference_mode():
        model = checkpoints.load(saved, show_progress=False)
    model(tokens(1, 5), labels=tokens(1, 5)).loss.backward()
    assert model.backbone.embeddings.weight.grad is not None


def test_progress_goes_to_stderr_and_can_be_turned_off(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoints.load(saved, show_progress=False)
    assert capfd.readouterr() == ("", "")
    checkpoints.load(saved)
    out, err = capfd.readouterr()
    assert out == ""
    assert "loading weights: 100%" in err


def test_ends_of_text(saved: Path) -> None:
    config = checkpoints.inspect(saved).config
    (saved / "generation_config.json").unlink()
    assert checkpoints.eos_token_ids(saved, config) == (0,)
    config.eos_token_id = [5, 6, 5]
    assert checkpoints.eos_token_ids(saved, config) == (5, 6)
    config.eos_token_id = None
    assert checkpoints.eos_token_ids(saved, config) == ()
    write_json(saved, {"eos_token_id": [7, 8], "max_new_tokens": 3}, "generation_config.json")
    assert checkpoints.eos_token_ids(saved, config) == (7, 8)
    model = checkpoints.load(saved, show_progress=False)
    assert model.generation_config.eos_token_id == [7, 8]
    assert model.generation_config.max_new_tokens == 3
    for nonsense in (104, -1, "</s>", True):
        write_json(saved, {"eos_token_id": nonsense}, "generation_config.json")
        with pytest.raises(InvalidConfig, match="eos_token_id"):
            checkpoints.inspect(saved)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_type": "mamba2"}, UnsupportedModel, "Mamba-2 is not supported"),
        ({"model_type": "llama"}, UnsupportedModel, "model_type 'llama' is not supported"),
        ({"model_type": 5}, UnsupportedModel, "model_type '5' is not supported"),
        ({"model_type": None}, InvalidConfig, "has no model_type"),
        ({"rms_norm": False}, UnsupportedModel, "LayerNorm is not supported"),
        ({"attn": {"layers": [1]}}, UnsupportedModel, "attention layers are not supported"),
        ({"quantization_config": {"bits": 4}}, UnsupportedModel, "quantized weights are not supported"),
        ({"state_size": 0}, InvalidConfig, "config.json: state_size"),
        ({"hidden_act": "gelu"}, InvalidConfig, "config.json: hidden_act"),
        ({"layer_types": ["full_attention"]}, InvalidConfig, "config.json: .*layer_types"),
        ({"dtype": "float3"}, InvalidConfig, "config.json: .*float3"),
        ({"hidden_size": 10**12, "intermediate_size": 10**12}, InvalidConfig, "too large to exist"),
        ({"num_hidden_layers": 10**9}, InvalidConfig, "config.json: num_hidden_layers"),
        ({"num_hidden_layers": 99_999}, InvalidWeights, "describes 99999 layers, the weights hold 2"),
        ({"hidden_size": 48}, InvalidWeights, r"has shape .* config.json asks for"),
        ({"vocab_size": 200}, InvalidWeights, r"embeddings.weight .* has shape \(104, 32\)"),
        ({"tie_word_embeddings": False}, InvalidWeights, "the weights lack lm_head.weight"),
        ({"use_bias": True}, InvalidWeights, "the weights lack .*proj.bias"),
        ({"use_conv_bias": False}, InvalidWeights, "tensors the model does not have: .*conv1d.bias"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_configurations_are_refused_by_name(
    changes: dict[str, Any], error: type[CheckpointError], message: str, saved: Path
) -> None:
    raw = json.loads((saved / "config.json").read_text()) | changes
    write_json(saved, raw)
    with pytest.raises(error, match=message) as caught:
        checkpoints.inspect(saved)
    assert_one_clear_line(caught.value, saved)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba2"}}, UnsupportedModel, "Mamba-2 is not supported"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, UnsupportedModel, "Mamba3 is not supported"),
        ({"ssm_cfg": {"heads": 4}}, InvalidConfig, "unknown settings: heads"),
        ({"ssm_cfg": [1]}, InvalidConfig, "ssm_cfg must be an object"),
        ({"rms_norm": False}, UnsupportedModel, "LayerNorm is not supported"),
        ({"attn_layer_idx": [1]}, UnsupportedModel, "attention layers are not supported"),
        ({"d_intermediate": 64}, UnsupportedModel, "MLP layers are not supported"),
        ({"vocab_size": "big"}, InvalidConfig, "vocab_size"),
        ({"pad_vocab_size_multiple": 0}, InvalidConfig, "pad_vocab_size_multiple"),
        ({"d_model": -32}, InvalidConfig, "hidden_size"),
    ],
)
def test_configurations_of_the_papers_layout_are_refused_by_name(
    changes: dict[str, Any], error: type[CheckpointError], message: str, source: MambaForCausalLM, tmp_path: Path
) -> None:
    write_state_spaces(source, tmp_path, **changes)
    with pytest.raises(error, match=message) as caught:
        checkpoints.inspect(tmp_path)
    assert_one_clear_line(caught.value, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not readable JSON"),
        (b"{", "not readable JSON"),
        (b"\xff\xfe", "not readable JSON"),
        (b"[" * 100_000, "not readable JSON"),
        (b"[]", "holds no JSON object"),
        (None, "there is no config.json"),
    ],
    ids=["empty", "broken", "no text", "deep", "list", "missing"],
)
def test_a_config_file_that_is_none_is_refused(content: bytes | None, message: str, saved: Path) -> None:
    if content is None:
        (saved / "config.json").unlink()
    else:
        (saved / "config.json").write_bytes(content)
    with pytest.raises(InvalidConfig, match=message):
        checkpoints.inspect(saved)


def assert_one_clear_line(error: CheckpointError, directory: Path) -> None:
    message = str(error)
    assert message
    assert "\n" not in message
    assert str(directory) not in message
    assert len(message) < 500


def assert_weights_refused(directory: Path, message: str) -> None:
    for call in (checkpoints.inspect, checkpoints.load):
        with pytest.raises(InvalidWeights, match=message) as caught:
            call(directory)
        assert_one_clear_line(caught.value, directory)


def test_missing_unknown_and_doubled_tensors_are_refused_by_name(saved: Path) -> None:
    file = saved / "model.safetensors"
    tensors = load_file(file)
    save({name: t for name, t in tensors.items() if "layers.1.mixer.D" not in name}, file)
    assert_weights_refused(saved, "lack backbone.layers.1.mixer.D$")
    save({name: t for name, t in tensors.items() if "layers.1" not in name}, file)
    assert_weights_refused(saved, "describes 2 layers, the weights hold 1")
    save({name: t for name, t in tensors.items() if "in_proj" not in name and "x_proj" not in name}, file)
    assert_weights_refused(saved, "in_proj.weight, .* and 1 more$")
    save(tensors | {"backbone.layers.0.mixer.extra": torch.zeros(1)}, file)
    assert_weights_refused(saved, "does not have: backbone.layers.0.mixer.extra$")
    save(tensors | {"backbone.embedding.weight": tensors["backbone.embeddings.weight"].clone()}, file)
    assert_weights_refused(saved, "are the same parameter")


def test_tensors_of_mamba2_and_layer_norm_are_recognised(saved: Path) -> None:
    file = saved / "model.safetensors"
    tensors = load_file(file)
    save(tensors | {"backbone.layers.0.mixer.dt_bias": torch.zeros(2)}, file)
    with pytest.raises(UnsupportedModel, match="Mamba-2"):
        checkpoints.inspect(saved)
    save(tensors | {"backbone.norm_f.bias": torch.zeros(32)}, file)
    with pytest.raises(UnsupportedModel, match="LayerNorm"):
        checkpoints.inspect(saved)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_absurd_dtypes_are_refused_by_name(dtype: torch.dtype, suffix: str, saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    tensors["backbone.norm_f.weight"] = torch.zeros(32).to(dtype)
    save(tensors, saved / ("pytorch_model.bin" if suffix == ".bin" else "model.safetensors"))
    assert_weights_refused(saved, "backbone.norm_f.weight in .* has dtype")


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_truncated_files_are_refused(suffix: str, kept: float, saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    file = saved / ("pytorch_model.bin" if suffix == ".bin" else "model.safetensors")
    save(tensors, file)
    content = file.read_bytes()
    file.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    assert_weights_refused(saved, f"{file.name} is (damaged|refused)")


def test_absurd_headers_are_refused(saved: Path) -> None:
    file = saved / "model.safetensors"
    for content in (b"\xff" * 64, (2**62).to_bytes(8, "little") + b"{}", b"\0" * 1000):
        file.write_bytes(content)
        assert_weights_refused(saved, "model.safetensors is damaged or truncated")


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("is_old_format", [False, True])
def test_a_pickle_that_would_act_is_refused_and_does_not(is_old_format: bool, saved: Path) -> None:
    tensors: dict[str, Any] = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    victim = saved / "victim"
    tensors["backbone.norm_f.weight"] = Evil(victim)
    torch.save(tensors, saved / "pytorch_model.bin", _use_new_zipfile_serialization=not is_old_format)
    assert_weights_refused(saved, "pytorch_model.bin is refused")
    assert not victim.exists()


@pytest.mark.parametrize(
    "content",
    [[torch.zeros(2)], {"state_dict": {"a": torch.zeros(2)}}, {1: torch.zeros(2)}, {"a": torch.eye(3).to_sparse()}, 7],
    ids=["list", "nested", "numbered", "sparse", "number"],
)
def test_a_pickle_of_anything_but_named_tensors_is_refused(content: Any, saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    torch.save(content, saved / "pytorch_model.bin")
    assert_weights_refused(saved, "pytorch_model.bin is refused")


def test_broken_indexes_are_refused(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    assert_weights_refused(saved, "there are no weights")
    save_shards(tensors, saved, "model", ".safetensors")
    name = "model.safetensors.index.json"
    good = json.loads((saved / name).read_text())["weight_map"]

    for broken, message in (
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
        (good | {"lm_head.weight": "../model.safetensors"}, "cannot be one"),
        (good | {"lm_head.weight": "/etc/passwd"}, "cannot be one"),
        (good | {"lm_head.weight": "model.bin"}, "cannot be one"),
        (good | {"lm_head.weight": "model-9.safetensors"}, "a shard that is missing: model-9.safetensors"),
        (good | {"lm_head.weight": "model-00001-of-00003.safetensors"}, "no shard holds: lm_head.weight"),
    ):
        write_json(saved, {"weight_map": broken}, name)
        assert_weights_refused(saved, message)
    (saved / name).write_text("{")
    assert_weights_refused(saved, "not readable JSON")

    write_json(saved, {"weight_map": good}, name)
    checkpoints.inspect(saved)
    first = saved / "model-00001-of-00003.safetensors"
    second = saved / "model-00002-of-00003.safetensors"
    save(load_file(first) | load_file(second), second)
    assert_weights_refused(saved, "is stored twice")


def test_a_directory_is_resolved_without_the_network(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "snapshot_download", pytest.fail)
    monkeypatch.chdir(saved)
    assert checkpoints.resolve(str(saved)) == saved
    with pytest.raises(CheckpointNotFound, match="is a file"):
        checkpoints.resolve(str(saved / "config.json"))
    for name in ("./nowhere", "/no/where", "a/b/c", "", "../nowhere", "~nobody/x"):
        with pytest.raises(CheckpointNotFound, match="there is no directory"):
            checkpoints.resolve(name)


def test_pickles_are_fetched_only_where_nothing_else_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, bool]] = []

    def download(model: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((model, revision, any("bin" in pattern for pattern in allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert checkpoints.resolve("someone/mamba", "v2") == tmp_path
    (tmp_path / "model.safetensors").touch()
    checkpoints.resolve("someone/mamba")
    assert asked == [("someone/mamba", "v2", False), ("someone/mamba", "v2", True), ("someone/mamba", None, False)]


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        (huggingface_hub.errors.RepositoryNotFoundError, CheckpointNotFound, "neither a directory here nor a model"),
        (huggingface_hub.errors.GatedRepoError, CheckpointNotFound, "is gated"),
        (huggingface_hub.errors.RevisionNotFoundError, CheckpointNotFound, "no revision 'v9'"),
        (huggingface_hub.errors.LocalEntryNotFoundError, HubUnavailable, "cannot be fetched"),
        (ConnectionError, HubUnavailable, "cannot be fetched"),
    ],
)
def test_what_the_hub_answers_becomes_one_line(
    raised: type[Exception], error: type[CheckpointError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_args: Any, **_kwargs: Any) -> str:
        # the hub's own errors want a response to show
        raise raised.__new__(raised)

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(error, match=message):
        checkpoints.resolve("someone/mamba", "v9")


def test_offline_the_cache_is_enough_and_its_absence_is_said_clearly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    snapshot = tmp_path / "models--someone--mamba" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    (snapshot / "model.safetensors").touch()
    assert checkpoints.resolve("someone/mamba") == snapshot
    with pytest.raises(HubUnavailable, match="^'someone/else' is no directory here and cannot be fetched"):
        checkpoints.resolve("someone/else")


def test_every_error_is_of_the_tree() -> None:
    leaves = {CheckpointNotFound, HubUnavailable, InvalidConfig, InvalidWeights, UnsupportedModel}
    assert set(CheckpointError.__subclasses__()) == leaves
    assert all(leaf.__name__ in str(CheckpointError.__doc__) for leaf in leaves)
