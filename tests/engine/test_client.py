"""A real engine process behind the client: it generates, aborts, dies, comes back, and never outlives its parent."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
import torch

from app.engine.client import ProcessEngineClient
from app.engine.config import EngineConfig
from app.engine.interface import (
    EngineClient,
    EngineDied,
    EngineError,
    EngineStartError,
    EngineStatus,
    EngineUnavailable,
)
from app.engine.request import Event, FinishReason, GenerationRequest, TokenEvent
from mamba_core import MambaConfig, MambaForCausalLM
from tests.engine.fakes import Transcript, make_request
from tests.engine.faulty_process import expected_token

pytestmark = pytest.mark.anyio

FAULTY = (sys.executable, str(Path(__file__).with_name("faulty_process.py")))
ROOT = Path(__file__).parents[2]
ENDLESS = 1_000_000
PATIENCE = 30.0


def make_client(faults: str = "", max_num_seqs: int = 4, max_restarts: int = 3) -> ProcessEngineClient:
    config = EngineConfig(faults, max_num_seqs=max_num_seqs, num_threads=1)
    return ProcessEngineClient(config, command=FAULTY, max_restarts=max_restarts)


@asynccontextmanager
async def ready(client: ProcessEngineClient) -> AsyncIterator[ProcessEngineClient]:
    """A client whose engine takes requests, stopped at the end whatever happens."""
    try:
        await start(client)
        yield client
    finally:
        await client.stop(0)
        assert client.pid is None


async def start(client: ProcessEngineClient) -> None:
    await client.start()
    await client.wait_ready()


class Watcher:
    """Submits a request, keeps what its sinks are told, and checks that they keep to their contract."""

    def __init__(self, client: ProcessEngineClient, request: GenerationRequest) -> None:
        self.request = request
        self.transcript = Transcript()
        self.error: EngineError | None = None
        self.has_begun = asyncio.Event()
        self.is_over = asyncio.Event()
        self._num_unfinished = request.n
        client.submit(request, [Sink(self, sample) for sample in range(request.n)])

    def take(self, event: Event) -> None:
        assert self.error is None
        assert event.request_id == self.request.request_id
        self.transcript.add([event])
        self.has_begun.set()
        if isinstance(event, TokenEvent) and event.finish_reason is not None:
            self._num_unfinished -= 1
            if not self._num_unfinished:
                self.is_over.set()

    def lose(self, error: EngineError) -> None:
        self.error = error
        self.is_over.set()


class Sink:
    """One sample's. Prompt log-probabilities come to all of them, of which the first keeps them."""

    def __init__(self, watcher: Watcher, sample: int) -> None:
        self._watcher = watcher
        self._sample = sample

    def on_token(self, token_id: int) -> None:
        self._watcher.take(TokenEvent(self._watcher.request.request_id, self._sample, token_id))

    def on_event(self, event: Event) -> None:
        if isinstance(event, TokenEvent):
            assert event.sample == self._sample
            self._watcher.take(event)
        elif self._sample == 0:
            self._watcher.take(event)

    def on_lost(self, error: EngineError) -> None:
        self._watcher.lose(error)


async def collect(*watchers: Watcher) -> Transcript:
    """All that came of requests. Raises what lost them."""
    transcript = Transcript()
    for watcher in watchers:
        await asyncio.wait_for(watcher.is_over.wait(), PATIENCE)
        if watcher.error is not None:
            raise watcher.error
        for mine, ours in zip(vars(watcher.transcript).values(), vars(transcript).values(), strict=True):
            ours.update(mine)
    return transcript


