"""int8 matrices on a GPU: the tokens of the layers one by one, and no more memory than they take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.engine.config import EngineConfig
from app.engine.loading import load_engine
from mamba_core import MambaConfig, MambaForCausalLM, checkpoints
from mamba_core.quantization import Int8Linear, quantize_int8
from tests.engine.fakes import make_request, run

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(2)
    model = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=512, num_hidden_layers=3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("graphs", [True, False])
def test_an_engine_writes_what_the_layers_find_likeliest(checkpoint: Path, dtype: str, graphs: bool) -> None:
    config = EngineConfig(str(checkpoint), dtype=dtype, quantization="int8", max_num_seqs=80, cuda_graphs=graphs)
    engine, info = load_engine(config, lambda _: None)
    assert info.dtype == "int8"
    while engine.prepare_more():
        pass
    # the same numbers in int8: they depend on the type that they were rounded from
    model = checkpoints.load(checkpoint, dtype=getattr(torch, dtype), device=torch.device("cpu"))
    quantize_int8(model)
    model.float()
    for num_rows in (1, 5, 70):
        prompts = {f"r{row}": [(7 * row + 3 * j) % 97 for j in range(1 + row % 40)] for row in range(num_rows)}
        requests = [make_request(name, prompt, 6, temperature=0.0) for name, prompt in prompts.items()]
        written = run(engine, *requests).tokens
        for name in list(prompts)[:8]:
            tokens = written[name, 0]
            assert len(tokens) == 6
            with torch.inference_mode():
                logits = model(torch.tensor([prompts[name] + tokens[:-1]])).logits[0, -6:]
            # the second likeliest may win where both are as close as the rounding of activations
            behind = logits.amax(1) - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            assert float(behind.max()) < 0.1 * float(logits.std())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@torch.inference_mode()
def test_a_product_of_many_rows_is_that_of_a_cpu(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    linear = torch.nn.Linear(300, 200)
    linear.weight.copy_(torch.randn(200, 300, generator=generator))
    x = torch.randn(70, 300, generator=generator).to(dtype)
    exact = Int8Linear(linear)
    expected = exact(x.float())
    y = exact.to("cuda")(x.to("cuda")).cpu()
    assert y.dtype == dtype
    assert float((y.float() - expected).norm() / expected.norm()) < 4 * torch.finfo(dtype).eps + 1e-6


def test_quantizing_takes_room_for_one_matrix_and_leaves_none() -> None:
    torch.cuda.empty_cache()
    config = MambaConfig(vocab_size=1000, hidden_size=1536, num_hidden_layers=8)
    model = MambaForCausalLM(config).to(torch.bfloat16).to("cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    quantize_int8(model)
    in_proj = 4 * 1536**2
    assert torch.cuda.max_memory_allocated() - before < 2 * in_proj
    # a byte less for each of their weights, but for the head, which was the embeddings as well
    saved = 8 * (in_proj + 2 * 1536**2) - 1000 * 1536
    assert before - torch.cuda.memory_allocated() > 0.9 * saved
