"""This server and llama.cpp on one machine: the same weights, the same tokens, the same threads, one after the other.

Writes the checkpoint as GGUF, checks that greedy tokens agree, then measures in turns, several times over: tokens per
second of concurrent streams and the time to first token of long prompts over HTTP, and decode and prefill without
servers. One line of JSON for each measurement on standard output, a table of medians on standard error.

    pip install mamba-serve[compare]
    python -m benchmarks.compare_llama_cpp
    python -m benchmarks.compare_llama_cpp --model models/mamba-python-15m --gguf-types F16,Q8_0

Every token is a word of its own (``benchmarks.words``) and prompts are such texts: the server in llama-cpp-python takes
no token ids. It works on one request at a time; ``--batching-server`` names the script of its sources' examples
that decodes rows together.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import agreement, numerics, random_checkpoint
from benchmarks.contenders import Contender, Serving, batching, ours, packaged, random_prompts, serving
from benchmarks.decode import WARM_UP_STEPS
from benchmarks.in_process import SHAPES, greedy_request, numbers, print_line
from benchmarks.machine import device_name, num_cores, versions
from benchmarks.words import write_tokenizer
from mamba_core import checkpoints
from mamba_core.modeling_mamba import MambaForCausalLM

_ROWS_SCRIPT = Path(__file__).with_name("llama_cpp_rows.py")
_STREAM_PROMPT_TOKENS = 32
_WARM_UP_TOKENS = 4
# beyond what a prompt and its answer need
_SPARE_CONTEXT = 64
_STDERR_CHARACTERS = 2000


@dataclass(frozen=True, slots=True)
class Plan:
    """What is compared: the checkpoint, its vocabulary, everyone who serves it."""

    model: str
    vocab_size: int
    contenders: list[Contender]
    # path of the file of each type of weights
    ggufs: dict[str, Path]


@dataclass
class Figures:
    """Everything measured: values by case and contender; a unit that ends in "/s" is better when larger."""

    about: dict[str, Any]
    values: dict[tuple[str, str], dict[str, list[float]]] = field(default_factory=lambda: defaultdict(dict))

    def add(self, case: str, unit: str, who: str, value: float, **more: Any) -> None:
        self.values[case, unit].setdefault(who, []).append(value)
        line = {"contender": who, "case": case, unit.replace("/", "_per_"): round(value, 2)}
        print_line({"benchmark": "compare_llama_cpp", **self.about, **line, **more})

    def table(self) -> str:
        """Medians, and how many times better the first contender is than the best of the others."""
        names = list(dict.fromkeys(who for by_name in self.values.values() for who in by_name))
        lines = ["| | " + " | ".join([*names, "ratio"]) + " |", "| --- |" + " ---: |" * (len(names) + 1)]
        for (case, unit), by_name in self.values.items():
            medians = {who: statistics.median(found) for who, found in by_name.items()}
            cells = [f"{medians[who]:,.1f}" if who in medians else "–" for who in names]
            lines.append(f"| {case}, {unit} | " + " | ".join([*cells, ratio(names[0], unit, medians)]) + " |")
        return "\n".join(lines)


def ratio(first: str, unit: str, medians: dict[str, float]) -> str:
    others = [value for who, value in medians.items() if who != first]
    if first not in medians or not others:
        return "–"
    if unit.endswith("/s"):
        return f"{medians[first] / max(others):.2f}"
    return f"{min(others) / medians[first]:.2f}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="directory of a checkpoint")
    which.add_argument("--random", choices=sorted(SHAPES), default="130m", help="a published shape, random weights")
    parser.add_argument("--llama-python", default=sys.executable, help="the Python that has llama-cpp-python[server]")
    parser.add_argument("--batching-server", type=Path, help="examples/server/server.py of llama-cpp-python's sources")
    parser.add_argument("--gguf-types", type=numbers(str.upper), default=["F16"], help="F16, BF16, Q8_0, F32")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of our weights")
    parser.add_argument("--quantization", choices=("none", "int8"), default="none", help="of our matrices")
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--streams", type=numbers(int), default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each stream, and steps in process")
    parser.add_argument("--prompts", type=numbers(int), default=[512, 2048], help="lengths of prompts to first token")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=270.0, help="no round is begun that would end later")
    parser.add_argument("--greedy-prompts", type=int, default=6, help="continuations that must agree")
    parser.add_argument("--greedy-tokens", type=int, default=32)
    parser.add_argument("--near-tie", type=float, default=0.05, help="log-probability within which answers may part")
    parser.add_argument("--without-http", action="store_true")
    parser.add_argument("--without-in-process", action="store_true")
    parser.add_argument("--directory", type=Path, help="where files are kept; nowhere when not given")
    return parser.parse_args(arguments)


def llama_version(python: str) -> str:
    """Raises SystemExit when that Python has no llama-cpp-python."""
    code = "import llama_cpp; print(llama_cpp.__version__)"
    try:
        answer = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError as error:
        raise SystemExit(f"{python} does not run: {error}") from error
    if answer.returncode:
        raise SystemExit(
            f"{python} has no llama-cpp-python: pip install 'llama-cpp-python[server]' there, or name another Python "
            "with --llama-python"
        )
    return answer.stdout.strip()


def checkpoint_of(options: argparse.Namespace, directory: Path) -> Path:
    """The directory of the checkpoint, written beforehand when it is a random one."""
    if options.model:
        return checkpoints.resolve(options.model)
    target = directory / f"random-{options.random}"
    if not (target / "config.json").exists():
        target.mkdir(parents=True, exist_ok=True)
        random_checkpoint.write_checkpoint(options.random, target, torch.device("cpu"), 0, "2GB")
    return target


def make_plan(options: argparse.Namespace, checkpoint: Path, model: MambaForCausalLM, directory: Path) -> Plan:
    """Write what the contenders read."""
    from benchmarks.gguf_of_mamba import write_gguf

    tokenizer = directory / "tokenizer"
    write_tokenizer(tokenizer, model.config.vocab_size)
    num_rows = max(options.streams)
    length = max([*options.prompts, _STREAM_PROMPT_TOKENS]) + max(options.tokens, options.greedy_tokens)
    length += _SPARE_CONTEXT
    contenders = [ours(str(checkpoint), tokenizer, weight_flags(options), options.threads, num_rows)]
    ggufs = {}
    for kind in options.gguf_types:
        path = ggufs[kind] = directory / f"{checkpoint.name}-{kind}.gguf"
        write_gguf(model, path, kind)
        contenders.append(packaged(options.llama_python, path, kind, options.threads, length))
        if options.batching_server:
            script = options.batching_server
            contenders.append(batching(options.llama_python, script, path, kind, options.threads, num_rows, length))
    return Plan(str(checkpoint), model.config.vocab_size, contenders, ggufs)


def weight_flags(options: argparse.Namespace) -> list[str]:
    """How our server and our benchmarks are told of the type of their weights."""
    quantization = ["--quantization", options.quantization] if options.quantization != "none" else []
    return ["--dtype", options.dtype, *quantization]


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def who(contender: Contender) -> str:
    return f"{contender.name} {contender.weights}"


def check_agreement(options: argparse.Namespace, plan: Plan, model: MambaForCausalLM, directory: Path) -> None:
    """Raises SystemExit when answers part where fp32 sees no near-tie; where weights are quantised, it is but told."""
    # the beginnings of real programs where the checkpoint has a tokenizer for them
    prompts = numerics.prompts_of(plan.model, plan.vocab_size)[: options.greedy_prompts]
    answers = {}
    for contender in plan.contenders:
        with serving(contender, directory / "server.log") as server:
            answers[who(contender)] = [server.continue_greedily(prompt, options.greedy_tokens) for prompt in prompts]
    first, *others = plan.contenders
    for contender in others:
        found = agreement.compare(model, prompts, answers[who(first)], answers[who(contender)])
        is_near = found.is_near(options.near_tie)
        line = {"benchmark": "agreement", "model": Path(plan.model).name, "contender": who(contender)}
        line |= {"with": who(first), **found.describe()}
        print_line({**line, "only_near_ties": is_near})
        is_quantised = contender.weights.startswith("Q") or options.quantization != "none"
        if not is_near and not is_quantised:
            raise SystemExit(f"{who(contender)} says something else than {who(first)}: there is nothing to compare")


def measure_server(options: argparse.Namespace, plan: Plan, server: Serving, figures: Figures, number: int) -> None:
    """One round over HTTP of one contender."""
    name = who(server.contender)
    for num_streams in options.streams:
        seed = (number, num_streams)
        prompts = random_prompts(2 * num_streams, _STREAM_PROMPT_TOKENS, plan.vocab_size, seed)
        server.stream(prompts[num_streams:], _WARM_UP_TOKENS)
        outcome = server.stream(prompts[:num_streams], options.tokens)
        rate = outcome.num_tokens / (outcome.ended - outcome.started)
        first = round(1e3 * statistics.median(outcome.first_tokens), 2)
        figures.add(count(num_streams, "stream"), "tokens/s", name, rate, round=number, first_token_ms=first)
    for length in options.prompts:
        (prompt,) = random_prompts(1, length, plan.vocab_size, (number, "first token", length))
        outcome = server.stream([prompt], 2)
        figures.add(f"prompt of {length} to first token", "ms", name, 1e3 * outcome.first_tokens[0], round=number)


def our_lines(options: argparse.Namespace, plan: Plan) -> Iterator[tuple[str, float]]:
    """Cases and rates of this project's engine in a process of its own."""
    common = ["--model", plan.model, "--device", "cpu", "--threads", str(options.threads), *weight_flags(options)]
    batches = ",".join(map(str, options.streams))
    shapes = ",".join(f"1x{length}" for length in options.prompts)
    decode = ["benchmarks.decode", "--batch", batches, "--tokens", str(options.tokens)]
    for line in json_lines([sys.executable, "-m", *decode, "--prompt", str(_STREAM_PROMPT_TOKENS), *common]):
        if line.get("benchmark") == "decode":
            yield f"decode of {count(line['batch'], 'row')}", line["tokens_per_s"]
    for line in json_lines([sys.executable, "-m", "benchmarks.prefill", "--shape", shapes, "--repeats", "1", *common]):
        if line.get("benchmark") == "prefill":
            yield f"prefill of {line['shape'].removeprefix('1x')}", line["tokens_per_s"]