async def until(fact: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not fact():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


async def first_events(watcher: Watcher) -> None:
    await asyncio.wait_for(watcher.has_begun.wait(), PATIENCE)


async def test_requests_together_are_answered_as_each_alone() -> None:
    async with ready(make_client()) as client:
        requests = [
            make_request("plain", [3, 4, 5], 7),
            make_request("many", [9] * 40, 5, n=3, temperature=1.0, seed=4),
            make_request(
                "rich", [1, 2, 3, 4], 3, logprobs=2, prompt_logprobs=1, temperature=0.5, logit_bias=((3, 1.5),)
            ),
            make_request("prompt", [1, 2, 3], 0, prompt_logprobs=0),
            make_request("stopped", [3, 4, 5], 7, stop=range(97)),
        ]
        together = await collect(*[Watcher(client, request) for request in requests])
        alone = [await collect(Watcher(client, request)) for request in requests]
        assert together.tokens == {key: tokens for one in alone for key, tokens in one.tokens.items()}
        assert together.tokens["plain", 0] == [expected_token((3, 4, 5), 0, position) for position in range(3, 10)]
        assert [len(together.tokens["many", sample]) for sample in range(3)] == [5] * 3
        assert [together.reason(name) for name in ("plain", "prompt", "stopped")] == ["length", "length", "stop"]
        assert together.ends["stopped", 0].stop_reason == together.tokens["stopped", 0][0]
        assert [len(piece.logprobs) for piece in together.prompt_slices["rich"]] == [3]
        assert all(event.logprobs and len(event.logprobs.top) == 2 for event in together.events["rich", 0])
        await until(lambda: client.stats.num_slots_used == 0)
        assert client.stats.num_slots == client.info.max_num_seqs == 4
        assert (client.info.vocab_size, client.info.eos_token_ids, client.model_dir) == (97, (0,), "/scripted")


async def test_many_requests_of_one_turn_arrive() -> None:
    async with ready(make_client()) as client:
        watchers = [Watcher(client, make_request(str(number), [1 + number], 2)) for number in range(100)]
        client.abandon("70")
        del watchers[70]
        transcript = await collect(*watchers)
        for number in [*range(70), *range(71, 100)]:
            expected = [expected_token((1 + number,), 0, position) for position in (1, 2)]
            assert transcript.tokens[str(number), 0] == expected


async def test_what_is_closed_or_aborted_frees_its_slots() -> None:
    async with ready(make_client()) as client:
        leaver, stayer = (
            Watcher(client, make_request("leaver", max_tokens=ENDLESS, n=3)),
            Watcher(client, make_request("stayer", max_tokens=ENDLESS)),
        )
        waiter = Watcher(client, make_request("waiter", max_tokens=2, n=3))
        await first_events(leaver)
        await until(lambda: client.stats.num_slots_used == 4)
        client.abort_sample("stayer", 0)
        stayed = await collect(stayer)
        assert stayed.reason("stayer") is FinishReason.ABORT
        client.abandon("leaver")
        client.abandon("leaver")
        seen = len(leaver.transcript.tokens["leaver", 0])
        waited = await collect(waiter)
        assert [waited.reason("waiter", sample) for sample in range(3)] == [FinishReason.LENGTH] * 3
        await until(lambda: client.stats.num_slots_used == 0)
        assert len(leaver.transcript.tokens["leaver", 0]) == seen
        assert not leaver.transcript.ends
        client.abort_sample("unknown", 0)
        client.abandon("unknown")
        # the id is free again, and nothing of its former owner arrives
        again = await collect(Watcher(client, make_request("leaver", max_tokens=3)))
        assert len(again.tokens["leaver", 0]) == 3


async def test_the_time_that_requests_wait_for_slots_is_told() -> None:
    waits: list[float] = []
    async with ready(make_client()) as client:
        client.watch_queue(waits.append)
        holder = Watcher(client, make_request("holder", max_tokens=ENDLESS, n=4))
        await first_events(holder)
        waiter = Watcher(client, make_request("waiter", max_tokens=2))
        gone = Watcher(client, make_request("gone", max_tokens=2))
        client.abandon(gone.request.request_id)
        await asyncio.sleep(0.2)
        assert len(waits) == 1
        client.abandon("holder")
        await collect(waiter)
        assert len(waits) == 2
        assert 0 <= waits[0] < waits[1]
        assert waits[1] >= 0.2


async def test_bad_requests_end_alone_and_signals_are_left_to_the_parent() -> None:
    async with ready(make_client()) as client:
        assert client.pid is not None
        good = Watcher(client, make_request("good", max_tokens=3000))
        with pytest.raises(ValueError, match="live already"):
            Watcher(client, make_request("good"))
        bad = [Watcher(client, make_request("n", n=5)), Watcher(client, make_request("empty", []))]
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(client.pid, number)
        transcript = await collect(good, *bad)
        assert len(transcript.tokens["good", 0]) == 3000
        assert all(transcript.reason("n", sample) is FinishReason.ERROR for sample in range(5))
        assert "n = 5" in str(transcript.ends["n", 0].error)
        assert "empty" in str(transcript.ends["empty", 0].error)
        started = time.monotonic()
        await client.stop(10)
        assert time.monotonic() - started < 5
        with pytest.raises(EngineUnavailable):
            Watcher(client, make_request())


async def test_a_killed_process_is_noticed_and_started_again() -> None:
    async with ready(make_client()) as client:
        stream = Watcher(client, make_request("long", max_tokens=ENDLESS))
        await first_events(stream)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        await until(lambda: client.status is EngineStatus.RESTARTING)
        with pytest.raises(EngineUnavailable, match="restarting"):
            Watcher(client, make_request())
        client.abandon("long")
        await until(lambda: client.status is EngineStatus.READY)
        assert (client.num_restarts, client.num_resumed) == (1, 0)
        assert len((await collect(Watcher(client, make_request("long")))).tokens["long", 0]) == 4


async def test_requests_go_on_after_a_process_was_killed(tmp_path: Path) -> None:
    async with ready(make_client(f"kill_at=20&once={tmp_path / 'died.txt'}")) as client:
        requests = [
            make_request("plain", [3, 4, 5], 50),
            make_request("over", [6, 7], 3),
            make_request("many", [9] * 40, 30, n=2),
            make_request("rich", [1, 2], 40, logprobs=1),
            make_request("waits", [8], 5),
        ]
        watchers = [Watcher(client, request) for request in requests]
        transcript = await collect(*watchers)
        assert client.num_restarts == 1
        # the one that was over goes on as well if its end was still on the way
        assert client.num_resumed in (4, 5)
        for request in requests:
            start, name = len(request.prompt_token_ids), request.request_id
            for sample in range(request.n):
                expected = [
                    expected_token(request.prompt_token_ids, sample, start + i) for i in range(request.max_tokens)
                ]
                assert transcript.tokens[name, sample] == expected
                assert transcript.reason(name, sample) is FinishReason.LENGTH
        assert all(event.logprobs for event in transcript.events["rich", 0])
        await until(lambda: client.stats.num_slots_used == 0)


async def test_a_sample_that_was_aborted_does_not_go_on() -> None:
    async with ready(make_client("pace=0.01")) as client:
        watcher = Watcher(client, make_request("many", max_tokens=ENDLESS, n=2))
        await first_events(watcher)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        await until(lambda: client.status is EngineStatus.RESTARTING)
        client.abort_sample("many", 0)
        await until(lambda: ("many", 0) in watcher.transcript.ends)
        assert watcher.transcript.reason("many", 0) is FinishReason.ABORT
        num_before = len(watcher.transcript.tokens["many", 1])
        await until(lambda: len(watcher.transcript.tokens["many", 1]) > num_before)


async def test_a_request_that_was_there_at_two_deaths_is_lost_and_others_go_on() -> None:
    async with ready(make_client("pace=0.01")) as client:
        first = Watcher(client, make_request("first", [1], max_tokens=ENDLESS))
        await first_events(first)
        for num_deaths in (1, 2):
            assert client.pid is not None
            os.kill(client.pid, signal.SIGKILL)
            await until(lambda: client.status is EngineStatus.RESTARTING)
            await until(lambda: client.status is EngineStatus.READY)
            if num_deaths == 1:
                second = Watcher(client, make_request("second", [2, 3], max_tokens=300))
                await first_events(second)
        assert "SIGKILL" in str(first.error)
        tokens = (await collect(second)).tokens["second", 0]
        assert tokens == [expected_token((2, 3), 0, position) for position in range(2, 302)]
        assert client.num_resumed == 2


async def test_a_process_that_dies_too_often_is_fatal() -> None:
    async with ready(make_client("kill_at=3", max_restarts=0)) as client:
        with pytest.raises(EngineDied):
            await collect(Watcher(client, make_request(max_tokens=ENDLESS)))
        assert client.status is EngineStatus.STOPPED
        assert "SIGKILL, after 0 restarts within 60 s" in str(client.fatal.result())
        with pytest.raises(EngineStartError):
            await client.wait_ready()


async def test_a_hang_shows_in_the_heartbeat_and_idleness_does_not() -> None:
    async with ready(make_client("hang_at=5")) as client:
        for _ in range(12):
            await asyncio.sleep(0.1)
            assert client.heartbeat_age() < 1.0
        stream = Watcher(client, make_request(max_tokens=ENDLESS))
        await first_events(stream)
        await until(lambda: client.heartbeat_age() > 1.5)
        assert client.status is EngineStatus.READY


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ("refuse=config.json:+nonsense%0Aon+two+lines", "config.json: nonsense on two lines"),
        ("crash_load=77", "ended with status 77 while it was loading"),
    ],
)
async def test_a_model_that_cannot_be_loaded_is_a_start_error(faults: str, message: str) -> None:
    client = make_client(faults)
    with pytest.raises(EngineStartError) as raised:
        await start(client)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert client.status is EngineStatus.STOPPED
    await client.stop(1)


