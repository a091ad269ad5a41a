"""Worker processes never outlive the process that made them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from models.recipe.workers import worker_pool

ROOT = Path(__file__).resolve().parent.parent.parent


def test_a_pool_works_with_an_initializer() -> None:
    with worker_pool(1, os.chdir, ("/",)) as pool:
        assert pool.submit(os.getcwd).result() == "/"


def test_workers_of_a_killed_process_end() -> None:
    script = (
        "import os, time\n"
        "from models.recipe.workers import worker_pool\n"
        "if __name__ == '__main__':\n"
        "    print(worker_pool(1).submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 10
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)

    assert not is_running(worker)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
