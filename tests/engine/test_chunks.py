"""How chunks are laid end to end, and which rows start behind them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import replace

from app.engine.chunks import MOST_IN_STEPS, chunks_of_rows, pack, ways_of
from app.engine.sequence import Chunk, Prefill, Sequence, StepPlan
from tests.engine.fakes import make_request


def prefill_of(name: str, length: int, slot: int, *, n: int = 1, max_tokens: int = 4) -> Prefill:
    request = make_request(name, range(length), max_tokens, n=n)
    sequences = [Sequence(request, sample, frozenset(), length - 1, slot + sample) for sample in range(n)]
    return Prefill(request, sequences, array("q", request.prompt_token_ids))


def plan_of(chunks: list[Chunk], done: list[Prefill], running: tuple[Sequence, ...] = ()) -> StepPlan:
    starting = [sequence for prefill in done if prefill.request.max_tokens > 0 for sequence in prefill.sequences]
    return StepPlan((), tuple(chunks), (), (*running, *starting), tuple(done))


def whole(prefill: Prefill) -> Chunk:
    return Chunk(prefill, 0, prefill.num_tokens)


def starts(plan: StepPlan) -> list[int]:
    return chunks_of_rows(plan, plan.chunks)


def test_chunks_lie_end_to_end_some_with_the_token_that_follows() -> None:
    a, b = prefill_of("a", 6, slot=4), prefill_of("b", 4, slot=2)
    chunks = (Chunk(a, 2, 4), whole(b))
    packed = pack(chunks)
    assert packed.tokens.tolist() == [2, 3, 0, 1, 2]
    assert (packed.slots.tolist(), packed.bounds.tolist(), packed.longest) == ([4, 2], [0, 2, 5], 3)
    packed = pack(chunks, [1])
    assert packed.tokens.tolist() == [2, 3, 0, 1, 2, 3]
    assert (packed.slots.tolist(), packed.bounds.tolist(), packed.longest) == ([4, 2], [0, 2, 6], 4)


def test_each_row_has_the_chunk_behind_which_it_starts() -> None:
    a, b, c = prefill_of("a", 6, slot=1), prefill_of("b", 9, slot=2), prefill_of("c", 3, slot=3, n=2)
    assert starts(plan_of([whole(a)], [a])) == [0]
    assert starts(plan_of([whole(a), Chunk(b, 0, 3), whole(c)], [a, c])) == [0, 2, 2]


def test_rows_that_do_not_all_start_behind_a_chunk_have_none() -> None:
    a, b, one = prefill_of("a", 6, slot=1), prefill_of("b", 9, slot=2), prefill_of("one", 1, slot=3)
    running = (prefill_of("r", 3, slot=4).sequences[0],)
    assert starts(plan_of([whole(a)], [a], running)) == []
    assert starts(plan_of([whole(a)], [a, one])) == []
    assert starts(plan_of([Chunk(b, 0, 3)], [])) == []
    assert starts(plan_of([], [one])) == []


def test_prompts_without_tokens_to_follow_start_nothing() -> None:
    a, silent = prefill_of("a", 6, slot=1), prefill_of("s", 5, slot=2, max_tokens=0)
    assert starts(plan_of([whole(silent), whole(a)], [silent, a])) == [1]
    assert starts(plan_of([whole(silent)], [silent])) == []


def test_rows_that_lack_tokens_draw_behind_their_chunk_as_well() -> None:
    a, forced = prefill_of("a", 6, slot=1), prefill_of("f", 4, slot=2)
    plan = replace(plan_of([whole(a)], [a], tuple(forced.sequences)), missing=(whole(forced),))
    assert chunks_of_rows(plan, plan.chunks + plan.missing) == [1, 0]
    # what is missing is taken elsewhere
    assert chunks_of_rows(plan, plan.chunks) == []
    other = prefill_of("r", 3, slot=4).sequences[0]
    assert chunks_of_rows(replace(plan, rows=(*plan.rows, other)), plan.chunks + plan.missing) == []


def spans(chunks: Iterable[Chunk]) -> list[tuple[str, int, int]]:
    return [(chunk.prefill.request.request_id, chunk.start, chunk.end) for chunk in chunks]


def test_a_token_goes_the_way_of_its_request() -> None:
    short, long = prefill_of("short", MOST_IN_STEPS + 1, slot=1), prefill_of("long", MOST_IN_STEPS + 2, slot=2)
    ways = ways_of(plan_of([whole(short), whole(long)], [short, long]))
    assert spans(ways.by_scan.values()) == [("long", 0, MOST_IN_STEPS + 1)]
    assert list(ways.by_scan) == [1]
    assert spans(ways.with_rows) == [("short", 0, MOST_IN_STEPS)]
    assert ways.in_steps == []
    # in pieces, and for several samples
    twins = prefill_of("twins", 9, slot=3, n=2)
    ways = ways_of(plan_of([Chunk(short, 0, 5), Chunk(long, 3, 8), whole(twins)], [twins]))
    assert spans(ways.by_scan.values()) == [("long", 3, 8)]
    assert list(map(spans, ways.in_steps)) == [[("short", 0, 5), ("twins", 0, 8)]]
    assert ways.with_rows == ()


def test_what_follows_a_prompt_is_taken_in_steps() -> None:
    prefill = prefill_of("a", 100, slot=1)
    prefill.tokens.extend(range(40))
    other = prefill_of("f", 4, slot=2)
    plan = replace(plan_of([whole(prefill)], [prefill], tuple(other.sequences)), missing=(whole(other),))
    ways = ways_of(plan)
    assert spans(ways.by_scan.values()) == [("a", 0, 99)]
    assert spans(ways.with_rows) == [("f", 0, 3), ("a", 99, 139)]
    request = replace(prefill.request, prompt_logprobs=0)
    ways = ways_of(plan_of([whole(scored := Prefill(request, prefill.sequences, prefill.tokens))], [scored]))
    assert spans(ways.by_scan.values()) == [("a", 0, 139)]
    assert (ways.in_steps, ways.with_rows) == ([], ())


def test_many_tokens_take_several_passes() -> None:
    prefills = [prefill_of(f"r{index}", 61, slot=index + 1) for index in range(4)]
    ways = ways_of(plan_of([whole(prefill) for prefill in prefills], prefills))
    assert ways.with_rows == ()
    assert list(map(spans, ways.in_steps)) == [
        [("r0", 0, 60), ("r1", 0, 60), ("r2", 0, 8)],
        [("r2", 8, 60), ("r3", 0, 60)],
    ]
