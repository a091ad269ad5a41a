"""Which slots are behind, as the host knows it: never too few, and settled before anything else continues them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from app.engine.engine import Engine
from app.engine.sequence import Sequence
from app.engine.states import States
from mamba_core import MambaCache, MambaConfig
from tests.engine.fakes import VOCAB_SIZE, HistoryModel, LaggingModel, graph_runner, make_cache, make_request, run

CONFIG = MambaConfig(vocab_size=8, hidden_size=6, state_size=3, num_hidden_layers=2)


class Recorder:
    """A settler that notes what it is asked for; more than two rows lag."""

    def __init__(self) -> None:
        self.settled: list[list[int]] = []

    def lags(self, num_rows: int) -> bool:
        return num_rows > 2

    def settle(self, slots: Tensor) -> None:
        self.settled.append(sorted(slots.tolist()))


def rows_of(*slots: int) -> tuple[Sequence, ...]:
    return tuple(Sequence(make_request(f"r{slot}"), 0, frozenset(), 0, slot, [1]) for slot in slots)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def states(recorder: Recorder) -> States:
    cache = MambaCache.from_config(CONFIG, 9, dtype=torch.float32, may_lag=True)
    assert cache.lag is not None
    cache.lag.phases.fill_(1)
    return States(cache, recorder)


def test_a_step_that_does_not_lag_has_its_own_rows_settled_once(states: States, recorder: Recorder) -> None:
    states.before_step(rows_of(1, 2, 3), 4)
    assert states.behind == {1, 2, 3}
    few = rows_of(2, 5)
    states.before_step(few, 2)
    states.before_step(few, 2)
    assert recorder.settled == [[2]]
    assert states.behind == {1, 3}


def test_a_start_settles_the_scratch_slot_so_that_later_nothing_is_compiled(states: States, recorder: Recorder) -> None:
    states.start()
    assert (recorder.settled, states.behind) == ([[0]], frozenset())


def test_the_size_of_the_graph_counts_not_that_of_the_step(states: States, recorder: Recorder) -> None:
    states.before_step(rows_of(1, 2), 4)
    assert states.behind == {1, 2}
    states.before_step(rows_of(1), 1)
    assert recorder.settled == [[1]]


def test_rows_that_stay_the_same_are_behind_again_once_they_were_settled(states: States, recorder: Recorder) -> None:
    rows = rows_of(1, 2, 3)
    states.before_step(rows, 3)
    states.settle([3, 7])
    assert (recorder.settled, states.behind) == ([[3]], {1, 2})
    states.before_step(rows, 3)
    assert states.behind == {1, 2, 3}


def test_fresh_slots_lack_nothing(states: States, recorder: Recorder) -> None:
    rows = rows_of(1, 2, 3)
    states.before_step(rows, 3)
    states.zero([2, 8])
    states.settle([2, 8])
    assert (recorder.settled, states.behind) == ([], {1, 3})
    assert states._cache.lag is not None
    assert states._cache.lag.phases.tolist() == [1, 1, 0, 1, 1, 1, 1, 1, 0]
    states.before_step(rows, 3)
    assert states.behind == {1, 2, 3}


def test_copies_lack_what_their_source_does(states: States) -> None:
    lag = states._cache.lag
    assert lag is not None
    lag.phases[5:] = 0
    lag.inputs[:, 1] = 3.0
    states.before_step(rows_of(1, 2, 3), 3)
    states.copy([(1, 6), (1, 7), (5, 3)])
    assert states.behind == {1, 2, 6, 7}
    assert lag.phases.tolist() == [1, 1, 1, 0, 1, 0, 1, 1, 0]
    assert (lag.inputs[:, [1, 6, 7]] == 3.0).all()


def test_without_a_settler_nothing_is_kept(recorder: Recorder) -> None:
    states = States(MambaCache.from_config(CONFIG, 9, dtype=torch.float32))
    states.before_step(rows_of(1, 2, 3), 4)
    states.settle([1, 2, 3])
    states.zero([1])
    states.copy([(1, 2)])
    assert (states.behind, recorder.settled) == (frozenset(), [])


def test_the_number_of_rows_crosses_the_limit_both_ways() -> None:
    cache = make_cache(8)
    model = LaggingModel(HistoryModel(), cache)
    runner = graph_runner(model, cache, VOCAB_SIZE, states=States(cache, model))
    engine = Engine(runner, num_slots=8, vocab_size=VOCAB_SIZE, prefill_budget=8)
    requests = [make_request(f"r{i}", [i + 1] * (1 + i % 3), 3 + 4 * (i % 4), n=1 + i % 2) for i in range(12)]
    tokens = run(engine, *requests).tokens
    assert 8 < model.num_settled < sum(request.max_tokens * request.n for request in requests) / 2
    plain = Engine(
        graph_runner(HistoryModel(), make_cache(8), VOCAB_SIZE), num_slots=8, vocab_size=VOCAB_SIZE, prefill_budget=8
    )
    assert tokens == run(plain, *requests).tokens