def their_lines(options: argparse.Namespace, plan: Plan, gguf: Path) -> Iterator[tuple[str, float]]:
    """The same of llama.cpp, after the same prompts."""

    def prompt(name: str, length: int) -> tuple[int, ...]:
        return greedy_request(name, length, 1, plan.vocab_size).prompt_token_ids

    decode = [[prompt(f"{rows}-{row}", _STREAM_PROMPT_TOKENS) for row in range(rows)] for rows in options.streams]
    prefill = [prompt(f"{length}-0", length) for length in options.prompts]
    job = {"model": str(gguf), "threads": options.threads, "warm_up": WARM_UP_STEPS, "steps": options.tokens}
    job |= {"decode": decode, "prefill": prefill, "repeats": 1}
    for line in json_lines([options.llama_python, str(_ROWS_SCRIPT)], json.dumps(job)):
        kind, _, number = line["case"].partition(" ")
        if kind == "decode":
            yield f"decode of {count(int(number), 'row')}", line["tokens_per_s"]
        elif kind == "prefill":
            yield f"prefill of {number}", line["tokens_per_s"]


def json_lines(command: Sequence[str], text: str = "") -> list[dict[str, Any]]:
    """What a program prints. Raises SystemExit with the end of its complaints when it fails."""
    answer = subprocess.run(command, input=text, capture_output=True, text=True, errors="replace", check=False)
    if answer.returncode:
        raise SystemExit(f"{' '.join(command[:4])} failed:\n{answer.stderr[-_STDERR_CHARACTERS:]}")
    return [json.loads(line) for line in answer.stdout.splitlines()]


