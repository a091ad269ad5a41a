"""The fused sampler draws what ``distribution`` draws, row by row, interpreted on a CPU and compiled on a GPU."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.engine import distribution, fused_sampler_kernels
from app.engine.decoder import BROKEN
from app.engine.fused_sampler import SlotSampling, draw_tokens
from app.engine.request import GenerationRequest, SamplingParams
from app.engine.sampler import GREEDY_TEMPERATURE, Sampler
from app.engine.sequence import Sequence
from tests.compiling import records_of

ROOT = Path(__file__).parents[2]
HAS_GPU = torch.cuda.is_available()
SIZES = [1, 7, 255, 256, 257, 1024, 1025, 8192]

# of the total weight: how near to a boundary between two tokens a uniform may choose either
ROUNDING = 1e-6

EVERYTHING = [
    SamplingParams(temperature=0.0, top_p=0.5, top_k=3),
    SamplingParams(),
    SamplingParams(temperature=0.6),
    SamplingParams(top_k=1),
    SamplingParams(temperature=1.4, top_k=40),
    SamplingParams(top_k=10**9),
    SamplingParams(top_p=0.9),
    SamplingParams(temperature=1.3, top_p=0.3),
    SamplingParams(top_p=1e-6),
    SamplingParams(top_p=0.9999),
    SamplingParams(min_p=0.05),
    SamplingParams(min_p=1.0),
    SamplingParams(temperature=0.8, top_k=50, top_p=0.95),
    SamplingParams(temperature=2.0, top_k=100, top_p=0.7, min_p=0.02),
    SamplingParams(temperature=1e-5),
    SamplingParams(temperature=3e-5, top_p=0.9),
    SamplingParams(temperature=1e9),
    SamplingParams(temperature=1e9, top_p=0.5),
    SamplingParams(temperature=1e9, top_k=5),
]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(HAS_GPU, reason="kernels are compiled where there is a GPU")),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def random_logits(num_rows: int, num_tokens: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(num_rows, num_tokens, generator=torch.Generator().manual_seed(seed)) * scale


def key_of(row: int) -> int:
    return distribution.stream_key(row * 7919, row % 3)


def fused(logits: Tensor, params: list[SamplingParams], position: int = 5) -> tuple[list[int], list[bool]]:
    """Tokens and whether the logits were finite; the slots are in falling order and leave gaps."""
    num_rows = len(params)
    tables = SlotSampling(2 * num_rows + 1, logits.device)
    slots = [2 * (num_rows - row) for row in range(num_rows)]
    positions = [position + row for row in range(num_rows)]
    tables.write(slots, params, [key_of(row) for row in range(num_rows)], positions, [-7] * num_rows)
    before = logits.clone()
    tokens = draw_tokens(logits, torch.tensor(slots, device=logits.device), tables)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    assert tables.positions[slots].tolist() == [position + 1 for position in positions]
    last, is_finite = tables.last_tokens[slots], tokens != BROKEN
    assert torch.equal(torch.where(is_finite, last, BROKEN), tokens)
    assert (last >= 0).all()
    assert (last < logits.shape[1]).all()
    # what lies between was not touched
    assert not tables.last_tokens[1::2].any()
    return tokens.tolist(), is_finite.tolist()


def kept_weights(logits: Tensor, params: SamplingParams) -> Tensor:
    """The weights [1, V] of one row's logits [V] after all filters, by the functions of ``distribution``."""
    scaled = ((logits - logits.max()) / torch.tensor(params.temperature, dtype=torch.float32))[None]
    weights, size = scaled.exp(), len(logits)
    threshold = torch.tensor([params.min_p]).log() if params.min_p > 0 else torch.tensor([-torch.inf])
    if params.top_k > 0 or params.top_p < 1:
        top_k, top_p = torch.tensor([min(params.top_k, size)]), torch.tensor([params.top_p])
        kept = distribution.filter_thresholds(scaled, weights, top_k, top_p, num_candidates=size)
        threshold = torch.maximum(threshold, kept)
    return weights.masked_fill(scaled < threshold[:, None], 0)


