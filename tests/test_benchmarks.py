"""The benchmarks run, print what they promise, and compare with a floor that is computed rightly."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from app.serving.tokenizer import Tokenizer
from benchmarks import decode, in_process, interference, memory, numerics, prefill, random_checkpoint, start
from benchmarks.in_process import Subject, random_model
from benchmarks.machine import Machine, measure_machine
from benchmarks.plain import PlainMamba, bf16_product
from mamba_core import checkpoints

SHIPPED_MODEL = Path(__file__).parents[1] / "models" / "mamba-python-15m"
H200 = Machine("H200", copy_bytes_per_s=4.28e12, read_bytes_per_s=4.0e12, product_flops_per_s=780e12)


@pytest.fixture
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_process, "measure_machine", lambda *_: H200)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.usefixtures("known_machine")
def test_interference_times_rows_before_and_beside_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rows", "3", "--prompt", "600", "--tokens", "5"]
    interference.main(["--random", "tiny", "--device", "cpu", *arguments])
    case = lines(capsys)[-1]
    assert (case["rows"], case["prompt"]) == (3, 600)
    for when in ("undisturbed", "disturbed"):
        assert 0 < case[when]["median_ms"] <= case[when]["p99_ms"] <= case[when]["worst_ms"]
    # beside three rows it is not taken at once
    assert case["prompt_tokens_per_step"] < 600


@pytest.mark.usefixtures("known_machine")
def test_decode_prints_a_line_per_batch(capsys: pytest.CaptureFixture[str]) -> None:
    decode.main(["--random", "tiny", "--device", "cpu", "--batch", "1,3", "--tokens", "4", "--prompt", "5"])
    machine, *cases = lines(capsys)
    assert machine["copy_gb_per_s"] == 4280
    assert [(case["batch"], case["steps"]) for case in cases] == [(1, 4), (3, 4)]
    for case in cases:
        assert case["tokens_per_s"] == pytest.approx(1e3 * case["batch"] / case["ms_mean"], rel=0.01)
        assert case["ms_per_step"] > case["floor_ms"]
        assert {"python", "torch"} <= set(case["versions"])


@pytest.mark.usefixtures("known_machine")
def test_prefill_prints_a_line_per_shape(capsys: pytest.CaptureFixture[str]) -> None:
    prefill.main(["--random", "tiny", "--device", "cpu", "--shape", "1x40,3x7", "--repeats", "2"])
    _, *cases = lines(capsys)
    assert [case["shape"] for case in cases] == ["1x40", "3x7"]
    assert cases[1]["tokens_per_s"] == pytest.approx(21e3 / cases[1]["ms"], rel=0.01)


@pytest.mark.parametrize(("rows", "milliseconds"), [(1, 1.30), (64, 1.98), (256, 4.03)])
def test_floor_of_a_decode_step(rows: int, milliseconds: float) -> None:
    # 2.77 billion bf16 weights once, and 22 MiB of fp32 state per row read and written, at 4.28 TB/s
    device, dtype = torch.device("meta"), torch.bfloat16
    subject = Subject("2.8b", random_model("2.8b", device, dtype), device, dtype, torch.float32, H200)
    assert 1e3 * subject.floor_seconds(rows, rows) == pytest.approx(milliseconds, rel=0.01)


def test_floor_of_a_long_prompt_is_its_products() -> None:
    # 2.6 billion multiplications a token, at 780 TFLOP/s
    device, dtype = torch.device("meta"), torch.bfloat16
    subject = Subject("2.8b", random_model("2.8b", device, dtype), device, dtype, torch.float32, H200)
    assert 8192 / subject.floor_seconds(8192, 1) == pytest.approx(147_000, rel=0.02)


def test_rates_of_this_machine_are_finite_and_plausible() -> None:
    machine = measure_machine(torch.device("cpu"), torch.float32)
    assert 1e8 < machine.copy_bytes_per_s < 1e13
    assert 1e8 < machine.product_flops_per_s < 1e14


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from Linux")
def test_memory_tells_the_peaks_of_both_processes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "CASES", (memory.Case("small", 600, 3),))
    memory.main(["--model", str(SHIPPED_MODEL), "--device", "cpu", "--server-args", "--num-threads", "1"])
    (line,) = lines(capsys)
    assert (line["prompt_tokens"], line["output_tokens"]) == (600, 3)
    assert set(line["peak_rss_mib"]) == {"api", "engine"}
    # the engine holds torch, the other process does not
    assert line["peak_rss_mib"]["engine"] > 2 * line["peak_rss_mib"]["api"] > 50
    assert line["peak_rss_mib"]["engine"] >= line["ready_peak_rss_mib"]["engine"]


def test_a_random_checkpoint_loads_and_every_token_has_a_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["tiny", str(tmp_path / "tiny"), "--device", "cpu", "--shard-size", "1MB"]
    assert random_checkpoint.main(arguments) == 0
    (line,) = lines(capsys)
    assert line["files"] == len(list((tmp_path / "tiny").glob("*.safetensors"))) > 1
    model = checkpoints.load(tmp_path / "tiny", dtype=torch.bfloat16, show_progress=False)
    torch.manual_seed(0)
    made = random_model("tiny", torch.device("cpu"), torch.bfloat16)
    for name, value in model.state_dict().items():
        assert torch.equal(value, made.state_dict()[name]), name
    tokenizer = Tokenizer.from_dir(tmp_path / "tiny")
    assert tokenizer.decode([8192, in_process.VOCAB_SIZE - 1]) == " w8192 w50279"
    assert all(map(tokenizer.id_to_token_text, range(in_process.VOCAB_SIZE)))
    # what is there is not written over
    assert random_checkpoint.main(arguments) == 1


@pytest.mark.parametrize("product_error", [0.0, 0.02])
def test_plain_model_is_the_model(product_error: float) -> None:
    torch.manual_seed(0)
    model = random_model("tiny", torch.device("cpu"), torch.float32)
    plain = PlainMamba(model, bf16_product) if product_error else PlainMamba(model)
    tokens = torch.randint(0, in_process.VOCAB_SIZE, (3, 20))
    with torch.inference_mode():
        expected = model(tokens).logits
        state = plain.fresh_state(3)
        parts = [plain.hidden(part, state) for part in (tokens[:, :7], tokens[:, 7:8], tokens[:, 8:])]
        logits = plain.logits(torch.cat(parts, 1))
    error = float((logits - expected).norm() / expected.norm())
    assert error < (product_error or 1e-5)
    assert error > (1e-4 if product_error else 0)


def test_numerics_print_the_error_of_every_path(capsys: pytest.CaptureFixture[str]) -> None:
    numerics.main(["--random", "tiny", "--device", "cpu", "--rows", "2", "--length", "30"])
    exact = {line["path"]: line for line in lines(capsys)}
    assert set(exact) == {"prefill", "decode", "bf16 products alone"}
    assert exact["prefill"]["positions"] == 60
    assert max(exact["prefill"]["relative_error"], exact["decode"]["relative_error"]) < 1e-5
    assert 1e-4 < exact["bf16 products alone"]["relative_error"] < 0.05
    numerics.main(["--random", "tiny", "--device", "cpu", "--dtype", "bfloat16", "--rows", "2", "--length", "30"])
    rounded = {line["path"]: line["relative_error"] for line in lines(capsys)}
    assert 1e-4 < rounded["prefill"] < 3 * rounded["bf16 products alone"]


def test_numerics_compare_the_engine_with_the_plain_path(capsys: pytest.CaptureFixture[str]) -> None:
    numerics.main(["--model", str(SHIPPED_MODEL), "--device", "cpu", "--length", "0", "--tokens", "12"])
    *prompts, total = lines(capsys)
    assert len(prompts) == total["prompts"] == len(numerics.PROMPTS) >= 10
    assert total["tokens"] == 12 * len(prompts)
    assert total["disagreements"] == sum(len(prompt["disagreements"]) for prompt in prompts)
    assert total["disagreements_beyond_near_tie"] == 0


def test_a_disagreement_is_shown_and_the_rest_is_compared_behind_it() -> None:
    logprobs = torch.tensor([[-0.5, -0.9], [-0.7, -0.705], [-0.2, -3.0], [-0.1, -4.0]])
    candidates = torch.tensor([[5, 6], [7, 8], [9, 1], [2, 3]])
    continuation = numerics.Continuation((1,), [5, 7, 9, 2], candidates, logprobs)
    continuation.compare([5, 8, 4, 4])
    # what came after the difference had seen another token
    assert (continuation.num_compared, continuation.is_compared) == (2, False)
    continuation.compare([9, 77])
    assert continuation.is_compared
    near, far = continuation.disagreements
    assert (near["position"], near["gap"], near["engine_gap"], near["engine_token"]) == (1, 0.005, 0.005, 8)
    assert (far["position"], far["gap"], far["engine_gap"]) == (3, 3.9, None)
    total = numerics.summarize([continuation])
    assert (total["disagreements"], total["disagreements_beyond_near_tie"], total["largest_gap"]) == (2, 1, 3.9)
    assert total["first_differences_beyond_near_tie"] == 0


def test_start_tells_when_the_server_is_ready_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    start.main(["--model", str(SHIPPED_MODEL), "--device", "cpu", "--starts", "1", "--imports"])
    imports, line = lines(capsys)
    assert imports["seconds"]["all"] > imports["seconds"]["torch"] > 0.1
    # told to 10 ms, in which the last polls of the port and of the engine and the first token may all fall
    assert 0 < line["port_open_s"] <= line["ready_s"] <= line["first_token_s"]
    assert line["first_answer_ms"] > 0
    stages = line["stages_s"]
    assert {"importing", "checking the checkpoint", "loading the weights", "warming up"} <= set(stages)
    assert 0 < sum(stages.values()) < line["ready_s"]


def test_start_says_why_a_server_did_not_come(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="config.json"):
        start.main(["--model", str(tmp_path), "--device", "cpu", "--starts", "1"])
