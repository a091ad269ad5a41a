"""Trains the small model that ships: ``python models/train.py --workdir DIR --out DIR --seconds N``.

Every stage can be run alone with ``--stage``; finished stages are kept in the working directory and not repeated.
``--resume`` continues an interrupted or paused training. See ``models/README.md``.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_NAME = "mamba-python-15m"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", default="all", choices=["all", "prepare", "train", "export", "evaluate", "card", "unpack"])
    add("--workdir", type=Path, default=Path("build/train"), help="corpus, tokenizer and checkpoints live here")
    add("--out", type=Path, default=None, help="folder for the packed result, at most eight files")
    add("--name", default=DEFAULT_NAME, help="the model's name, and its folder's")
    add("--seconds", type=float, default=540.0, help="wall clock of this command, everything included")
    add("--train-seconds", type=float, default=None, help="training alone, over all commands (default: what is left)")
    add("--max-steps", type=int, default=None, help="a budget of steps in place of seconds")
    add("--reserve-seconds", type=float, default=110.0, help="kept for export and evaluation")
    add("--compile-seconds", type=float, default=30.0, help="kept for compiling the kernels before the first step")
    add("--resume", action="store_true", help="continue from the checkpoint in the working directory")
    add("--device", default=None, help="cuda or cpu (default: cuda if there is one)")
    add("--workers", type=int, default=None, help="processes (default: the machine's cores)")
    add("--seed", type=int, default=0)
    data = parser.add_argument_group("data")
    data.add_argument("--packages", default="", help="only these distributions, comma separated")
    data.add_argument("--heldout-per-10000", type=int, default=100)
    data.add_argument("--vocab-size", type=int, default=8192)
    data.add_argument("--tokenizer-bytes", type=int, default=40_000_000, help="sample the tokenizer is trained on")
    model = parser.add_argument_group("model and optimization")
    model.add_argument("--hidden-size", type=int, default=384)
    model.add_argument("--layers", type=int, default=12)
    model.add_argument("--rows", type=int, default=64, help="rows per batch")
    model.add_argument("--row-length", type=int, default=1024)
    model.add_argument("--learning-rate", type=float, default=3e-3)
    model.add_argument("--fim-share", type=float, default=0.5)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    start = time.monotonic()
    options = parse_arguments(arguments)
    # worker processes import this module again and must not pay for torch
    from models.recipe.run import Run

    return Run(options, start).execute()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    # so that an ordinary kill runs the clean-up, as an interrupt does
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