def assert_drawn(token: int, logits: Tensor, params: SamplingParams, row: int, position: int) -> bool:
    """The token is that of ``distribution``, or a neighbour within rounding; says whether it is the very same."""
    if params.temperature < GREEDY_TEMPERATURE:
        assert token == logits.argmax()
        return True
    weights = kept_weights(logits, params)
    uniform = distribution.uniforms(torch.tensor([key_of(row)]), torch.tensor([position + row]))
    expected = distribution.invert(weights, uniform).item()
    assert weights[0, token] > 0
    ends = weights[0].double().cumsum(0)
    target, slack = uniform * ends[-1], ROUNDING * ends[-1]
    assert ends[token] - weights[0, token] - slack <= target <= ends[token] + slack, (token, expected)
    return token == expected


def assert_all_drawn(logits: Tensor, params: list[SamplingParams], position: int = 5) -> None:
    tokens, is_finite = fused(logits, params, position)
    assert is_finite == [True] * len(params)
    rows = zip(tokens, logits.cpu().float(), params, strict=True)
    same = [assert_drawn(token, x, p, row, position) for row, (token, x, p) in enumerate(rows)]
    # a boundary is within rounding of the uniform once in hundreds of rows
    assert same.count(False) <= 1 + len(same) // 200


# --- the uniforms


@triton.jit
def uniform_kernel(keys_ptr, positions_ptr, out_ptr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    number = fused_sampler_kernels.uniform(tl.load(keys_ptr + index), tl.load(positions_ptr + index))
    tl.store(out_ptr + index, number)


def test_uniforms_have_the_same_bits(device: torch.device) -> None:
    keys = torch.tensor([distribution.stream_key(seed, seed % 7) for seed in range(-2048, 2048)])
    positions = torch.arange(4096) * 977_777_777
    out = torch.empty(4096, dtype=torch.float64, device=device)
    uniform_kernel[(4,)](keys.to(device), positions.to(device), out, SIZE=1024)
    assert torch.equal(out.cpu(), distribution.uniforms(keys, positions))


# --- against the distribution


@pytest.mark.parametrize("size", [*SIZES, pytest.param(50280, marks=pytest.mark.slow)])
def test_every_parameter_draws_what_the_distribution_draws(size: int, device: torch.device) -> None:
    assert_all_drawn(random_logits(len(EVERYTHING), size, seed=size).to(device), EVERYTHING)


@pytest.mark.parametrize("scale", [0.0, 1e-4, 0.1, 30.0, 1e4, 1e30])
def test_flat_and_steep_logits(scale: float, device: torch.device) -> None:
    logits = random_logits(len(EVERYTHING), 1500, seed=2, scale=scale)
    assert_all_drawn(logits.to(device), EVERYTHING)


def test_logits_far_from_zero(device: torch.device) -> None:
    # one unit in the last place is 1/128 here, so distances tie
    assert_all_drawn(random_logits(len(EVERYTHING), 1100).add(1e5).to(device), EVERYTHING)


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-5, 0.3, 1.0, 1.0, 1.7, 50.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 200, 5000]),
    top_p=st.sampled_from([1.0, 1.0, 0.9, 0.31, 0.999, 1e-6]),
    min_p=st.sampled_from([0.0, 0.0, 0.1, 1e-4, 1.0]),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(PARAMS, min_size=1, max_size=4),
    st.sampled_from([3, 40, 300, 2100]),
    st.sampled_from([1, 3, 1000]),
    st.integers(0, 10**6),
)
def test_all_parameters_together(
    device: torch.device, params: list[SamplingParams], size: int, steps: int, seed: int
) -> None:
    # few distinct logits make many ties; an odd number of steps keeps sums of weights off the quantiles
    logits = (random_logits(len(params), size, seed) * steps).round() / steps
    assert_all_drawn(logits.to(device), params, position=seed)


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=1.7, top_k=9), SamplingParams(top_p=0.8)], ids=str
)
def test_frequencies_are_the_probabilities(params: SamplingParams, device: torch.device) -> None:
    count, size = (50_000, 30) if device.type == "cuda" else (100, 4)
    logits = random_logits(1, size, seed=3, scale=1.5)
    tables = SlotSampling(count, device)
    tables.write(range(count), [params] * count, [distribution.stream_key(12, 0)] * count, range(count), [0] * count)
    tokens = draw_tokens(logits.to(device).expand(count, -1), torch.arange(count, device=device), tables)
    counts = tokens.bincount(minlength=size).cpu()
    probabilities = kept_weights(logits[0], params)[0].double()
    probabilities /= probabilities.sum()
    assert not counts[probabilities == 0].any()
    deviations = (counts - count * probabilities) / (count * probabilities * (1 - probabilities) + 1).sqrt()
    # the draws are fixed; for honest ones a deviation above 5 comes once in 50,000 of these 30-token rows
    assert deviations.abs().max() < 5


