"""Several async generators as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

Item = TypeVar("Item")


async def merge(streams: Sequence[AsyncGenerator[Item, None]]) -> AsyncGenerator[tuple[int, Item], None]:
    """Yield the items of all streams as they come, each with the number of its stream.

    All streams are closed when this generator is closed or when one of them fails.
    """
    if len(streams) == 1:  # the usual case, without a task and a queue
        async with aclosing(streams[0]) as stream:
            async for item in stream:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, Item] | asyncio.Task[None]] = asyncio.Queue()

    async def forward(number: int, stream: AsyncGenerator[Item, None]) -> None:
        async for item in stream:
            queue.put_nowait((number, item))

    tasks = [asyncio.ensure_future(forward(i, stream)) for i, stream in enumerate(streams)]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)
    try:
        num_running = len(tasks)
        while num_running:
            entry = await queue.get()
            if isinstance(entry, tuple):
                yield entry
            else:
                entry.result()  # raises the stream's exception
                num_running -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
