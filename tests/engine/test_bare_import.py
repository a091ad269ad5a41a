"""The engine process loads a model without what only training and generate() need, and it is the same model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from app.engine.bare_import import import_for_serving

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
heavy = [name for name in ("transformers.modeling_utils", "torch._dynamo", "sympy") if name in sys.modules]
print(json.dumps({"info": dataclasses.asdict(info), "events": events, "heavy": heavy}))
"""


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
    assert len(full["heavy"]) > 1  # type: ignore[arg-type]
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