def test_the_sampler_on_the_cpu_draws_the_same(device: torch.device) -> None:
    logits = random_logits(len(EVERYTHING), 500, seed=9)
    rows = tuple(
        Sequence(GenerationRequest("r", (1, 2), p, 100), row, frozenset(), 2, row + 1)
        for row, p in enumerate(EVERYTHING)
    )
    sampler = Sampler(len(rows) + 1, 500, torch.device("cpu"))
    expected = sampler.draw(logits.clone(), sampler.prepare(rows))
    tables, slots = SlotSampling(len(rows) + 1, device), [row.slot for row in rows]
    keys = [distribution.stream_key(row.request.sampling.seed, row.sample) for row in rows]
    tables.write(slots, EVERYTHING, keys, [row.position for row in rows], [0] * len(rows))
    tokens = draw_tokens(logits.to(device), torch.tensor(slots, device=device), tables)
    assert tokens.tolist() == expected.tokens.tolist()
    assert expected.is_finite.all()


# --- greedy and ties


def test_temperature_zero_takes_the_first_of_the_likeliest(device: torch.device) -> None:
    logits = torch.full((5, 3000), -1.0)
    logits[0, [7, 2500]] = 4.0
    logits[1, [2999, 2998]] = 1.0
    logits[3, [1023, 1024]] = 2.0
    logits[4] = torch.finfo(torch.float32).min
    tokens, _ = fused(logits.to(device), [SamplingParams(temperature=0.0)] * 5)
    assert tokens == [7, 2998, 0, 1023, 0]


@pytest.mark.parametrize("params", [SamplingParams(top_k=1), SamplingParams(top_p=1e-9), SamplingParams(min_p=1.0)])
def test_ties_at_a_threshold_are_kept_together(params: SamplingParams, device: torch.device) -> None:
    logits = random_logits(1, 2000, scale=1.0).repeat(40, 1)
    tied = [3, 900, 1100, 1999]
    logits[:, tied] = 9.0
    tokens, _ = fused(logits.to(device), [params] * 40)
    assert set(tokens) == set(tied)


@pytest.mark.parametrize("shift", [0.0, 1e-30, -40.0])
def test_more_ties_than_candidates_that_are_looked_at_together(shift: float, device: torch.device) -> None:
    params = [
        SamplingParams(top_k=7),
        SamplingParams(top_k=5002),
        SamplingParams(top_p=0.5),
        SamplingParams(top_k=6000),
    ]
    logits = torch.full((len(params), 10_000), -1.0)
    logits[:, ::2] = -1.0 + 2.0**-23
    logits[:, 1] = -5.0
    assert_all_drawn((logits + shift).to(device), params)


