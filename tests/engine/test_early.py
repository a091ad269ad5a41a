"""An engine process that starts before its arguments are known serves one engine, or leaves with its parent."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from app.engine.client import ProcessEngineClient
from app.engine.config import EngineConfig
from app.engine.early import EarlyProcess
from app.engine.interface import EngineStartError

SHIPPED_MODEL = str(Path(__file__).parents[2] / "models" / "mamba-python-15m")
CONFIG = EngineConfig(SHIPPED_MODEL, device="cpu", num_threads=1, max_num_seqs=2)
# leaves at once, without reading anything
GONE = (sys.executable, "-c", "")
# a parent that leaves its child behind
ORPHAN = "import app.engine.early as early; print(early.EarlyProcess()._process.pid, flush=True); {}"


# children that other tests have left, such as multiprocessing's tracker of resources, which stays to the end
OTHERS: set[int] = set()


@pytest.fixture(autouse=True)
def _note_other_children() -> None:
    OTHERS.clear()
    OTHERS.update(child.pid for child in psutil.Process().children())


def children() -> list[psutil.Process]:
    mine = [child for child in psutil.Process().children() if child.pid not in OTHERS]
    return [child for child in mine if child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.anyio
async def test_it_becomes_the_first_engine_and_no_other() -> None:
    early = EarlyProcess()
    (process,) = children()
    client = ProcessEngineClient(CONFIG, restart_delay=0.0, early=early)
    try:
        await client.start()
        await client.wait_ready()
        assert client.pid == process.pid
        early.discard()
        process.kill()
        while client.num_restarts == 0 or client.pid is None:
            await asyncio.sleep(0.01)
        await client.wait_ready()
        assert client.pid != process.pid
    finally:
        await client.stop(5)
    assert children() == []


@pytest.mark.anyio
async def test_it_tells_what_is_wrong_with_a_checkpoint(tmp_path: Path) -> None:
    client = ProcessEngineClient(EngineConfig(str(tmp_path), device="cpu"), early=EarlyProcess())
    with pytest.raises(EngineStartError, match=r"config\.json"):
        await client.start()
    await client.stop(0)


@pytest.mark.anyio
@pytest.mark.parametrize("command", [GONE, ("/no/such/program",)])
async def test_another_is_started_in_place_of_one_that_is_gone(command: tuple[str, ...]) -> None:
    early = EarlyProcess(command)
    while children():
        await asyncio.sleep(0.01)
    client = ProcessEngineClient(CONFIG, early=early)
    await client.start()
    assert client.pid is not None
    await client.stop(0)


def test_one_that_is_not_wanted_ends() -> None:
    early = EarlyProcess()
    assert len(children()) == 1
    early.discard()
    assert children() == []
    early.discard()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is noticed later")
@pytest.mark.parametrize("ending", ["", "import time; time.sleep(2)"])
def test_it_does_not_outlive_its_parent(ending: str) -> None:
    # while its libraries load, or while it waits for arguments
    parent = subprocess.run(
        [sys.executable, "-c", ORPHAN.format(ending)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    deadline = time.monotonic() + 10
    while psutil.pid_exists(int(parent.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
