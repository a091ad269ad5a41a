"""``app.main.run`` over a fake engine, as a program: what a test tells it comes as JSON in the first argument."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

from app.engine.config import EngineConfig
from app.engine.interface import EngineStartError, EngineStatus
from app.main import run
from app.settings import load
from tests.fakes import FakeEngine, make_info


class ManagedFakeEngine(FakeEngine):
    """A fake with a life: starts, loads, is lost when SIGUSR1 comes, and writes down that it was stopped."""

    def __init__(self, model_dir: str, plan: dict[str, Any]) -> None:
        super().__init__(make_info(257, (256,), model_dir=model_dir), delay=plan.get("delay", 0.0))
        self.status = EngineStatus.STARTING
        self.model_dir = model_dir
        self._plan = plan
        self.fatal: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        if "start_error" in self._plan:
            raise EngineStartError(self._plan["start_error"])
        await asyncio.sleep(self._plan.get("start_seconds", 0.0))

    async def wait_ready(self) -> None:
        await asyncio.sleep(self._plan.get("load_seconds", 0.0))
        if "load_error" in self._plan:
            raise EngineStartError(self._plan["load_error"])
        self.status = EngineStatus.READY
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self._lose)

    async def stop(self, grace: float) -> None:
        Path(self._plan["stopped"]).write_text(f"stopped with {len(self.live)} live, {grace:.0f} s of grace")

    def _lose(self) -> None:
        self.die()
        self.fatal.set_exception(EngineStartError("crashed too often"))


def main() -> int:
    plan = json.loads(sys.argv[1])
    settings = load(plan["settings"])

    def make_engine(config: EngineConfig) -> ManagedFakeEngine:
        return ManagedFakeEngine(config.model, plan)

    return run(settings, make_engine)


if __name__ == "__main__":
    sys.exit(main())