# --- rows and their neighbours


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("params", [EVERYTHING[0], EVERYTHING[1], EVERYTHING[13]], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_row_that_is_not_finite_is_told_and_hurts_nobody(
    value: float, params: SamplingParams, device: torch.device
) -> None:
    logits = random_logits(4, 1500)
    clean, _ = fused(logits.to(device), [params] * 4)
    logits[1, 1400] = value
    logits[2] = value
    tokens, is_finite = fused(logits.to(device), [params] * 4)
    assert is_finite == [True, False, False, True]
    assert (tokens[0], tokens[3]) == (clean[0], clean[3])
    assert tokens[1:3] == [BROKEN, BROKEN]


def test_a_row_draws_the_same_wherever_it_stands(device: torch.device) -> None:
    logits, size = random_logits(len(EVERYTHING), 1300, seed=4).to(device), len(EVERYTHING)
    tables = SlotSampling(size, device)
    keys, positions = [key_of(row) for row in range(size)], [40 + row for row in range(size)]

    def draw(rows: list[int]) -> list[int]:
        tables.write(range(size), EVERYTHING, keys, positions, [0] * size)
        tokens: list[int] = draw_tokens(logits[rows], torch.tensor(rows, device=device), tables).tolist()
        return tokens

    together = draw(list(range(size)))
    assert draw(list(reversed(range(size)))) == together[::-1]
    assert [draw([row])[0] for row in range(size)] == together


@pytest.mark.parametrize("num_tokens", [1030, 1032])
def test_rows_may_be_strided_and_narrow(num_tokens: int, device: torch.device) -> None:
    wide = torch.full((len(EVERYTHING), 1200), math.nan)
    wide[:, :num_tokens] = random_logits(len(EVERYTHING), num_tokens, seed=5)
    logits = wide.to(device)[:, :num_tokens]
    assert fused(logits, EVERYTHING)[0] == fused(logits.contiguous(), EVERYTHING)[0]
    narrow = logits.bfloat16()
    assert fused(narrow, EVERYTHING)[0] == fused(narrow.float(), EVERYTHING)[0]


def test_tokens_that_are_not_contiguous_are_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="contiguous"):
        draw_tokens(torch.zeros(4, 3, device=device).T, torch.zeros(3, dtype=torch.int64), SlotSampling(1, device))


def test_padding_rows_share_the_scratch_slot(device: torch.device) -> None:
    logits = random_logits(6, 300).to(device)
    tables = SlotSampling(4, device)
    tables.write([3, 1], [SamplingParams(), SamplingParams(top_k=4)], [key_of(0), key_of(1)], [5, 6], [0, 0])
    tokens = draw_tokens(logits, torch.tensor([3, 1, 0, 0, 0, 0], device=device), tables)
    assert tokens[:2].tolist() == fused(logits[:2], [SamplingParams(), SamplingParams(top_k=4)])[0]
    assert tokens[2:].tolist() == logits[2:].argmax(-1).tolist()
    assert tables.positions[1:].tolist() == [7, 0, 6]
    assert tables.last_tokens[1:].tolist() == [tokens[1], 0, tokens[0]]


def test_no_rows(device: torch.device) -> None:
    tables = SlotSampling(2, device)
    tables.write([], [], [], [], [])
    tokens = draw_tokens(torch.empty(0, 5, device=device), torch.empty(0, dtype=torch.int64, device=device), tables)
    assert tokens.shape == (0,)


# --- the tables


