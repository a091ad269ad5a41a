"""How many threads a step is given: all on a quiet machine, fewer where that is measured to be faster."""

from __future__ import annotations

from collections.abc import Callable

from mamba_core.ops.native.crew import Crew


class Machine:
    """Takes a time for each number of threads, and passes it on a clock of its own.

    ``sleepiness`` is of steps with at least ``from_size`` threads.
    """

    def __init__(self, seconds: Callable[[int], float], sleepiness: float, from_size: int = 2) -> None:
        self.now = 0.0
        self.seconds = seconds
        self.sleepiness = sleepiness
        self.from_size = from_size
        self.crew = Crew(lambda: self.now)

    def run(self, num_steps: int, *, most: int = 2, amount: int = 1) -> list[int]:
        """The numbers of threads that the steps were given."""
        sizes = []
        for _ in range(num_steps):
            size = self.crew.size(most)
            seconds = self.seconds(size)
            self.now += seconds
            self.crew.observe(amount, seconds, self.sleepiness if size >= self.from_size else 0.0)
            sizes.append(size)
        return sizes


def quiet(size: int) -> float:
    return 0.012 / size


def busy(size: int) -> float:
    # one of two cores is somebody else's
    return 0.012 if size == 1 else 0.030


def test_a_quiet_machine_gives_every_step_all_threads() -> None:
    assert set(Machine(quiet, sleepiness=0.05).run(2_000)) == {2}
    assert set(Machine(quiet, sleepiness=0.05).run(2_000, most=8)) == {8}


def test_threads_that_wait_for_each_other_become_fewer_if_that_is_faster() -> None:
    sizes = Machine(busy, sleepiness=0.9).run(2_000)

    assert sizes[:3] == [2, 2, 2]
    assert 1 in sizes[3:8]
    # more are tried from time to time
    assert 0.9 < sizes.count(1) / len(sizes) < 1


def test_threads_that_sleep_and_are_fast_all_the_same_stay() -> None:
    sizes = Machine(quiet, sleepiness=0.9).run(2_000)

    assert sizes[-1] == 2
    assert 0 < sizes.count(1) < 0.05 * len(sizes)


def test_all_threads_come_back_when_the_machine_is_quiet_again() -> None:
    machine = Machine(busy, sleepiness=0.9)
    machine.run(500)
    machine.seconds, machine.sleepiness = quiet, 0.0

    # within the longest pause between two trials
    machine.run(round(4.5 / quiet(1)))

    assert set(machine.run(500)) == {2}


def test_of_many_threads_only_those_on_busy_cores_are_given_up() -> None:
    # two of eight cores are somebody else's
    machine = Machine(lambda size: 0.1 / size if size <= 6 else 0.1, sleepiness=0.9, from_size=7)

    sizes = machine.run(5_000, most=8)

    assert sizes[-1_000:].count(6) > 800
    assert min(sizes) == 6


def test_steps_of_different_amounts_are_not_compared() -> None:
    machine = Machine(busy, sleepiness=0.9)

    sizes = [size for step in range(400) for size in machine.run(1, amount=step % 2)]

    assert set(sizes) == {2}


def test_another_setting_of_threads_begins_anew() -> None:
    machine = Machine(busy, sleepiness=0.9)
    machine.run(500)

    assert machine.run(1, most=4) == [4]
