"""On a GPU: an engine whose steps of many rows leave states behind gives the tokens of one whose steps never do."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch

from app.engine.config import EngineConfig
from app.engine.cuda import cuda_runner, may_lag
from app.engine.engine import Engine
from app.engine.forced import STEPS_PER_CHUNK
from app.engine.loading import Placement, build_engine
from app.engine.matchers import Compiler
from app.engine.request import FinishReason, GenerationRequest
from app.engine.runner import Runner
from app.engine.sequence import StepPlan
from app.engine.share import PrefillShare
from mamba_core import MambaCache, MambaConfig, MambaForCausalLM
from mamba_core.lagging import Settler
from mamba_core.ops.lag import BEHIND
from mamba_core.ops.triton.step_tiles import SOME_ROWS_OF_NARROW
from tests.engine.fakes import VOCAB_SIZE, Transcript, make_request
from tests.engine.spelling import END, make_compiler, regex

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
NUM_SLOTS = 48
# a letter to choose, and after it seven that are certain
FORCED = regex("((a|b)cdiopxy){1,9}")


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    return make_compiler(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model() -> MambaForCausalLM:
    torch.manual_seed(0)
    made = MambaForCausalLM(MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=64, num_hidden_layers=3))
    # far from the initial symmetry, so that tokens vary
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made.eval().to(torch.bfloat16).to(GPU)
    return made


def make_runner(model: MambaForCausalLM, *, lags: bool, cuda_graphs: bool) -> Runner:
    cache = MambaCache.from_config(model.config, NUM_SLOTS + 1, dtype=torch.bfloat16, device=GPU, may_lag=lags)
    # what is read without having been written must show
    for state in (
        (cache.conv, cache.ssm) if cache.lag is None else (cache.conv, cache.ssm, cache.lag.inputs, cache.lag.b)
    ):
        state.fill_(torch.nan)
    runner = cuda_runner(model, cache, VOCAB_SIZE, cuda_graphs=cuda_graphs)
    runner.start()
    return runner


def wave(name: str, count: int) -> list[GenerationRequest]:
    """Requests of many lengths, most of them greedy, every fifth with two samples."""
    return [
        make_request(
            f"{name}-{i}",
            [(7 * i + j * j) % VOCAB_SIZE for j in range(1 + 11 * i % 37)],
            4 + 13 * i % 41,
            n=1 + (i % 5 == 0),
            temperature=1.0 if i % 5 == 0 else 0.0,
            seed=i,
        )
        for i in range(count)
    ]


@dataclass(slots=True)
class Play:
    """What an engine did: its plans, told by the slots that they name, and its events."""

    plans: list[tuple[object, ...]] = field(default_factory=list)
    transcript: Transcript = field(default_factory=Transcript)

    @property
    def num_crossings(self) -> int:
        """How often steps of rows came to be more than SOME_ROWS_OF_NARROW, or no more than that."""
        sizes = [len(rows) > SOME_ROWS_OF_NARROW for _, _, _, _, rows in self.plans if isinstance(rows, tuple) and rows]
        return sum(before != after for before, after in pairwise(sizes))


def assert_host_knows(runner: Runner) -> None:
    """Slots that lack a token on the device are among those of which the host thinks so."""
    if (lag := runner.cache.lag) is not None:
        assert set((lag.phases == BEHIND).nonzero()[:, 0].tolist()) - {0} <= runner._states.behind


def play(runner: Runner, compiler: Compiler, num_slots: int, fails_at: int | None = None) -> Play:
    """Several waves of requests, of which some are aborted and one step raises."""
    played = Play()

    def before_step(plan: StepPlan) -> None:
        chunks, missing = (
            [(c.prefill.slot, c.start, c.end) for c in of_plan] for of_plan in (plan.chunks, plan.missing)
        )
        played.plans.append((plan.fresh, chunks, plan.forks, missing, tuple(s.slot for s in plan.rows)))
        if len(played.plans) == fails_at:
            raise RuntimeError("an injected failure")
        # it waits for the device: not at every step, so that most are launched behind one that is in flight
        if len(played.plans) % 7 == 0:
            assert_host_knows(runner)

    engine = Engine(
        runner,
        num_slots=num_slots,
        vocab_size=VOCAB_SIZE,
        prefill_budget=512,
        before_step=before_step,
        grammars=compiler,
    )
    engine.submit(make_request("forced", [1, 2, 3], 72, n=4, temperature=1.0, seed=3, grammar=FORCED, stop=[END]))
    # when it is compiled must not decide beside what it runs
    while not engine.has_work:
        time.sleep(0.001)
    engine.submit(make_request("long", [5, 6], 5 * num_slots))
    for name, count in (("a", num_slots), ("b", num_slots // 2), ("c", num_slots + 10)):
        run_wave(engine, played.transcript, wave(name, count), num_slots * 3 // 5)
    while engine.has_work:
        played.transcript.add(engine.step())
        engine.check_integrity()
    assert_host_knows(runner)
    return played


def run_wave(engine: Engine, transcript: Transcript, requests: list[GenerationRequest], num_rows: int) -> None:
    """Step until none of the requests wait and fewer rows than ``num_rows`` are left; a few are aborted on the way."""
    for request in requests:
        engine.submit(request)
    number = 0
    while number < 12 or engine.stats.num_running >= num_rows or engine.stats.num_waiting:
        transcript.add(engine.step())
        engine.check_integrity()
        number += 1
        if number == 10:
            for request in requests[::9]:
                engine.abort(request.request_id)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many slots were settled each time, from now on."""
    counts: list[int] = []
    settle: Callable[[Settler, torch.Tensor], None] = Settler.settle

    def watched(settler: Settler, slots: torch.Tensor) -> None:
        counts.append(len(slots))
        settle(settler, slots)

    monkeypatch.setattr(Settler, "settle", watched)
    return counts


