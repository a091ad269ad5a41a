"""What may follow, bit by bit, against plain sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.engine.constraints import NOTHING_ALLOWED, Constraint, constraints_of
from app.engine.masks import FORBIDDEN, Mask
from app.engine.matchers import Matcher, Words, num_words
from app.engine.request import FinishReason, GenerationRequest, SamplingParams
from app.engine.sequence import RowEnd
from tests.engine.fakes import make_request
from tests.engine.spelling import END, make_compiler, regex, spell, tokens_of

VOCAB_SIZE = 53
ALL = set(range(VOCAB_SIZE))


def ids_of(words: Words) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def allowed_by(constraint: Constraint) -> set[int] | RowEnd:
    words = np.empty(num_words(VOCAB_SIZE), dtype=np.int32)
    end = constraint.write(words)
    if end is None:
        return ids_of(words)
    assert ids_of(words) >= ALL
    return end


def constraint_of(request: GenerationRequest, matcher: Matcher | None = None) -> Constraint:
    (constraint,) = constraints_of(request, VOCAB_SIZE, matcher)
    constraint.restart(())
    return constraint


token_ids = st.integers(0, VOCAB_SIZE - 1)
requests = st.builds(
    make_request,
    prompt=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    stop=st.lists(st.integers(0, VOCAB_SIZE + 9), max_size=3),
    min_tokens=st.integers(0, 4),
    allowed_token_ids=st.none() | st.lists(token_ids, min_size=1, max_size=60).map(tuple),
    bad_words=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple), max_size=4).map(tuple),
)


def plainly_allowed(request: GenerationRequest, output: list[int]) -> set[int]:
    sampling = request.sampling
    allowed = ALL if sampling.allowed_token_ids is None else set(sampling.allowed_token_ids)
    if len(output) < sampling.min_tokens:
        allowed = allowed - set(request.stop_token_ids)
    text = [*request.prompt_token_ids, *output]
    ends = {word[-1] for word in sampling.bad_words if [*word[:-1]] == text[len(text) - len(word) + 1 :]}
    return allowed - ends


@settings(max_examples=300, deadline=None, derandomize=True)
@given(requests, st.lists(st.integers(0, 3), max_size=6), st.integers(0, 6))
def test_what_may_follow_is_what_the_rules_say(request_: GenerationRequest, output: list[int], start: int) -> None:
    made = constraints_of(request_, VOCAB_SIZE)
    if not made:
        assert all(plainly_allowed(request_, output[:end]) == ALL for end in range(len(output) + 1))
        return
    (constraint,) = made
    constraint.restart(output[:start])
    for end in range(min(start, len(output)), len(output) + 1):
        expected = plainly_allowed(request_, output[:end])
        found = allowed_by(constraint)
        assert found == (expected or RowEnd(FinishReason.INVALID, NOTHING_ALLOWED))
        assert not constraint.is_over or expected == ALL
        if end < len(output):
            constraint.accept(output[end])


def test_who_forbids_nothing_has_no_constraint() -> None:
    assert constraints_of(make_request(stop=[3], n=3), VOCAB_SIZE) == []
    assert constraints_of(make_request(min_tokens=5), VOCAB_SIZE) == []
    assert len(constraints_of(make_request(stop=[3], min_tokens=5, n=3), VOCAB_SIZE)) == 3


def test_stop_tokens_may_follow_once_there_are_enough() -> None:
    constraint = constraint_of(make_request(stop=[7, 9], min_tokens=2))
    for token in (1, 2):
        assert not constraint.is_over
        assert allowed_by(constraint) == ALL - {7, 9}
        constraint.accept(token)
    assert constraint.is_over
    # computed again after a fault, with one token less
    constraint.restart([1])
    assert not constraint.is_over
    assert allowed_by(constraint) == ALL - {7, 9}


def test_a_sample_that_is_lost_is_let_go() -> None:
    constraint = constraint_of(make_request(allowed_token_ids=(4,)))
    constraint.accept(-1)
    words = np.empty(num_words(VOCAB_SIZE), dtype=np.int32)
    assert constraint.write(words) is None
    assert ids_of(words) >= ALL


# --- with a grammar


@pytest.fixture(scope="module")
def matcher(tmp_path_factory: pytest.TempPathFactory) -> Matcher:
    return make_compiler(tmp_path_factory.mktemp("tokenizer")).compile(regex("ab?c"))


def test_a_grammar_and_the_end_of_text(matcher: Matcher) -> None:
    constraint = constraint_of(make_request(stop=[END]), matcher)
    for token in tokens_of("abc"):
        assert token in allowed_by(constraint)  # type: ignore[operator]
        constraint.accept(token)
    assert allowed_by(constraint) == {END}
    constraint.restart(tokens_of("a"))
    assert allowed_by(constraint) == set(tokens_of("bc"))
    constraint.restart(tokens_of("ac"))
    assert allowed_by(constraint) == {END}


def test_a_complete_grammar_ends_a_sample_that_has_no_end_of_text(matcher: Matcher) -> None:
    for request in (
        make_request(),
        make_request(stop=[END], min_tokens=9),
        make_request(stop=[END], bad_words=((END,),)),
    ):
        constraint = constraint_of(request, matcher)
        constraint.restart(tokens_of("ac"))
        assert allowed_by(constraint) == RowEnd(FinishReason.STOP)


def test_rules_narrow_a_grammar(matcher: Matcher) -> None:
    a, b, c = tokens_of("abc")
    constraint = constraint_of(make_request(stop=[END], bad_words=((a, b),)), matcher)
    constraint.restart([a])
    assert allowed_by(constraint) == {c}
    constraint = constraint_of(make_request(stop=[END], allowed_token_ids=(b, c)), matcher)
    assert allowed_by(constraint) == RowEnd(FinishReason.INVALID, NOTHING_ALLOWED)


def test_a_token_that_the_grammar_does_not_know_ends_the_sample(matcher: Matcher) -> None:
    constraint = constraint_of(make_request(stop=[END]), matcher)
    constraint.accept(tokens_of("z")[0])
    end = allowed_by(constraint)
    assert isinstance(end, RowEnd)
    assert end.reason is FinishReason.INVALID
    assert "the regular expression" in (end.error or "")
    constraint.restart(())
    assert allowed_by(constraint) == set(tokens_of("a"))


def test_samples_go_their_own_ways(matcher: Matcher) -> None:
    first, second = constraints_of(make_request(stop=[END], n=2), VOCAB_SIZE, matcher)
    first.restart(())
    second.restart(())
    first.accept(tokens_of("a")[0])
    assert allowed_by(first) == set(tokens_of("bc"))
    assert allowed_by(second) == set(tokens_of("a"))


@pytest.mark.parametrize("vocab_size", [48, 53, 64, 65, 500])
def test_a_model_may_have_other_tokens_than_its_tokenizer(tmp_path: Path, vocab_size: int) -> None:
    matcher = make_compiler(tmp_path, vocab_size).compile(regex(".*"))
    words = matcher.allowed()
    assert len(words) == num_words(vocab_size)
    letters = [token for token in ids_of(words) if token != END]
    assert sorted(spell(letters)) == sorted(set(spell(letters)))
    assert max(letters) < min(vocab_size, 48)
    few = make_compiler(tmp_path, 20).compile(regex(".*"))
    assert ids_of(few.allowed()) == {token for token in ids_of(words) if token < 20}


# --- on the device


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 100), st.data())
def test_a_mask_lowers_what_has_no_bit(vocab_size: int, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, 4), unique=True, min_size=1))
    sets = [data.draw(st.sets(st.integers(0, vocab_size - 1))) for _ in rows]
    bits = np.zeros((len(rows), num_words(vocab_size) * 32), dtype=np.uint8)
    for row, ids in zip(bits, sets, strict=True):
        row[list(ids)] = 1
    words = torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").view(np.int32))
    logits = torch.randn(5, vocab_size)
    expected = logits.clone()
    for row, ids in zip(rows, sets, strict=True):
        expected[row, sorted(set(range(vocab_size)) - ids)] = FORBIDDEN
    Mask(torch.tensor(rows), words, torch.arange(32, dtype=torch.int32)).apply(logits)
    assert torch.equal(logits, expected)


def test_sampling_parameters_forbid_nothing_by_default() -> None:
    assert constraints_of(make_request(), VOCAB_SIZE) == []
    assert SamplingParams().grammar is None
