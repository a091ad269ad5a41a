"""The engine process as tests start it: no model, no torch, so that it is there at once, and faults on request.

The model's name in the settings says which: "kill_at=5" (SIGKILL before step 5), "hang_at=5", "slow_load=3" (seconds),
"crash_load=77" (exit status), "refuse=text" (the checkpoint is no good), "pace=0.01" (seconds a step takes), joined by
"&". "once=path" lifts the faults from the second start on.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qsl

from app.engine import process
from app.engine.config import EngineConfig
from app.engine.interface import EngineStartError
from app.engine.request import EngineStats, Event, GenerationRequest, ModelInfo, TokenLogprobs
from app.engine.scheduler import Scheduler
from app.engine.sequence import Sequence, StepPlan, StepResult

VOCAB_SIZE = 97


def expected_token(prompt_token_ids: tuple[int, ...], sample: int, position: int) -> int:
    """The token that the engine below puts at a position; never 0."""
    return 1 + (sum(prompt_token_ids) + 31 * sample + 7 * position) % (VOCAB_SIZE - 1)


class ScriptedEngine:
    """The real scheduler over a device that recites ``expected_token``."""

    def __init__(self, num_slots: int, faults: dict[str, str]) -> None:
        self._scheduler = Scheduler(num_slots, prefill_budget=16)
        self._faults = faults
        self._events: list[Event] = []
        self._num_steps = 0
        self._admissions: list[tuple[str, float]] = []

    @property
    def has_work(self) -> bool:
        return bool(self._events) or self._scheduler.has_work

    @property
    def is_compiling(self) -> bool:
        return False

    @property
    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        used = scheduler.num_running
        return EngineStats(used, scheduler.num_waiting, used, scheduler.num_slots, self._num_steps)

    def submit(self, request: GenerationRequest) -> None:
        self._scheduler.add(request)

    def abort(self, request_id: str, sample: int | None = None) -> None:
        self._events += self._scheduler.abort(request_id, sample)

    def take_admissions(self) -> list[tuple[str, float]]:
        admissions, self._admissions = self._admissions, []
        return admissions

    def prepare_more(self) -> bool:
        return False

    def check_integrity(self) -> None:
        self._scheduler.check_integrity()

    def step(self) -> list[Event]:
        events, self._events = self._events, []
        if not self._scheduler.has_work:
            return events
        self._num_steps += 1
        self._misbehave()
        plan = self._scheduler.plan()
        self._admissions += [(request.request_id, time.monotonic()) for request in plan.admitted]
        return events + self._scheduler.commit(plan, recite(plan))

    def _misbehave(self) -> None:
        time.sleep(float(self._faults.get("pace", 0)))
        if self._num_steps == int(self._faults.get("kill_at", -1)):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._num_steps == int(self._faults.get("hang_at", -1)):
            time.sleep(3600)


def recite(plan: StepPlan) -> StepResult:
    slices = {
        index: tuple(TokenLogprobs(-1.0 - position) for position in range(chunk.start, chunk.end))
        for index, chunk in enumerate(plan.chunks)
        if chunk.wants_logprobs
    }
    logprobs = {
        row: TokenLogprobs(-0.5, ((1, -0.5), (2, -float("inf")))[: sequence.request.sampling.logprobs])
        for row, sequence in enumerate(plan.rows)
        if sequence.request.sampling.logprobs is not None
    }
    return StepResult([_next_token(sequence) for sequence in plan.rows], frozenset(), logprobs, slices)


def _next_token(sequence: Sequence) -> int:
    return expected_token(sequence.request.prompt_token_ids, sequence.sample, sequence.position)


def load(config: EngineConfig, report_checked: Callable[[str], None]) -> tuple[ScriptedEngine, ModelInfo]:
    faults = _read_faults(config.model)
    if "refuse" in faults:
        raise EngineStartError(faults["refuse"])
    report_checked("/scripted")
    time.sleep(float(faults.get("slow_load", 0)))
    if "crash_load" in faults:
        os._exit(int(faults["crash_load"]))
    num_slots = config.max_num_seqs or 4
    sizes = {"num_parameters": 0, "vocab_size": VOCAB_SIZE, "num_layers": 0, "hidden_size": 0, "state_bytes_per_seq": 0}
    types = {"architecture": "Scripted", "dtype": "none", "state_dtype": "none", "device": "none"}
    ids = {"bos_token_id": None, "eos_token_ids": (0,), "pad_token_id": None}
    info = ModelInfo(model_dir="/scripted", max_num_seqs=num_slots, **sizes, **types, **ids)  # type: ignore[arg-type]
    return ScriptedEngine(num_slots, faults), info


def _read_faults(model: str) -> dict[str, str]:
    faults = dict(parse_qsl(model))
    once = Path(faults.pop("once", os.devnull))
    if once.suffix and once.exists():
        return {}
    if once.suffix:
        once.touch()
    return faults


if __name__ == "__main__":
    sys.exit(process.main(load=load))
