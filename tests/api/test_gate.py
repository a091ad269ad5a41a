"""How many requests are begun before the event loop turns to anything else."""

from __future__ import annotations

import asyncio

import pytest

from app.api.gate import Gate

pytestmark = pytest.mark.anyio


class Turns:
    """Counts the turns of the event loop while it is counting."""

    def __init__(self) -> None:
        self.number = 0
        self._handle = asyncio.get_running_loop().call_soon(self._turn)

    def stop(self) -> None:
        self._handle.cancel()

    def _turn(self) -> None:
        self.number += 1
        self._handle = asyncio.get_running_loop().call_soon(self._turn)


async def enter_all(gate: Gate, count: int) -> list[tuple[int, int]]:
    """Who got through, and in which turn."""
    turns, through = Turns(), list[tuple[int, int]]()

    async def enter(name: int) -> None:
        await gate.enter()
        through.append((name, turns.number))

    await asyncio.gather(*(enter(name) for name in range(count)))
    turns.stop()
    return through


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 21])
async def test_a_turn_lets_a_few_through_in_order(count: int) -> None:
    gate = Gate(4)
    # as good as new once it has been idle
    for _ in range(3):
        through = await enter_all(gate, count)
        assert [name for name, _ in through] == list(range(count))
        by_turn = [sum(turn == other for _, other in through) for turn in {turn for _, turn in through}]
        assert max(by_turn) <= 4
        assert len(by_turn) == -(-count // 4)
        await asyncio.sleep(0.001)


async def test_who_comes_later_waits_behind_those_who_wait() -> None:
    gate, through = Gate(2), list[str]()

    async def enter(name: str) -> None:
        await gate.enter()
        through.append(name)

    tasks = [asyncio.create_task(enter(name)) for name in "abcdef"]
    await asyncio.sleep(0)
    assert through == ["a", "b"]
    tasks += [asyncio.create_task(enter(name)) for name in "ghi"]
    await asyncio.gather(*tasks)
    assert through == list("abcdefghi")


async def test_who_gives_up_takes_nobody_s_place() -> None:
    gate = Gate(2)
    tasks = [asyncio.create_task(gate.enter()) for _ in range(10)]
    await asyncio.sleep(0)
    for task in tasks[2:8]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [task.cancelled() for task in tasks] == [False] * 2 + [True] * 6 + [False] * 2
    assert len(await enter_all(gate, 5)) == 5


async def test_it_is_crowded_while_anybody_waits() -> None:
    gate = Gate(2)
    assert not gate.is_crowded
    tasks = [asyncio.create_task(gate.enter()) for _ in range(5)]
    await asyncio.sleep(0)
    assert gate.is_crowded
    await asyncio.gather(*tasks)
    assert not gate.is_crowded
