"""An engine process without a model: every row gets a token with every beat, at almost no cost.

    python -m benchmarks.metronome ARGUMENTS

is started by a ``ProcessEngineClient`` in place of the real one; the model's name is the seconds between two beats.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable

from app.engine import process
from app.engine.config import EngineConfig
from app.engine.request import EngineStats, Event, FinishReason, GenerationRequest, ModelInfo, TokenEvent

# enough of them that no table of recent texts knows them all
_NUM_TOKENS = 4096


class Metronome:
    """As ``process.SteppingEngine``. Tokens are drawn once, from ``vocab_size``."""

    def __init__(self, seconds: float, num_slots: int, vocab_size: int) -> None:
        self._seconds = seconds
        self._num_slots = num_slots
        dice = random.Random(0)
        self._tokens = [dice.randrange(1, vocab_size) for _ in range(_NUM_TOKENS)]
        self._left: dict[tuple[str, int], int] = {}
        self._num_steps = 0
        self._next_beat = 0.0

    @property
    def has_work(self) -> bool:
        return bool(self._left)

    @property
    def is_compiling(self) -> bool:
        """No grammar is ever compiled."""
        return False

    @property
    def stats(self) -> EngineStats:
        num_rows = len(self._left)
        return EngineStats(num_rows, 0, num_rows, self._num_slots, self._num_steps)

    def submit(self, request: GenerationRequest) -> None:
        self._left.update({(request.request_id, sample): request.max_tokens for sample in range(request.n)})

    def abort(self, request_id: str, sample: int | None = None) -> None:
        for row in [row for row in self._left if row[0] == request_id and sample in (None, row[1])]:
            self._left[row] = 0

    def check_integrity(self) -> None:
        """There is nothing that could be wrong."""

    def take_admissions(self) -> list[tuple[str, float]]:
        """Nobody waits, so that nobody is told of."""
        return []

    def prepare_more(self) -> bool:
        """There is nothing to prepare."""
        return False

    def step(self) -> list[Event]:
        """Wait for the beat, unless it is late already, and give each row a token."""
        now = time.monotonic()
        if now < self._next_beat:
            time.sleep(self._next_beat - now)
        self._next_beat = max(now, self._next_beat) + self._seconds
        self._num_steps += 1
        return [self._advance(row, number) for number, row in enumerate(list(self._left))]

    def _advance(self, row: tuple[str, int], number: int) -> TokenEvent:
        left = self._left[row]
        if left > 1:
            self._left[row] = left - 1
            return TokenEvent(*row, self._tokens[(self._num_steps + 17 * number) % _NUM_TOKENS])
        del self._left[row]
        if left == 0:
            return TokenEvent(*row, None, finish_reason=FinishReason.ABORT)
        return TokenEvent(*row, self._tokens[number], finish_reason=FinishReason.LENGTH)


def load(config: EngineConfig, report_checked: Callable[[str], None]) -> tuple[Metronome, ModelInfo]:
    """As ``process.Loader``; ``config.revision`` says how large the vocabulary is."""
    report_checked("")
    num_slots, vocab_size = config.max_num_seqs or 1, int(config.revision or 2)
    info = ModelInfo(
        model_dir="",
        architecture="Metronome",
        num_parameters=0,
        vocab_size=vocab_size,
        num_layers=0,
        hidden_size=0,
        dtype="none",
        state_dtype="none",
        device="none",
        max_num_seqs=num_slots,
        state_bytes_per_seq=0,
        bos_token_id=None,
        eos_token_ids=(0,),
        pad_token_id=None,
    )
    return Metronome(float(config.model), num_slots, vocab_size), info


if __name__ == "__main__":
    sys.exit(process.main(load=load))