def in_turns(contenders: Sequence[Contender], number: int) -> list[Contender]:
    """Another one first in every round, so that what warms the machine up warms everyone."""
    start = number % len(contenders)
    return [*contenders[start:], *contenders[:start]]


def compare(options: argparse.Namespace, plan: Plan, figures: Figures, directory: Path) -> None:
    """Rounds as many as are asked for and, after the first, as still fit into the time."""
    started = time.monotonic()
    for number in range(options.rounds):
        elapsed = time.monotonic() - started
        if number and elapsed * (number + 1) / number > options.seconds:
            print(f"{number} of {options.rounds} rounds: another would last beyond --seconds", file=sys.stderr)
            return
        for contender in in_turns(plan.contenders, number):
            if not options.without_http:
                with serving(contender, directory / "server.log") as server:
                    measure_server(options, plan, server, figures, number)
            if not options.without_in_process:
                for case, rate in in_process_lines(options, plan, contender):
                    figures.add(case, "tokens/s", who(contender), rate, round=number)


def in_process_lines(options: argparse.Namespace, plan: Plan, contender: Contender) -> Iterator[tuple[str, float]]:
    if contender is plan.contenders[0]:
        yield from our_lines(options, plan)
    elif contender.name == "llama-cpp-python":
        # the other server's library is the same
        yield from their_lines(options, plan, plan.ggufs[contender.weights])


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    llama = llama_version(options.llama_python)
    torch.set_num_threads(options.threads)
    with contextlib.ExitStack() as stack:
        directory = options.directory or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory.mkdir(parents=True, exist_ok=True)
        checkpoint = checkpoint_of(options, directory)
        # random weights repeat themselves, so that a model which does not is asked as well
        for path in [checkpoint] if options.model else [random_checkpoint.SHIPPED_MODEL, checkpoint]:
            model = checkpoints.load(path, dtype=torch.float32, show_progress=False)
            plan = make_plan(options, path, model, directory)
            check_agreement(options, plan, model, directory)
        del model
        about = {"model": checkpoint.name, "device": device_name(torch.device("cpu")), "threads": options.threads}
        figures = Figures({**about, "versions": {**versions(), "llama-cpp-python": llama}})
        compare(options, plan, figures, directory)
    print(figures.table(), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
