"""How many prompt tokens a step takes beside the rows that stream."""

from __future__ import annotations

import dataclasses

import pytest

from app.engine.scheduler import BURST_SHARES, Scheduler
from app.engine.sequence import StepPlan, StepResult
from app.engine.share import FIRST_SHARE, LEAST_SHARE, PrefillShare
from tests.engine.scheduling import carry_out, request, step


def answer(plan: StepPlan, seconds_per_token: float, decode_seconds: float) -> StepResult:
    """As ``carry_out``, from a device of that speed."""
    return dataclasses.replace(
        carry_out(plan), prefill_seconds=seconds_per_token * plan.num_prefill_tokens, decode_seconds=decode_seconds
    )


def start_rows(scheduler: Scheduler, count: int) -> None:
    for index in range(count):
        scheduler.add(request(f"row{index}", max_tokens=10**6))
    while scheduler.num_waiting or not scheduler._running:
        step(scheduler)


def test_beside_many_rows_a_long_prompt_takes_as_long_a_share_of_a_step_as_they_do() -> None:
    scheduler = Scheduler(64, 8192)
    start_rows(scheduler, 32)
    scheduler.add(request("long", length=100_000))
    sizes = []
    for _ in range(30):
        plan = scheduler.plan()
        sizes.append(plan.num_prefill_tokens)
        scheduler.commit(plan, answer(plan, 1e-5, 2.5e-3))
    assert sizes[0] == FIRST_SHARE
    assert sizes[10:] == [256] * 20


def test_a_share_is_not_cut_for_what_every_share_costs() -> None:
    scheduler = Scheduler(64, 8192)
    start_rows(scheduler, 32)
    scheduler.add(request("long", length=1_000_000))
    sizes = []
    for _ in range(60):
        plan = scheduler.plan()
        sizes.append(plan.num_prefill_tokens)
        seconds = 2e-3 + 1e-6 * plan.num_prefill_tokens
        scheduler.commit(plan, dataclasses.replace(carry_out(plan), prefill_seconds=seconds, decode_seconds=0.4e-3))
    # 2 ms for nothing: a prompt token more costs a microsecond, and 512 of them a quarter of that
    assert min(sizes[5:]) >= 512
    assert max(sizes) <= 2048


@pytest.mark.parametrize("num_prompts", [1, 40])
def test_steps_with_one_prompt_or_many_teach_what_a_long_one_costs(num_prompts: int) -> None:
    scheduler = Scheduler(64, 8192)
    start_rows(scheduler, 20)
    for index in range(num_prompts):
        scheduler.add(request(f"short{index}", length=32, max_tokens=10**6))
    while scheduler.num_waiting:
        plan = scheduler.plan()
        scheduler.commit(plan, answer(plan, 4e-6, 1e-3))
    scheduler.add(request("long", length=100_000))
    assert scheduler.plan().num_prefill_tokens == 256


def test_steps_that_are_no_measure_teach_nothing() -> None:
    scheduler = Scheduler(64, 8192)
    for index in range(40):
        scheduler.add(request(f"row{index}", length=32, max_tokens=10**6))
    while scheduler.num_waiting or not scheduler._running:
        plan = scheduler.plan()
        scheduler.commit(plan, dataclasses.replace(carry_out(plan), prefill_seconds=0.0, decode_seconds=1e-3))
    scheduler.add(request("long", length=100_000))
    sizes = []
    for _ in range(30):
        plan = scheduler.plan()
        sizes.append(plan.num_prefill_tokens)
        scheduler.commit(plan, answer(plan, 4e-6, 1e-3))
    # 250 tokens take as long as the rows
    assert sizes[10:] == [256] * 20


def test_a_burst_of_prompts_is_taken_at_once_though_rows_run() -> None:
    scheduler = Scheduler(300, 8192)
    start_rows(scheduler, 10)
    for index in range(256):
        scheduler.add(request(f"burst{index}", length=32))
    plan, _ = step(scheduler)
    assert plan.num_prefill_tokens == 256 * 31
    assert len(plan.rows) == 266


@pytest.mark.parametrize(
    ("num_starting", "num_shares"), [(1, 1), (4, 1), (6, 1), (7, BURST_SHARES), (40, BURST_SHARES)]
)
def test_several_that_start_get_more_than_one_does(num_starting: int, num_shares: int) -> None:
    scheduler = Scheduler(300, 8192)
    start_rows(scheduler, 40)
    for index in range(num_starting):
        scheduler.add(request(f"next{index}", length=5000))
    share = scheduler._share.num_tokens
    assert step(scheduler)[0].num_prefill_tokens == num_shares * share


def test_a_budget_is_the_most_that_a_burst_gets() -> None:
    scheduler = Scheduler(300, 1000)
    start_rows(scheduler, 40)
    for index in range(20):
        scheduler.add(request(f"next{index}", length=5000))
    assert step(scheduler)[0].num_prefill_tokens == 1000


def test_prompts_that_wait_for_a_slot_do_not_count_as_starting() -> None:
    scheduler = Scheduler(33, 8192)
    start_rows(scheduler, 32)
    for index in range(100):
        scheduler.add(request(f"long{index}", length=5000))
    assert step(scheduler)[0].num_prefill_tokens == FIRST_SHARE


def test_alone_a_prompt_gets_the_whole_budget() -> None:
    scheduler = Scheduler(4, 8192)
    scheduler.add(request("long", length=20_000))
    assert step(scheduler)[0].num_prefill_tokens == 8192


@pytest.mark.parametrize(("seconds_per_token", "expected"), [(1e-2, LEAST_SHARE), (1e-9, 8192)])
def test_the_share_stays_within_bounds(seconds_per_token: float, expected: int) -> None:
    share = PrefillShare(8192)
    for _ in range(40):
        share.observe(share.num_tokens, seconds_per_token * share.num_tokens, 2e-3)
    assert share.num_tokens == expected


def test_a_step_that_took_less_than_its_share_does_not_raise_it() -> None:
    share = PrefillShare(8192)
    share.observe(10, 1e-6, 2e-3)
    assert share.num_tokens == FIRST_SHARE
    share.observe(10, 1.0, 2e-3)
    assert share.num_tokens < FIRST_SHARE


def test_what_was_not_measured_teaches_nothing() -> None:
    share = PrefillShare(8192)
    share.observe(512, 0.0, 0.0)
    assert share.num_tokens == FIRST_SHARE