@pytest.fixture
def same_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step takes does not depend on how long others took; forced tokens are taken at once."""
    monkeypatch.setattr(PrefillShare, "observe", lambda *_: None)
    monkeypatch.setitem(STEPS_PER_CHUNK, "cuda", 0.0)


@pytest.mark.usefixtures("same_plans")
@pytest.mark.parametrize("fails_at", [None, 40])
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_tokens_are_those_of_an_engine_that_leaves_nothing_behind(
    model: MambaForCausalLM, compiler: Compiler, settled: list[int], cuda_graphs: bool, fails_at: int | None
) -> None:
    expected = play(make_runner(model, lags=False, cuda_graphs=cuda_graphs), compiler, NUM_SLOTS, fails_at)
    assert not settled
    runner = make_runner(model, lags=True, cuda_graphs=cuda_graphs)
    del settled[:]
    played = play(runner, compiler, NUM_SLOTS, fails_at)
    check(expected, played, settled)


def check(expected: Play, played: Play, settled: list[int]) -> None:
    # both saw the same rows together, so that the same kernels ran
    assert played.plans == expected.plans
    assert played.transcript.tokens == expected.transcript.tokens
    ends = {key: end.finish_reason for key, end in expected.transcript.ends.items()}
    assert {key: end.finish_reason for key, end in played.transcript.ends.items()} == ends
    assert set(ends.values()) >= {FinishReason.LENGTH, FinishReason.ABORT}
    assert played.num_crossings >= 4
    assert any(missing for _, _, _, missing, _ in played.plans)
    # at the crossings many at once, and not at every step
    assert max(settled) > NUM_SLOTS // 4
    assert len(settled) < len(played.plans) / 3


@pytest.mark.parametrize(
    ("state_dtype", "num_rows", "expected"),
    [
        (torch.float32, None, True),
        (torch.float32, SOME_ROWS_OF_NARROW + 1, True),
        (torch.float32, SOME_ROWS_OF_NARROW, False),
        (torch.bfloat16, None, False),
    ],
)
def test_states_may_lag_where_steps_are_faster_for_it(
    model: MambaForCausalLM, state_dtype: torch.dtype, num_rows: int | None, expected: bool
) -> None:
    assert may_lag(model, state_dtype, num_rows) == expected


@pytest.mark.parametrize("num_slots", [SOME_ROWS_OF_NARROW, SOME_ROWS_OF_NARROW + 1])
def test_an_engine_keeps_what_states_lack_if_it_has_many_rows(model: MambaForCausalLM, num_slots: int) -> None:
    config = EngineConfig("", device="cuda", max_num_seqs=num_slots)
    _, info = build_engine(model, config, Placement(GPU, torch.bfloat16, torch.float32))
    lags = num_slots > SOME_ROWS_OF_NARROW
    assert info.state_bytes_per_seq == MambaCache.slot_bytes(model.config, torch.bfloat16, may_lag=lags)
