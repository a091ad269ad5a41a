"""Several streams of engine events as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from app.engine.interface import RequestStream
from app.engine.request import Event

# events of the stream of that number, in the order in which they came
Batch = list[tuple[int, list[Event]]]


async def merge(streams: Sequence[RequestStream]) -> AsyncGenerator[Batch, None]:
    """Everything that has arrived on any stream since the last batch, until all have ended.

    Raises what a stream raises. Does not close the streams.
    """
    if len(streams) == 1:
        async for events in streams[0]:
            yield [(0, events)]
        return
    queue: asyncio.Queue[tuple[int, list[Event]] | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(number, stream, queue)) for number, stream in enumerate(streams)]
    try:
        num_open = len(tasks)
        while num_open:
            items = [await queue.get()]
            while not queue.empty():
                items.append(queue.get_nowait())
            num_open -= items.count(None)
            batch = [item for item in items if item is not None]
            if batch:
                yield batch
            _raise_first(tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(number: int, stream: RequestStream, queue: asyncio.Queue[tuple[int, list[Event]] | None]) -> None:
    try:
        async for events in stream:
            queue.put_nowait((number, events))
    finally:
        queue.put_nowait(None)


def _raise_first(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
            raise error
