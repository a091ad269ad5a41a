"""The engine process loads a model without what only training and generate() need, and it is the same model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from app.engine.bare_import import import_for_serving
from mamba_core.configuration_mamba import MambaConfig

SHIPPED_MODEL = Path(__file__).parents[2] / "models" / "mamba-python-15m"
SCRIPT = """
import dataclasses, json, sys
if sys.argv[1] == "bare":
    from app.engine.bare_import import import_for_serving
    import_for_serving()
from app.engine.config import EngineConfig
from app.engine.loading import load_engine
from app.engine.request import GenerationRequest, SamplingParams

engine, info = load_engine(EngineConfig(sys.argv[2], device="cpu", max_num_seqs=2, num_threads=1), lambda _: None)
engine.submit(GenerationRequest("r", (5, 300, 17, 90), SamplingParams(temperature=0.0, logprobs=2), 12))
events = []
while engine.has_work:
    events += [(event.token_id, event.logprobs.logprob) for event in engine.step()]
heavy = [name for name in ("transformers", "torch._dynamo", "sympy") if name in sys.modules]
print(json.dumps({"info": dataclasses.asdict(info), "events": events, "heavy": heavy}))
"""


READ_CONFIGS = """
import json, sys
from pathlib import Path
if sys.argv[1] == "bare":
    from app.engine.bare_import import import_for_serving
    import_for_serving()
from mamba_core.checkpoints.errors import CheckpointError
from mamba_core.checkpoints.layouts import read_config
from mamba_core.configuration_mamba import FalconMambaConfig

names = (*json.loads(sys.argv[3]), "intermediate_size", "model_type", "dt_rank", "norm_eps", "name_or_path")
for directory in sorted(Path(sys.argv[2]).iterdir()):
    try:
        layout, config = read_config(directory)
        values = {name: getattr(config, name) for name in names}
        print(json.dumps([layout, isinstance(config, FalconMambaConfig), values, getattr(config, "mine", None)]))
    except CheckpointError as error:
        print(type(error).__name__, error)
"""
FIELDS = [name for name in vars(MambaConfig)["__annotations__"] if name not in ("attribute_map",)]
CONFIGS: list[dict[str, object]] = [
    {},
    {"hidden_size": 64, "time_step_rank": 7, "eos_token_id": [1, 2], "mine": 3, "torch_dtype": "bfloat16"},
    {
        "intermediate_size": 100,
        "dtype": "float16",
        "architectures": ["X"],
        "transformers_version": "4.39.0",
        "expand": 3,
    },
    {"model_type": "falcon_mamba", "mixer_rms_eps": 1e-5, "hidden_size": 32},
    {"norm_eps": 1e-4, "hidden_size": 32, "num_hidden_layers": 3, "fuse_norm": True},
    {"d_model": 32, "n_layer": 2, "vocab_size": 101, "ssm_cfg": {"d_state": 8, "dt_rank": 5}, "model_type": None},
    {"use_cache": False, "return_dict": False, "output_hidden_states": True, "id2label": {"0": "a"}, "max_length": 9},
    {"hidden_size": "768"},
    {"hidden_size": 0},
    {"state_size": 16.0},
    {"time_step_rank": None},
    {"use_bias": 1},
    {"layer_norm_epsilon": "small"},
    {"hidden_act": "relu"},
    {"dt_rank": 5, "time_step_rank": 6},
    {"time_step_min": 1.0},
    {"mixer_rms_eps": 1e-6},
    {"eos_token_id": "x"},
    {"num_hidden_layers": 10**6},
]


def read_configs(kind: str, directory: Path) -> list[str]:
    command = [sys.executable, "-c", READ_CONFIGS, kind, str(directory), json.dumps(FIELDS)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=SHIPPED_MODEL.parents[1])
    return result.stdout.splitlines()


def test_a_bare_import_reads_and_refuses_the_same_configurations(tmp_path: Path) -> None:
    for index, config in enumerate(CONFIGS):
        content = {name: value for name, value in ({"model_type": "mamba"} | config).items() if value is not None}
        if config.get("time_step_rank", 0) is None:
            content["time_step_rank"] = None
        (tmp_path / f"{index:02}").mkdir()
        (tmp_path / f"{index:02}" / "config.json").write_text(json.dumps(content))
    full, bare = read_configs("full", tmp_path), read_configs("bare", tmp_path)
    assert len(full) == len(CONFIGS)
    for config, expected, found in zip(CONFIGS, full, bare, strict=True):
        # transformers refuses wrong types before our own check of the same field does
        assert found == expected or found[:13] == expected[:13] == "InvalidConfig", config
    assert sum(line.startswith("InvalidConfig") for line in bare) == len(CONFIGS) - 7


def load(kind: str, model: Path) -> dict[str, object]:
    command = [sys.executable, "-c", SCRIPT, kind, str(model)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=SHIPPED_MODEL.parents[1])
    loaded: dict[str, object] = json.loads(result.stdout)
    return loaded


def test_a_bare_import_serves_the_same_model_without_the_slow_libraries(tmp_path: Path) -> None:
    for file in SHIPPED_MODEL.iterdir():
        if file.name != "generation_config.json":
            (tmp_path / file.name).symlink_to(file)
    # the ends of text that only this file names are known as well
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 3]}')
    full, bare = load("full", tmp_path), load("bare", tmp_path)
    assert len(full["heavy"]) == 3  # type: ignore[arg-type]
    assert bare["heavy"] == []
    assert bare["info"] == full["info"]
    assert bare["info"]["eos_token_ids"] == [0, 3]  # type: ignore[index]
    assert bare["events"] == full["events"]
    assert len(bare["events"]) == 12  # type: ignore[arg-type]


def test_a_package_that_is_imported_stays_as_it_is() -> None:
    import mamba_core

    import_for_serving()
    assert sys.modules["mamba_core"] is mamba_core
    assert "MambaForCausalLM" in vars(mamba_core)


def test_a_package_that_does_not_exist_is_named() -> None:
    with pytest.raises(ModuleNotFoundError, match="mamba_shore"):
        import_for_serving("mamba_shore")