def test_entries_are_those_written_and_the_others_stay(device: torch.device) -> None:
    tables = SlotSampling(5, device)
    params = SamplingParams(temperature=0.5, top_k=7, top_p=0.25, min_p=0.125)
    tables.write([4, 1], [params, SamplingParams(temperature=9e-6)], [-(2**63), 2**63 - 1], [10**12, 3], [8, 9])
    assert tables.temperature.tolist() == [0, 0, 0, 0, 0.5]
    assert tables.top_k.tolist() == [0, 0, 0, 0, 7]
    assert tables.top_p.tolist() == [0, 1, 0, 0, 0.25]
    assert tables.floors.tolist() == pytest.approx([0, -math.inf, 0, 0, math.log(0.125)])
    assert tables.keys.tolist() == [0, 2**63 - 1, 0, 0, -(2**63)]
    assert tables.positions.tolist() == [0, 3, 0, 0, 10**12]
    assert tables.last_tokens.tolist() == [0, 9, 0, 0, 8]
    tables.write([4], [SamplingParams()], [1], [2], [3])
    assert (tables.temperature[4], tables.top_k[4], tables.positions[1]) == (1, 0, 3)


def test_positions_advance_with_every_draw(device: torch.device) -> None:
    logits = random_logits(1, 40, scale=0.1).to(device)
    tables, slots = SlotSampling(2, device), torch.tensor([1], device=device)
    tables.write([1], [SamplingParams()], [77], [3], [0])
    carried = [int(draw_tokens(logits, slots, tables)) for _ in range(10)]
    rebuilt = []
    for position in range(3, 13):
        tables.write([1], [SamplingParams()], [77], [position], [0])
        rebuilt.append(int(draw_tokens(logits, slots, tables)))
    assert carried == rebuilt
    assert len(set(carried)) > 3


# --- compiled


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One record per kernel and type of logits, from a process that compiles where this one interprets."""
    return records_of("tests.engine.compile_sampler_kernels", tmp_path_factory.mktemp("triton"))


def test_every_kernel_compiles(compiled: list[dict[str, Any]]) -> None:
    written = {name for name in vars(fused_sampler_kernels) if name.endswith("_kernel")}
    assert {record["kernel"] for record in compiled} == written
    assert all(record["cubin_bytes"] > 0 and record["type"] == "JITFunction" for record in compiled)


def test_logits_are_loaded_by_sixteen_bytes_and_no_stride_is_compiled_for(compiled: list[dict[str, Any]]) -> None:
    assert all(record["wide_loads"] > 0 for record in compiled if record["align"] >= 8)
    assert not [record for record in compiled if "row_units" in record["specialised"]]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_a_graph_draws_what_a_call_draws() -> None:
    gpu, num_rows = torch.device("cuda"), 64
    params = [EVERYTHING[row % len(EVERYTHING)] for row in range(num_rows)]
    keys = [key_of(row) for row in range(num_rows)]
    tables, slots = SlotSampling(num_rows, gpu), torch.arange(num_rows, device=gpu)
    static = torch.zeros(num_rows, 50280, device=gpu)
    draw_tokens(static, slots, tables)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = draw_tokens(static, slots, tables)
    for step in range(3):
        static.copy_(random_logits(num_rows, 50280, seed=step))
        torch.cuda.set_sync_debug_mode("error")
        tables.write(range(num_rows), params, keys, [step + row for row in range(num_rows)], [0] * num_rows)
        torch.cuda.set_sync_debug_mode("default")
        graph.replay()
        assert torch.equal(tables.last_tokens, tokens)
        drawn = tokens.tolist()
        same = [
            assert_drawn(token, x, p, row, step)
            for row, (token, x, p) in enumerate(zip(drawn, static.cpu(), params, strict=True))
        ]
        assert same.count(False) <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [8192, 50280, 262_147])
def test_large_batches(num_tokens: int) -> None:
    num_rows = 1024 if num_tokens < 100_000 else 64
    params = [EVERYTHING[row % len(EVERYTHING)] for row in range(num_rows)]
    for scale in (3.0, 0.5):
        logits = random_logits(num_rows, num_tokens, seed=1, scale=scale)
        tokens, is_finite = fused(logits.cuda(), params)
        assert all(is_finite)
        for row in range(0, num_rows, 5):
            assert_drawn(tokens[row], logits[row], params[row], row, 5)