async def test_a_command_that_is_not_there_is_a_start_error(tmp_path: Path) -> None:
    client = ProcessEngineClient(EngineConfig(""), command=(str(tmp_path / "nothing"),))
    with pytest.raises(EngineStartError, match="could not be started"):
        await client.start()
    assert client.status is EngineStatus.STOPPED
    await client.stop(1)


async def test_stopping_while_it_loads_takes_no_time() -> None:
    client = make_client("slow_load=60")
    await client.start()
    assert client.status is EngineStatus.STARTING
    with pytest.raises(EngineUnavailable, match="starting"):
        Watcher(client, make_request())
    with pytest.raises(EngineUnavailable):
        _ = client.info
    waiting = asyncio.create_task(client.wait_ready())
    await asyncio.sleep(1.2)
    assert client.heartbeat_age() < 1.0, "no beats while loading"
    started = time.monotonic()
    await client.stop(30)
    assert time.monotonic() - started < 15
    with pytest.raises(EngineUnavailable, match="stopped"):
        await waiting


PARENT = """
import asyncio, sys
from app.engine.client import ProcessEngineClient
from app.engine.config import EngineConfig
from app.engine.request import GenerationRequest, SamplingParams

class Sink:
    def on_token(self, token_id):
        pass

async def main():
    client = ProcessEngineClient(EngineConfig(""), command=sys.argv[1:])
    await client.start()
    await client.wait_ready()
    client.submit(GenerationRequest("r", (1, 2), SamplingParams(), max_tokens=10**9), [Sink()])
    print(client.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_no_process_outlives_a_parent_that_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, *FAULTY], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    psutil.wait_procs([child], timeout=5)
    assert not child.is_running()


def save_tiny_checkpoint(directory: Path) -> MambaForCausalLM:
    torch.manual_seed(5)
    config = MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2, state_size=4, eos_token_id=0)
    model = MambaForCausalLM(config).eval()
    model.save_pretrained(directory)
    return model


async def test_a_checkpoint_is_served_by_the_real_process(tmp_path: Path) -> None:
    model = save_tiny_checkpoint(tmp_path)
    client = ProcessEngineClient(EngineConfig(str(tmp_path), dtype="float32", device="cpu", num_threads=1))
    as_seen_by_servers: EngineClient = client
    async with ready(client):
        prompt = [7, 8, 9, 10, 60]
        transcript = await collect(Watcher(client, make_request(prompt=prompt, max_tokens=12)))
        info = as_seen_by_servers.info
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert transcript.tokens["r", 0] == expected[0, len(prompt) :].tolist()
    assert (info.model_dir, info.architecture) == (str(tmp_path), "MambaForCausalLM")
    assert (info.vocab_size, info.num_layers, info.hidden_size) == (61, 2, 16)
    assert (info.dtype, info.state_dtype, info.device, info.eos_token_ids) == ("float32", "float32", "cpu", (0,))
    assert info.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert 1 <= info.max_num_seqs <= 64


async def test_a_broken_checkpoint_is_one_clear_line(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    client = ProcessEngineClient(EngineConfig(str(tmp_path), device="cpu"))
    with pytest.raises(EngineStartError) as raised:
        await start(client)
    assert weights.name in str(raised.value)
    assert "Traceback" not in str(raised.value)
    await client.stop(1)


async def test_the_socket_is_private_and_leaves_nothing_behind(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path_factory.mktemp("t")
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    client = make_client()
    starting = asyncio.create_task(client.start())
    await until(lambda: any(directory.iterdir()))
    (mine,) = directory.iterdir()
    assert mine.stat().st_mode & 0o777 == 0o700
    await starting
    assert not mine.exists()
    async with ready_again(client):
        assert len((await collect(Watcher(client, make_request()))).tokens["r", 0]) == 4
    assert not any(directory.iterdir())


@asynccontextmanager
async def ready_again(client: ProcessEngineClient) -> AsyncIterator[None]:
    try:
        await client.wait_ready()
        yield
    finally:
        await client.stop(5)
