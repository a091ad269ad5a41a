"""The engine as the API process sees it: started, talked to, and started again when it dies."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from app.engine.client.child import EngineChild
from app.engine.client.live import LiveRequests
from app.engine.config import EngineConfig
from app.engine.early import ENGINE_COMMAND, EarlyProcess
from app.engine.interface import EngineDied, EngineStartError, EngineStatus, EngineUnavailable, SampleSink
from app.engine.messages import Abort, Beat, Checked, Ready, Report, StepReport, Stop, Submit
from app.engine.request import EngineStats, GenerationRequest, ModelInfo

__all__ = ["ProcessEngineClient"]

logger = logging.getLogger(__name__)

KILL_SECONDS = 5.0


class ProcessEngineClient:
    """An engine in a process of its own, as ``interface.EngineClient``. Lives on one event loop.

    A process that dies is started again, at most ``max_restarts`` times within ``restart_window`` seconds, and its live
    requests go on behind the tokens that were told; one that was live in two such deaths is lost. After more restarts,
    or when the process can no longer load, all are lost, ``fatal`` is done and nothing is tried any more. ``command``
    starts the process; tests give one that injects faults. ``early`` becomes the first process.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        command: Sequence[str] = ENGINE_COMMAND,
        max_restarts: int = 3,
        restart_window: float = 60.0,
        restart_delay: float = 0.1,
        early: EarlyProcess | None = None,
    ) -> None:
        self._config = config
        self._command = command
        self._early = early
        self._max_restarts = max_restarts
        self._restart_window = restart_window
        self._restart_delay = restart_delay
        self._restart_times: deque[float] = deque()
        self._restart_handle: asyncio.TimerHandle | None = None
        self._status = EngineStatus.STOPPED
        self._child: EngineChild | None = None
        self._info: ModelInfo | None = None
        self._model_dir: str | None = None
        self._stats = EngineStats()
        self._num_restarts = 0
        self._num_resumed = 0
        self._last_beat = 0.0
        self._on_wait: Callable[[float], None] | None = None
        self._start_error: str | None = None
        self._live = LiveRequests()
        self._checked = asyncio.Event()
        self._ready = asyncio.Event()
        self._fatal: asyncio.Future[EngineStartError] | None = None

    @property
    def status(self) -> EngineStatus:
        return self._status

    @property
    def info(self) -> ModelInfo:
        """Raises EngineUnavailable before the first ``wait_ready`` has returned."""
        if self._info is None:
            raise EngineUnavailable("the engine is still loading")
        return self._info

    @property
    def model_dir(self) -> str:
        """The local directory of the checkpoint. Raises EngineUnavailable before ``start`` has returned."""
        if self._model_dir is None:
            raise EngineUnavailable("the engine has not been started")
        return self._model_dir

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def num_restarts(self) -> int:
        return self._num_restarts

    @property
    def num_resumed(self) -> int:
        """Requests that went on in another process."""
        return self._num_resumed

    @property
    def pid(self) -> int | None:
        """The engine process, None while there is none."""
        return self._child.pid if self._child else None

    @property
    def fatal(self) -> asyncio.Future[EngineStartError]:
        """Done, with the reason, once the engine is lost for good. Ask on the event loop."""
        if self._fatal is None:
            self._fatal = asyncio.get_running_loop().create_future()
        return self._fatal

    def heartbeat_age(self) -> float:
        """Seconds since the last message; an idle or loading engine sends one twice a second."""
        return asyncio.get_running_loop().time() - self._last_beat

    def watch_queue(self, observer: Callable[[float], None]) -> None:
        """Have ``observer`` told the seconds that each request was in the queue, once it has left it for a slot."""
        self._on_wait = observer

    async def start(self) -> None:
        """Start the process and wait until it has found a checkpoint that looks loadable. Raises EngineStartError."""
        self._status = EngineStatus.STARTING
        self._launch()
        await self._wait_for(self._checked)

    async def wait_ready(self) -> None:
        """Wait until requests are taken. Raises EngineStartError when that will not happen."""
        await self._wait_for(self._ready)

    def submit(self, request: GenerationRequest, sinks: Sequence[SampleSink]) -> None:
        """Queue a request. Raises EngineUnavailable, and ValueError for an id that is live."""
        if self._status is not EngineStatus.READY or self._child is None:
            raise EngineUnavailable(f"the engine is {self._status}")
        self._child.send(Submit(self._live.add(request, sinks), request))

    def abort_sample(self, request_id: str, sample: int) -> None:
        """End one sample early; its event still arrives. What is not live is ignored."""
        if request_id in self._live:
            self._live.note_abort(request_id, sample)
            if self._child is not None:
                self._child.send(Abort(request_id, sample))

    def abandon(self, request_id: str) -> None:
        """End all of a request, of which nothing is told any more. What is not live is ignored."""
        if request_id in self._live:
            self._live.remove(request_id)
            if self._child is not None:
                self._child.send(Abort(request_id, None))

    async def stop(self, grace: float) -> None:
        """End the process: after the step under way, by force once ``grace`` seconds have passed. Idempotent."""
        if self._restart_handle is not None:
            self._restart_handle.cancel()
        was_ready = self._status is EngineStatus.READY
        self._status = EngineStatus.STOPPED
        self._live.lose_all(EngineDied("the engine was stopped"))
        for event in (self._checked, self._ready):
            event.set()
        child = self._child
        if child is None:
            return
        if was_ready and grace > 0:
            child.send(Stop())
            await child.wait(grace)
        child.kill()
        await child.wait(KILL_SECONDS)

    def _launch(self) -> None:
        self._restart_handle = None
        self._last_beat = asyncio.get_running_loop().time()
        try:
            self._child = EngineChild(self._command, self._config, self._on_report, self._on_exit, self._early)
        except OSError as error:
            self._give_up(f"the engine process could not be started: {error}")

    async def _wait_for(self, event: asyncio.Event) -> None:
        waiter = asyncio.ensure_future(event.wait())
        try:
            awaited: list[asyncio.Future[Any]] = [waiter, self.fatal]
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiter.cancel()
        if self.fatal.done():
            raise self.fatal.result()
        if self._status is EngineStatus.STOPPED:
            raise EngineUnavailable("the engine was stopped")

    def _on_report(self, report: Report, message: bytes) -> None:
        self._last_beat = asyncio.get_running_loop().time()
        if isinstance(report, StepReport):
            self._stats = report.stats
            if report.waits and self._on_wait is not None:
                for seconds in report.waits:
                    self._on_wait(seconds)
            self._live.deliver(report, message)
        elif isinstance(report, Beat):
            self._stats = report.stats or self._stats
        elif isinstance(report, Checked):
            self._model_dir = report.model_dir
            self._checked.set()
        elif isinstance(report, Ready):
            self._on_ready(report)
        else:
            self._start_error = report.message

    def _on_ready(self, report: Ready) -> None:
        info = report.info
        self._info, self._stats = info, report.stats
        if self._status is not EngineStatus.STOPPED:
            self._status = EngineStatus.READY
            self._resume()
        self._ready.set()
        logger.info(
            "engine ready: %s, %.1f M parameters, %s on %s; slots: %d x %.1f MiB",
            info.architecture,
            info.num_parameters / 1e6,
            info.dtype,
            info.device,
            info.max_num_seqs,
            info.state_bytes_per_seq / 2**20,
        )

    def _resume(self) -> None:
        assert self._child is not None
        for command in self._live.resume():
            self._child.send(command)
            self._num_resumed += isinstance(command, Submit)

    def _on_exit(self, status: int) -> None:
        self._child = None
        self._stats = EngineStats()
        if self._status is EngineStatus.STOPPED:
            return
        was_starting = self._status is EngineStatus.STARTING
        ending = _describe_exit(status)
        if self._status is EngineStatus.READY:
            self._live.interrupt(EngineDied(f"the engine process {ending}"))
        if self._start_error is not None:
            self._give_up(self._start_error)
        elif was_starting:
            self._give_up(f"the engine process {ending} while it was loading")
        else:
            self._restart(ending)

    def _restart(self, ending: str) -> None:
        now = asyncio.get_running_loop().time()
        while self._restart_times and now - self._restart_times[0] > self._restart_window:
            self._restart_times.popleft()
        if len(self._restart_times) >= self._max_restarts:
            times = f"{self._max_restarts} restarts within {self._restart_window:g} s"
            self._give_up(f"the engine process {ending}, after {times}")
            return
        delay = self._restart_delay * 4 ** len(self._restart_times)
        logger.error("the engine process %s; starting it again in %.1f s", ending, delay)
        self._restart_times.append(now)
        self._num_restarts += 1
        self._status = EngineStatus.RESTARTING
        self._ready.clear()
        self._restart_handle = asyncio.get_running_loop().call_later(delay, self._launch)

    def _give_up(self, reason: str) -> None:
        self._status = EngineStatus.STOPPED
        self._live.lose_all(EngineDied(reason))
        if not self.fatal.done():
            self.fatal.set_result(EngineStartError(reason))


def _describe_exit(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
