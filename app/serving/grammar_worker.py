"""A process in which grammars are tried out: ``python -m app.serving.grammar_worker``, started by ``grammars``.

What a hostile grammar can do to the library (endless work, all memory, an overflow of the stack) it does here, and
what gets through here the engine can bear. Once it is ready, which it says, one JSON object a line comes in, one
complaint or null a line goes out; a grammar that takes too much kills the process instead.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from app.engine.grammars import GrammarError, error_of, limits, to_lark
from app.engine.request import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

CPU_SECONDS = 2.0
WALL_SECONDS = 10.0
MEMORY_BYTES = 512 * 1024 * 1024
# half of what the engine has, which goes a little deeper
STACK_BYTES = 4 * 1024 * 1024

# every step of the engine waits for masks, so that each must be quick; a grammar is followed for so many tokens
MASK_SECONDS = 0.1
NUM_TRIED_TOKENS = 16

READY = "ready"

_END = "<end>"


def main() -> None:
    """Answer until the input ends."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=serve, args=(sys.stdin, sys.stdout))
    thread.start()
    thread.join()


def serve(requests: TextIO, answers: TextIO) -> None:
    """Say READY, then answer each line of ``requests``."""
    tokenizer = make_tokenizer()
    answers.write(READY + "\n")
    answers.flush()
    # what the library says when it runs out of something is nobody's concern
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    for line in requests:
        with _time_limit():
            complaint = try_out(Grammar(**json.loads(line)), tokenizer)
        answers.write(json.dumps(complaint) + "\n")
        answers.flush()


def try_out(grammar: Grammar, tokenizer: LLTokenizer, clock: Callable[[], float] = time.thread_time) -> str | None:
    """What is wrong with a grammar, compiled and followed for some tokens; None where nothing is."""
    from llguidance import LLMatcher

    try:
        matcher = LLMatcher(tokenizer, to_lark(grammar), log_level=0, limits=limits())
        if matcher.is_error():
            raise error_of(grammar, matcher.get_error())
        _follow(grammar, matcher, clock)
    except GrammarError as error:
        return str(error)
    return None


def make_tokenizer() -> LLTokenizer:
    """A token for each byte, and one that ends a text."""
    from llguidance import LLTokenizer
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({_END: 0} | {letter: index for index, letter in enumerate(letters, 1)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([_END])
    return LLTokenizer(backend.to_str(), eos_token=[0])


def _follow(grammar: Grammar, matcher: LLMatcher, clock: Callable[[], float]) -> None:
    """Take one of the tokens allowed, again and again. Raises GrammarError where that is slow or leads nowhere."""
    for number in range(NUM_TRIED_TOKENS):
        # what has failed counts as stopped, too
        if matcher.is_error():
            raise error_of(grammar, matcher.get_error())
        if matcher.is_stopped():
            return
        begun = clock()
        try:
            mask = matcher.compute_bitmask()
        except ValueError:
            mask = b""
        if clock() - begun > MASK_SECONDS:
            raise error_of(grammar, "it takes too long to tell which tokens may follow")
        if matcher.is_error():
            raise error_of(grammar, "no text matches it" if number == 0 else matcher.get_error())
        allowed = [token for token in range(1, len(mask) * 8) if mask[token // 8] >> token % 8 & 1]
        if not allowed:
            return
        matcher.consume_token(allowed[len(allowed) * number // NUM_TRIED_TOKENS])


@contextlib.contextmanager
def _time_limit():  # type: ignore[no-untyped-def]
    """The system ends the process when it takes longer: nothing in here could."""
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
