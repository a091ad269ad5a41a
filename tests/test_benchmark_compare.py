"""The comparison with llama.cpp writes files that it reads, and compares what it says it does."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from app.serving.tokenizer import Tokenizer
from benchmarks import agreement, compare_llama_cpp, numerics
from benchmarks.contenders import Contender, EventClient, ours, random_prompts, serving
from benchmarks.streams import Outcome
from benchmarks.words import text_of, tokens_of, write_tokenizer
from mamba_core import checkpoints
from mamba_core.configuration_mamba import MambaConfig
from mamba_core.modeling_mamba import MambaForCausalLM
from tests.test_benchmark_streams import ANSWER, EVENT, USAGE, Wire, chunk

SHIPPED_MODEL = Path(__file__).parents[1] / "models" / "mamba-python-15m"
# a Python that has llama-cpp-python[server], for the tests against the real one
LLAMA_PYTHON = os.environ.get("LLAMA_PYTHON", "")


@pytest.fixture(scope="module")
def shipped() -> MambaForCausalLM:
    return checkpoints.load(SHIPPED_MODEL, dtype=torch.float32, show_progress=False)


def small_model(**changes: Any) -> MambaForCausalLM:
    torch.manual_seed(0)
    config = MambaConfig(**{"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, **changes})
    return MambaForCausalLM(config).eval().requires_grad_(False)


def test_words_are_tokens_in_every_tokenizer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 1200)
    tokenizer = Tokenizer.from_dir(tmp_path)
    tokens = [5, 1199, 119, 9, 0, 11, 1]
    assert tokenizer.encode(text_of(tokens)) == tokens
    assert tokenizer.decode(tokens) == text_of(tokens)
    assert tokens_of(text_of(tokens)) == tokens
    # each token alone is whole text, so that each is an event of a stream
    assert tokenizer.token_texts[:1200] == tuple(f" w{token}" for token in range(1200))


@pytest.mark.parametrize("text", ["w1", " w1 ", " w01", " w1 x w2", " w"])
def test_what_is_no_word_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a text of words"):
        tokens_of(text)


@pytest.mark.parametrize(("weight_type", "error"), [("F32", 0.0), ("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 1e-2)])
def test_a_gguf_holds_the_weights_under_its_names(tmp_path: Path, weight_type: str, error: float) -> None:
    gguf = pytest.importorskip("gguf")
    from benchmarks.gguf_of_mamba import read_tensor, write_gguf

    model = small_model(tie_word_embeddings=False, layer_norm_epsilon=3e-5, use_conv_bias=False)
    write_gguf(model, tmp_path / "model.gguf", weight_type)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    found = {tensor.name: torch.from_numpy(read_tensor(tensor).copy()) for tensor in reader.tensors}
    mixer = model.backbone.layers[1].mixer
    expected = {
        "token_embd.weight": model.backbone.embeddings.weight,
        "output.weight": model.lm_head.weight,
        "output_norm.weight": model.backbone.norm_f.weight,
        "blk.1.attn_norm.weight": model.backbone.layers[1].norm.weight,
        "blk.1.ssm_in.weight": mixer.in_proj.weight,
        "blk.1.ssm_x.weight": mixer.x_proj.weight,
        "blk.1.ssm_dt.weight": mixer.dt_proj.weight,
        "blk.1.ssm_out.weight": mixer.out_proj.weight,
    }
    for name, weight in expected.items():
        assert found[name].shape == weight.shape, name
        assert float((found[name] - weight).norm() / weight.norm()) <= error, name
    # never rounded: [D, K], [D, N], [D]
    assert torch.equal(found["blk.1.ssm_conv1d.weight"], mixer.conv1d.weight[:, 0])
    assert torch.equal(found["blk.1.ssm_conv1d.bias"], torch.zeros(64))
    assert torch.equal(found["blk.1.ssm_a"], -mixer.A_log.exp())
    assert torch.equal(found["blk.1.ssm_d"], mixer.D)
    assert torch.equal(found["blk.1.ssm_dt.bias"], mixer.dt_proj.bias)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    # its rows of two numbers fill no block of a quantised type
    assert kinds["blk.0.ssm_dt.weight"] == ("F16" if weight_type == "Q8_0" else weight_type)
    assert kinds["blk.0.ssm_in.weight"] == weight_type


def test_metadata_are_those_of_the_architecture(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from benchmarks.gguf_of_mamba import write_gguf

    write_gguf(small_model(), tmp_path / "model.gguf", "F16")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    values = {name: field.contents() for name, field in reader.fields.items()}
    assert values["general.architecture"] == "mamba"
    for key, value in {
        "embedding_length": 32,
        "block_count": 2,
        "ssm.conv_kernel": 4,
        "ssm.inner_size": 64,
        "ssm.state_size": 16,
        "ssm.time_step_rank": 2,
        "ssm.dt_b_c_rms": False,
    }.items():
        assert values[f"mamba.{key}"] == value, key
    assert values["mamba.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert values["tokenizer.ggml.tokens"] == [f" w{token}" for token in range(96)]
    # the head is the embedding
    assert "output.weight" not in {tensor.name for tensor in reader.tensors}
    # no token ends an answer early
    assert "tokenizer.ggml.eos_token_id" not in values


@pytest.mark.parametrize(("changes", "message"), [({"use_bias": True}, "biases"), ({"expand": 3}, "inner width")])
def test_a_model_that_llama_cpp_can_not_hold_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    pytest.importorskip("gguf")
    from benchmarks.gguf_of_mamba import write_gguf

    with pytest.raises(ValueError, match=message):
        write_gguf(small_model(**changes), tmp_path / "model.gguf", "F16")


def test_answers_may_part_at_a_near_tie_alone(shipped: MambaForCausalLM) -> None:
    prompt = numerics.prompts_of(str(SHIPPED_MODEL), 8192)[0]
    (continuation,) = numerics.continue_plainly(shipped, [prompt], 6)
    truth, ranked = continuation.tokens, continuation.candidates
    same = agreement.compare(shipped, [prompt], [truth], [truth])
    assert (same.gaps, same.num_equal_tokens) == ((), 6)
    assert same.num_distinct_tokens == len(set(truth))
    parted = [*truth[:4], int(ranked[4, 1]), 7]
    found = agreement.compare(shipped, [prompt], [truth], [parted])
    gap = float(continuation.logprobs[4, 0] - continuation.logprobs[4, 1])
    assert found.num_equal_tokens == 4
    assert found.gaps[0] == pytest.approx(gap, abs=1e-4)
    # whoever of the two is wrong
    assert agreement.compare(shipped, [prompt], [parted], [truth]).gaps == found.gaps
    assert found.is_near(gap + 1e-3)
    assert not found.is_near(gap - 1e-3)
    with pytest.raises(ValueError, match="the other 5"):
        agreement.compare(shipped, [prompt], [truth], [truth[:5]])


def test_the_table_has_medians_and_who_is_better() -> None:
    figures = compare_llama_cpp.Figures({})
    for value in (10.0, 30.0, 20.0):
        figures.add("8 streams", "tokens/s", "ours", value)
        figures.add("8 streams", "tokens/s", "theirs", value / 2)
        figures.add("first token", "ms", "ours", value)
        figures.add("first token", "ms", "theirs", 5 * value)
    figures.add("8 streams", "tokens/s", "slow", 1.0)
    *_, rate, time = figures.table().splitlines()
    assert rate == "| 8 streams, tokens/s | 20.0 | 10.0 | 1.0 | 2.00 |"
    assert time == "| first token, ms | 20.0 | 100.0 | – | 5.00 |"


def test_everyone_is_first_once() -> None:
    contenders = [Contender(name, "", lambda _: [], "/") for name in "abc"]
    orders = ["".join(c.name for c in compare_llama_cpp.in_turns(contenders, number)) for number in range(4)]
    assert orders == ["abc", "bca", "cab", "abc"]


def test_prompts_have_not_been_seen_before() -> None:
    prompts = [prompt for seed in range(3) for prompt in random_prompts(4, 9, 50_280, seed)]
    assert len({tuple(prompt[:2]) for prompt in prompts}) == 12
    assert prompts[:4] == random_prompts(4, 9, 50_280, 0)


def test_a_python_without_llama_cpp_is_told_what_to_do() -> None:
    with pytest.raises(SystemExit, match="/no/such/python does not run"):
        compare_llama_cpp.llama_version("/no/such/python")
    if not LLAMA_PYTHON:
        with pytest.raises(SystemExit, match="--llama-python"):
            compare_llama_cpp.llama_version(sys.executable)


def test_a_server_that_does_not_come_shows_its_log(tmp_path: Path) -> None:
    code = "print('no such weights'); raise SystemExit(3)"
    contender = Contender("broken", "", lambda _: [sys.executable, "-c", code], "/")
    with pytest.raises(SystemExit, match="no such weights"), serving(contender, tmp_path / "log"):
        pass


@pytest.mark.parametrize("usage", [USAGE, EVENT + b"data: [DONE]\n\n"])
def test_tokens_are_events_where_no_usage_is_told(usage: bytes) -> None:
    answer = ANSWER.replace(chunk(USAGE), chunk(usage))

    async def ask() -> Outcome:
        client, outcome = EventClient(), Outcome()
        client.connection_made(Wire(client, [answer]))
        await client.run(b"", outcome)
        return outcome

    outcome = asyncio.run(ask())
    assert outcome.num_tokens == (6 if usage is USAGE else 4)
    assert len(outcome.gaps) == 3


def test_our_server_is_asked_as_the_others_are(tmp_path: Path, shipped: MambaForCausalLM) -> None:
    write_tokenizer(tmp_path, 8192)
    prompt = numerics.prompts_of(str(SHIPPED_MODEL), 8192)[1]
    (truth,) = numerics.continue_plainly(shipped, [prompt], 8)
    with serving(ours(str(SHIPPED_MODEL), tmp_path, ["--dtype", "float32"], 1, 3), tmp_path / "log") as server:
        assert server.continue_greedily(prompt, 8) == truth.tokens
        outcome = server.stream(random_prompts(3, 20, 8192, 0), 12)
    assert (outcome.num_answers, outcome.num_tokens, len(outcome.first_tokens)) == (3, 36, 3)


@pytest.mark.skipif(not LLAMA_PYTHON, reason="LLAMA_PYTHON names no Python with llama-cpp-python[server]")
def test_the_whole_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    arguments = ["--model", str(SHIPPED_MODEL), "--llama-python", LLAMA_PYTHON, "--rounds", "1", "--tokens", "8"]
    arguments += ["--streams", "1,3", "--prompts", "70", "--greedy-prompts", "2", "--greedy-tokens", "12"]
    assert compare_llama_cpp.main([*arguments, "--dtype", "float32"]) == 0
    printed = capsys.readouterr()
    agreed, *lines = (json.loads(line) for line in printed.out.splitlines())
    assert agreed["equal_to_the_end"] == 2
    assert agreed["distinct_tokens"] > 5
    cases = {(line["contender"], line["case"]) for line in lines}
    names = ("1 stream", "3 streams", "prompt of 70 to first token")
    names += ("decode of 1 row", "decode of 3 rows", "prefill of 70")
    assert cases == {(who, name) for who in ("mamba-serve float32", "llama-cpp-python F16") for name in names}
    assert all("llama-cpp-python" in line["versions"] for line in lines)
    assert len(printed.err.strip().splitlines()[-8:]) == 8
