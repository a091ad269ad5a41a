"""Settling the garbage collector, in a process of its own because it is for good."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import atexit, gc, weakref
from app.engine.garbage import settle

class Node:
    pass

# runs after what settle registers
atexit.register(lambda: print("frozen at the end:", gc.get_freeze_count()))
settle()
assert gc.get_freeze_count() > 1000
node = Node()
node.itself, watched = node, weakref.ref(node)
del node
kept = [[] for _ in range(60_000)]
assert watched() is None, "cycles are never collected any more"
"""


def test_what_lives_is_passed_over_and_new_cycles_are_still_found() -> None:
    output = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    assert output == "frozen at the end: 0\n"
