"""From settings to an engine: what the settings say happens, and what cannot be is told in one line."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from app.engine.config import EngineConfig
from app.engine.interface import EngineStartError
from app.engine.loading import load_engine
from app.engine.request import Grammar
from mamba_core import MambaConfig, MambaForCausalLM
from tests.engine import constrained
from tests.engine.fakes import make_request, run
from tests.engine.spelling import spell, write_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(2)
    config = MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2, state_size=4, eos_token_id=7)
    model = MambaForCausalLM(config)
    model.generation_config.eos_token_id = [7, 9]
    model.save_pretrained(directory)
    return directory


def test_settings_reach_the_engine(checkpoint: Path) -> None:
    checked: list[str] = []
    config = EngineConfig(
        str(checkpoint), dtype="bfloat16", state_dtype="bfloat16", device="cpu", max_num_seqs=3, prefill_budget=5
    )
    engine, info = load_engine(config, checked.append)
    assert checked == [info.model_dir] == [str(checkpoint)]
    assert (info.dtype, info.state_dtype, info.device, info.max_num_seqs) == ("bfloat16", "bfloat16", "cpu", 3)
    # 2 layers of 32 channels, each with 4 states and 3 taps of 2 bytes
    assert info.state_bytes_per_seq == 2 * 32 * (4 + 3) * 2
    assert info.eos_token_ids == (7, 9)
    assert engine.stats.num_steps == 0
    assert engine.stats.num_slots == 3
    engine.submit(make_request(prompt=[1] * 20))
    engine.step()
    assert engine.stats.last_step_prefill_tokens == 5
    assert len(run(engine).tokens["r", 0]) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "tpu"}, "device 'tpu'"),
        ({"device": "meta"}, "device 'meta' is not supported"),
        ({"device": "cuda:77"}, "no device cuda:77"),
        ({"dtype": "int8"}, "unknown dtype 'int8': use one of float32"),
        ({"quantization": "int4"}, "unknown quantization 'int4': use none or int8"),
        ({"state_dtype": "double"}, "unknown state_dtype 'double'"),
        ({"model": "/nowhere/at/all"}, "nowhere"),
    ],
)
def test_what_cannot_be_is_one_line(checkpoint: Path, changes: dict[str, str], message: str) -> None:
    config = EngineConfig(**({"model": str(checkpoint), "device": "cpu"} | changes))  # type: ignore[arg-type]
    with pytest.raises(EngineStartError, match=message):
        load_engine(config, lambda _: None)


def test_threads_are_set(checkpoint: Path) -> None:
    before = torch.get_num_threads()
    try:
        load_engine(EngineConfig(str(checkpoint), device="cpu", max_num_seqs=1, num_threads=2), lambda _: None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("multiplies", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_cpu_that_multiplies_bfloat16_keeps_weights_in_it(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, multiplies: bool, dtype: str
) -> None:
    monkeypatch.setattr("mamba_core.ops.native.multiplies_bfloat16", lambda: multiplies)
    caplog.set_level("INFO")
    _, info = load_engine(EngineConfig(str(checkpoint), device="cpu", max_num_seqs=1), lambda _: None)
    assert info.dtype == dtype
    assert f"weights in {dtype}, {torch.get_num_threads()} threads" in caplog.messages


def test_threads_are_as_many_as_usable_cores_unless_somebody_says(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr("app.engine.loading.usable_cores", lambda: 3)
    config = EngineConfig(str(checkpoint), device="cpu", max_num_seqs=1)
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        load_engine(config, lambda _: None)
        assert torch.get_num_threads() == 3
        torch.set_num_threads(1)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        load_engine(config, lambda _: None)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_cpu_a_request_comes_to_the_same_beside_others(tmp_path: Path, dtype: str) -> None:
    torch.manual_seed(3)
    model = MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=64, num_hidden_layers=3, state_size=16))
    model.save_pretrained(tmp_path)
    lengths = (1, 2, 3, 20, 40, 90)
    requests = [
        make_request(f"r{length}", [(7 * i + length) % 61 for i in range(length)], 6, temperature=1.0, logprobs=0)
        for length in lengths
    ]
    config = EngineConfig(str(tmp_path), dtype=dtype, device="cpu", max_num_seqs=16, prefill_budget=128)
    engine, _ = load_engine(config, lambda _: None)
    alone = {(r.request_id, 0): run(engine, r).events[r.request_id, 0] for r in requests}
    others = [make_request(f"other{i}", [i] * (5 * i + 1), 9) for i in range(8)]
    together = run(engine, *others[:4], *requests, *others[4:])
    for key, events in alone.items():
        assert [event.token_id for event in together.events[key]] == [event.token_id for event in events]
        for event, expected in zip(together.events[key], events, strict=True):
            assert event.logprobs is not None
            assert expected.logprobs is not None
            # another way through the layers changes 1e-2 in bfloat16
            assert abs(event.logprobs.logprob - expected.logprobs.logprob) < 1e-5


def test_int8_is_said_and_writes_tokens(checkpoint: Path) -> None:
    config = EngineConfig(str(checkpoint), dtype="float32", device="cpu", max_num_seqs=2)
    _, plain = load_engine(config, lambda _: None)
    engine, info = load_engine(replace(config, quantization="int8"), lambda _: None)
    assert (info.dtype, info.num_parameters) == ("int8", plain.num_parameters)
    engine.submit(make_request(prompt=[1] * 20))
    assert len(run(engine).tokens["r", 0]) == 4


@pytest.mark.parametrize("is_elsewhere", [True, False])
def test_grammars_find_the_tokenizer(checkpoint: Path, tmp_path: Path, is_elsewhere: bool) -> None:
    directory = shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "tokenizer" if is_elsewhere else directory)
    config = EngineConfig(str(directory), device="cpu", max_num_seqs=2)
    if is_elsewhere:
        config = replace(config, tokenizer=str(tmp_path / "tokenizer"))
    engine, info = load_engine(config, lambda _: None)
    request = make_request(max_tokens=9, stop=info.eos_token_ids, grammar=Grammar("regex", "[ab]{3}"))
    transcript = constrained.run(engine, request)
    *letters, end = transcript.tokens["r", 0]
    assert set(spell(letters)) <= set("ab")
    assert len(letters) == 3
    assert end in info.eos_token_ids
