"""Who runs next: the lowest priority first, among equals first come, first served; a slot per sample, no preemption.

Pure bookkeeping, no tensors.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from app.engine.request import (
    Event,
    FinishReason,
    GenerationRequest,
    Progress,
    PromptLogprobsEvent,
    TokenEvent,
    TokenLogprobs,
)
from app.engine.sequence import Chunk, Constraint, Forced, Prefill, Sequence, StepPlan, StepResult
from app.engine.share import PrefillShare
from app.engine.slots import SCRATCH_SLOT, SlotPool

# a step takes so many shares while fewer stream than so many times those that start beside a first one
BURST_RATIO = 8
BURST_SHARES = 4

NOT_FINITE = "the model produced NaN or Inf"


class Scheduler:
    """The books of the engine: a sequence waits, then prefills, then runs, and its slot is free again.

    ``plan`` says what the next step does, admits waiting requests and counts on the step being made; ``commit`` takes
    what it drew and returns the events. One more step may be planned before the last one is committed: then sequences
    may end in between, and what is drawn for them is ignored. ``force`` comes between a launch and both. After steps
    that raised, ``recover`` or ``fail`` takes the place of ``commit`` for all that are in flight.
    """

    def __init__(self, num_slots: int, prefill_budget: int) -> None:
        if prefill_budget < 1:
            raise ValueError(f"prefill_budget should be at least 1, got {prefill_budget}")
        self._slots = SlotPool(num_slots)
        self._prefill_budget = prefill_budget
        self._share = PrefillShare(prefill_budget)
        self._waiting: deque[Prefill] = deque()
        self._prefilling: list[Prefill] = []
        self._suspects: list[Prefill] = []
        # complete once the steps in flight are
        self._settling: list[Prefill] = []
        # take part in every step to come; after ends, the ended are still among them until the next plan
        self._running: tuple[Sequence, ...] = ()
        self._has_ended_rows = False
        # their last token is in flight
        self._ending: dict[Sequence, None] = {}
        self._num_joint_plans = 0
        self._last_plans: dict[int, dict[Sequence, None]] = {}
        # tokens that the states of running rows lack, besides the next one
        self._missing: dict[Sequence, Chunk] = {}
        self._live: dict[str, dict[int, Sequence]] = {}
        self._num_live = 0

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def num_slots(self) -> int:
        return self._slots.num_slots

    @property
    def num_running(self) -> int:
        """Samples that hold a slot, prefilling ones included."""
        return self._slots.num_held

    @property
    def num_waiting(self) -> int:
        """Samples that wait for a slot."""
        return self._num_live - self._slots.num_held

    def add(self, request: GenerationRequest, constraints: Iterable[Constraint] = ()) -> None:
        """Put a request behind those of its priority. Raises ValueError when it can never run.

        constraints: one for each sample, or none.
        """
        self.check(request)
        last, stop_token_ids = request.prompt_token_ids[-1], frozenset(request.stop_token_ids)
        samples = {sample: Sequence(request, sample, stop_token_ids, last) for sample in request.unfinished}
        for sample, constraint in enumerate(constraints):
            if sample in samples:
                samples[sample].constraint = constraint
        self._live[request.request_id] = samples
        self._num_live += len(samples)
        sequences, num_scored = list(samples.values()), 0
        if (progress := request.progress) is not None:
            sequences, num_scored = self._take_up(sequences, progress), progress.num_scored
        if not sequences:
            return
        prefill = _start_prefill(request, sequences, array("q", request.prompt_token_ids))
        prefill.num_reported = num_scored
        if (first := sequences[0].constraint) is not None:
            _open(prefill, first.opening(request.max_tokens - 1))
        self._queue(prefill)

    def check(self, request: GenerationRequest) -> None:
        """Raise ValueError when a request can never run."""
        if not 1 <= request.n <= self._slots.num_slots:
            raise ValueError(f"n = {request.n} is not between 1 and {self._slots.num_slots}, the rows that run at once")
        if not request.prompt_token_ids:
            raise ValueError("the prompt is empty")
        if request.request_id in self._live:
            raise ValueError(f"request {request.request_id} is live already")

    def abort(self, request_id: str, sample: int | None = None) -> list[Event]:
        """End one sample, or all of a request, in whatever phase it is. What is not live is ignored."""
        samples = self._live.get(request_id, {})
        chosen = [sequence for sequence in samples.values() if sample is None or sequence.sample == sample]
        return self._end(chosen, FinishReason.ABORT)

    def plan(self) -> StepPlan:
        """The next step, which may be empty. Admits what there is room for."""
        if self._has_ended_rows:
            self._running = tuple(sequence for sequence in self._running if not sequence.is_finished)
            self._has_ended_rows = False
        if self._suspects:
            draft = _Draft(self._prefill_budget)
            draft.take(self._suspects[0])
            plan = draft.plan((), is_solo=True)
        else:
            draft = _Draft(self._budget())
            for prefill in self._prefilling:
                draft.take(prefill)
            while draft.budget > 0 and self._waiting and len(self._waiting[0].sequences) <= self._slots.num_free:
                draft.admit(self._admit())
            plan = draft.plan(self._running, is_solo=False)
            if self._missing:
                plan = replace(plan, missing=self._take_missing())
        self._count_on(plan)
        return plan

    def force(self, plan: StepPlan, forced: Mapping[int, Forced]) -> list[Event]:
        """Book the tokens that are known once a step is launched, and all before are committed: those with which the
        samples that start begin, and those that follow whatever rows draw.

        What the step draws for the latter is not looked at, and their states lack the tokens but the last, which is
        the next one: the next plan has them.
        """
        events: list[Event] = []
        for prefill in plan.done:
            opening, prefill.opening = prefill.opening, ()
            for sequence in prefill.live_sequences if opening else ():
                events += [TokenEvent(prefill.request.request_id, sequence.sample, token) for token in opening]
        for row, run in forced.items():
            sequence = plan.rows[row]
            if not sequence.is_finished:
                events += self._force(sequence, run)
        return events

    def commit(self, plan: StepPlan, result: StepResult) -> list[Event]:
        """Book what a planned step did; the events are in the order in which they are to be delivered."""
        events: list[Event] = []
        for index, logprobs in result.prompt_logprobs.items():
            events += self._report(plan.chunks[index], logprobs)
        for prefill in plan.done:
            self._settling.remove(prefill)
            if prefill.request.max_tokens == 0:
                events += self._end(prefill.live_sequences, FinishReason.LENGTH)
        if plan.chunks and plan.rows:
            self._share.observe(plan.num_prefill_tokens, result.prefill_seconds, result.decode_seconds)
        return events + self._commit_rows(plan, result)

    def recover(self) -> None:
        """After steps that raised: no state can be trusted, so every admitted sequence is computed again, alone.

        Each is under suspicion until it has passed a step by itself; ``fail`` ends the one that does not.
        """
        for prefill in self._settling:
            # those that have more tokens by now are behind it
            prefill.sequences = [s for s in prefill.live_sequences if s.position == len(prefill.tokens)]
            for sequence in prefill.sequences:
                sequence.prefill = prefill
        ran = [sequence for sequence in (*self._running, *self._ending) if not sequence.is_finished]
        replays = [_start_replay(sequence) for sequence in ran if sequence.prefill is None]
        begun = [prefill for prefill in self._suspects + self._settling + self._prefilling if prefill.sequences]
        for prefill in begun:
            prefill.num_done = 0
        self._suspects = replays + begun
        self._prefilling, self._settling, self._running = [], [], ()
        self._ending.clear()
        self._last_plans.clear()
        self._missing.clear()

    def fail(self, plan: StepPlan, error: str) -> list[Event]:
        """End every sequence that took part in a step."""
        return self._end([s for s in plan.members if not s.is_finished], FinishReason.ERROR, error)

    def check_integrity(self) -> None:
        """Raise AssertionError unless slots, phases and the registry of live samples agree."""
        self._slots.check_integrity()
        begun_prefills = self._suspects + self._prefilling
        waiting = [sequence for prefill in self._waiting for sequence in prefill.sequences]
        begun = [sequence for prefill in begun_prefills for sequence in prefill.sequences]
        silent = [prefill for prefill in self._settling if prefill.request.max_tokens == 0]
        settling = [sequence for prefill in silent for sequence in prefill.live_sequences]
        running = [sequence for sequence in self._running if not sequence.is_finished]
        live = [sequence for samples in self._live.values() for sequence in samples.values()]
        placed = waiting + begun + settling + running + list(self._ending)
        assert len(placed) == len(set(placed)), "a sequence is in two phases"
        assert len(live) == self._num_live, "live sequences are miscounted"
        assert set(placed) == set(live), "a live sequence is lost or a dead one kept"
        held = [sequence.slot for sequence in placed[len(waiting) :]]
        assert sorted(held) == sorted(self._slots.held), "slots and the sequences that hold them differ"
        assert all(sequence.slot == SCRATCH_SLOT for sequence in waiting), "a waiting sequence holds a slot"
        assert all(prefill.sequences for prefill in [*self._waiting, *begun_prefills]), "a prefill is for nobody"
        assert all(s.prefill is None for s in placed[len(waiting) + len(begun) :]), "a running sequence prefills"
        limited = [sequence for sequences in self._last_plans.values() for sequence in sequences]
        assert sorted(map(id, limited)) == sorted(map(id, running)), "running rows have no last step, or others do"
        missing = {sequence for sequence in self._missing if not sequence.is_finished}
        assert missing <= set(running), "tokens are missing of a sequence that does not run"

    def _budget(self) -> int:
        """Prompt tokens for a joint step: all while more sequences would start than stream, else a small share, and a
        few times that while not many more stream.
        """
        num_prefilling = sum(len(prefill.sequences) for prefill in self._prefilling)
        num_starting = num_prefilling + min(self.num_waiting, self._slots.num_free)
        num_running = len(self._running)
        if num_running < num_starting:
            return self._prefill_budget
        # one alone may have a long prompt, for which those that stream must not wait again and again
        is_burst = num_running < BURST_RATIO * (num_starting - 1)
        return min(self._share.num_tokens * (BURST_SHARES if is_burst else 1), self._prefill_budget)

    def _count_on(self, plan: StepPlan) -> None:
        """Move everything to where it stands when the step has been made."""
        for chunk in plan.chunks:
            chunk.prefill.num_done = chunk.end
        self._num_joint_plans += not plan.is_solo
        number = self._num_joint_plans
        for prefill in plan.done:
            (self._suspects if plan.is_solo else self._prefilling).remove(prefill)
            self._settling.append(prefill)
            for sequence in prefill.sequences:
                sequence.prefill = None
                sequence.last_plan = number + sequence.num_left - 1
                if prefill.request.max_tokens > 0:
                    self._last_plans.setdefault(sequence.last_plan, {})[sequence] = None
        self._running = self._running + plan.rows if plan.is_solo else plan.rows
        if last := self._last_plans.pop(number, None):
            self._ending |= last
            self._running = tuple(sequence for sequence in self._running if sequence not in last)

    def _take_up(self, sequences: list[Sequence], progress: Progress) -> list[Sequence]:
        """Queue those that have output already, each alone; the others, which have a prefill in common."""
        for sequence in sequences:
            if output := progress.outputs[sequence.sample]:
                sequence.output.extend(output)
                sequence.next_token = output[-1]
                self._queue(_start_replay(sequence))
        return [sequence for sequence in sequences if not sequence.output]

    def _queue(self, prefill: Prefill) -> None:
        priority = prefill.request.priority
        place = len(self._waiting)
        while place > 0 and self._waiting[place - 1].request.priority > priority:
            place -= 1
        if place == len(self._waiting):
            self._waiting.append(prefill)
        else:
            self._waiting.insert(place, prefill)

    def _admit(self) -> Prefill:
        prefill = self._waiting.popleft()
        for sequence in prefill.sequences:
            sequence.slot = self._slots.allocate()
        self._prefilling.append(prefill)
        return prefill

    def _report(self, chunk: Chunk, logprobs: tuple[TokenLogprobs, ...] | None) -> list[Event]:
        prefill = chunk.prefill
        if not (live := prefill.live_sequences):
            return []
        if logprobs is None:
            return self._end(live, FinishReason.ERROR, NOT_FINITE)
        start = max(chunk.start, prefill.num_reported) + 1
        prefill.num_reported = chunk.end
        return [PromptLogprobsEvent(prefill.request.request_id, start, logprobs)]

    def _force(self, sequence: Sequence, run: Forced) -> list[Event]:
        events: list[Event] = []
        for token in run.tokens:
            event = sequence.accept(token)
            events.append(event)
            if event.finish_reason is not None:
                break
        else:
            if run.end is None:
                self._run_on(sequence, run.tokens)
                return events
            events.append(sequence.end(run.end.reason, run.end.error))
        self._release(sequence)
        return events

    def _run_on(self, sequence: Sequence, tokens: tuple[int, ...]) -> None:
        """Go on behind tokens that were not drawn."""
        self._drop_last_plan(sequence)
        sequence.last_plan = self._num_joint_plans + sequence.num_left
        self._last_plans.setdefault(sequence.last_plan, {})[sequence] = None
        if len(tokens) > 1:
            missing = Prefill(sequence.request, [sequence], array("q", tokens))
            missing.num_reported = missing.num_tokens
            self._missing[sequence] = Chunk(missing, 0, missing.num_tokens)

    def _take_missing(self) -> tuple[Chunk, ...]:
        """What rows of the next step lack. Those that ended need nothing."""
        missing, self._missing = self._missing, {}
        return tuple(chunk for sequence, chunk in missing.items() if not sequence.is_finished)

    def _commit_rows(self, plan: StepPlan, result: StepResult) -> list[Event]:
        events: list[Event] = []
        logprobs, broken = result.logprobs, result.broken
        drawn: Iterator[tuple[int, tuple[Sequence, int]]] = enumerate(zip(plan.rows, result.tokens, strict=True))
        if result.forced:
            drawn = (one for one in drawn if one[0] not in result.forced)
        for row, (sequence, token) in drawn:
            if sequence.is_finished:
                continue
            if row in broken:
                event = sequence.end(FinishReason.ERROR, NOT_FINITE)
            elif row in result.ends:
                event = sequence.end(result.ends[row].reason, result.ends[row].error)
            else:
                event = sequence.accept(token, logprobs.get(row))
            if event.finish_reason is not None:
                self._release(sequence)
            events.append(event)
        return events

    def _end(self, sequences: Iterable[Sequence], reason: FinishReason, error: str | None = None) -> list[Event]:
        events: list[Event] = []
        for sequence in sequences:
            if sequence.prefill is not None:
                self._leave(sequence.prefill, sequence)
            self._release(sequence)
            events.append(sequence.end(reason, error))
        return events

    def _leave(self, prefill: Prefill, sequence: Sequence) -> None:
        """Take one sequence out of a prefill; the state built so far goes on under the next one."""
        first = prefill.sequences[0]
        prefill.sequences.remove(sequence)
        if not prefill.sequences:
            self._phase_of(prefill).remove(prefill)
        elif sequence is first:
            heir = prefill.sequences[0]
            sequence.slot, heir.slot = heir.slot, sequence.slot

    def _phase_of(self, prefill: Prefill) -> list[Prefill] | deque[Prefill]:
        for phase in (self._suspects, self._prefilling):
            if prefill in phase:
                return phase
        return self._waiting

    def _release(self, sequence: Sequence) -> None:
        sequence.is_finished = True
        if sequence in self._ending:
            del self._ending[sequence]
        elif sequence.prefill is None:
            self._has_ended_rows = True
            self._drop_last_plan(sequence)
        if sequence.slot != SCRATCH_SLOT:
            self._slots.free(sequence.slot)
            sequence.slot = SCRATCH_SLOT
        self._num_live -= 1
        samples = self._live[sequence.request.request_id]
        del samples[sequence.sample]
        if not samples:
            del self._live[sequence.request.request_id]

    def _drop_last_plan(self, sequence: Sequence) -> None:
        if limited := self._last_plans.get(sequence.last_plan):
            limited.pop(sequence, None)
            if not limited:
                del self._last_plans[sequence.last_plan]


class _Draft:
    """A plan in the making: prefills take their share of the budget in the order in which they are given."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._fresh: list[int] = []
        self._chunks: list[Chunk] = []
        self._done: list[Prefill] = []
        self._admitted: list[GenerationRequest] = []

    def take(self, prefill: Prefill) -> None:
        num_tokens = min(self.budget, prefill.num_left)
        if num_tokens == 0 < prefill.num_left:
            return
        if prefill.num_done == 0:
            self._fresh.append(prefill.slot)
        if num_tokens > 0:
            self._chunks.append(Chunk(prefill, prefill.num_done, prefill.num_done + num_tokens))
        if num_tokens == prefill.num_left:
            self._done.append(prefill)
        self.budget -= num_tokens

    def admit(self, prefill: Prefill) -> None:
        """Take one that has waited."""
        self._admitted.append(prefill.request)
        self.take(prefill)

    def plan(self, running: tuple[Sequence, ...], *, is_solo: bool) -> StepPlan:
        starting = [prefill for prefill in self._done if prefill.request.max_tokens > 0]
        forks = [(prefill.slot, copy.slot) for prefill in starting for copy in prefill.sequences[1:]]
        rows = tuple(sequence for prefill in starting for sequence in prefill.sequences)
        rows = running + rows if rows else running
        return StepPlan(
            tuple(self._fresh),
            tuple(self._chunks),
            tuple(forks),
            rows,
            tuple(self._done),
            is_solo,
            admitted=tuple(self._admitted),
        )


def _start_prefill(request: GenerationRequest, sequences: list[Sequence], tokens: array[int]) -> Prefill:
    prefill = Prefill(request, sequences, tokens)
    for sequence in sequences:
        sequence.prefill = prefill
    return prefill


def _start_replay(sequence: Sequence) -> Prefill:
    """The prefill of all that a sequence has, by itself and without a word."""
    prefill = _start_prefill(sequence.request, [sequence], sequence.tokens)
    prefill.num_reported = prefill.num_tokens
    return prefill


def _open(prefill: Prefill, opening: tuple[int, ...]) -> None:
    """Have sequences that have no output yet begin with these tokens."""
    if not opening:
        return
    prefill.tokens.extend(opening)
    prefill.opening = opening
    for sequence in prefill.sequences:
        sequence.output.extend(opening)
        sequence.next_token = opening[-1]
