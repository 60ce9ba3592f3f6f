"""Events on their way from the engine thread to the asyncio tasks that wait for them, and the merging of streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing, suppress
from typing import Protocol, TypeVar

from ...runtime.generation import Generation, Output
from ...runtime.outputs import Event
from ..errors import EngineFailed

Item = TypeVar("Item")
STARTED_AT_ONCE = 2  # streams in one turn of the loop: a long prompt takes half a millisecond


class EventSink(Protocol):
    """What receives the events of a generation; `put` is called in the thread of `loop`."""

    loop: asyncio.AbstractEventLoop

    def put(self, item: Event | EngineFailed) -> None:
        """Take an event, or the failure that comes after all of them."""


class OutputQueue:
    """The events of one generation, for a task of the loop in which the queue was made.

    Events that come while the task is busy are joined: a slow reader gets fewer events, of more tokens each.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._events: dict[int, Event] = {}  # index of the output -> its joined events
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None  # of the task in `get`, until there is something to return

    def put(self, item: Event | Exception) -> None:
        """Add an event, or the failure that comes after all of them; for the loop's thread."""
        if isinstance(item, Exception):
            self._failure = item
        else:
            before = self._events.get(item.index)
            self._events[item.index] = item if before is None else before.joined(item)
        if (waiter := self._waiter) is not None:
            self._waiter = None
            if not waiter.done():  # its task was cancelled
                waiter.set_result(None)

    async def get(self) -> list[Event]:
        """Wait for events and return at most one of each output; raises the failure after the last of them.

        Only one task may call this at a time.
        """
        if not self._events:
            if self._failure is not None:
                raise self._failure
            self._waiter = self.loop.create_future()  # half the time of an asyncio.Event
            await self._waiter
            if not self._events:
                return await self.get()
        events, self._events = list(self._events.values()), {}
        return events


class OutputQueues:
    """The sinks of the live generations, filled by the engine thread."""

    def __init__(self) -> None:
        self._queues: dict[Generation, EventSink] = {}

    def __len__(self) -> int:
        return len(self._queues)

    @property
    def generations(self) -> list[Generation]:
        return list(self._queues)

    def add(self, generation: Generation, sink: EventSink) -> None:
        self._queues[generation] = sink

    def remove(self, generation: Generation) -> None:
        self._queues.pop(generation, None)

    def deliver(self, outputs: Iterable[Output]) -> None:
        """Put the new events of these outputs into their queues; queues of finished generations are removed."""
        pairs = [(output, self._queues.get(output.generation)) for output in outputs]
        send([(queue, output.take_event()) for output, queue in pairs if queue is not None])
        for output, _ in pairs:
            if output.finished and output.generation.finished:
                self.remove(output.generation)

    def fail(self, generations: Iterable[Generation], error: EngineFailed) -> None:
        """End the queues of these generations with an error."""
        queues = [self._queues.pop(generation, None) for generation in generations]
        send([(queue, error) for queue in queues if queue is not None])


def send(items: Iterable[tuple[EventSink, Event | EngineFailed]]) -> None:
    """Put items into their queues from another thread, with one wake-up for each loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[EventSink, Event | EngineFailed]]] = {}
    for queue, item in items:
        by_loop.setdefault(queue.loop, []).append((queue, item))
    for loop, batch in by_loop.items():
        with suppress(RuntimeError):  # the loop was closed, and its tasks have ended
            loop.call_soon_threadsafe(put_all, batch)


def put_all(batch: Iterable[tuple[EventSink, Event | EngineFailed]]) -> None:
    for queue, item in batch:
        queue.put(item)


async def merge(
    streams: Sequence[AsyncGenerator[Item, None]], starting: asyncio.Lock
) -> AsyncGenerator[tuple[int, Item], None]:
    """Yield the items of all streams as they come, each with the number of its stream.

    Several streams start one after the other, and only while they hold the lock: those of many callers together would
    keep other tasks from their turns. All are closed when this generator is closed or when one of them fails.
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

    tasks: list[asyncio.Task[None]] = []
    try:
        for first in range(0, len(streams), STARTED_AT_ONCE):
            async with starting:
                for i, stream in enumerate(streams[first : first + STARTED_AT_ONCE], start=first):
                    tasks.append(asyncio.ensure_future(forward(i, stream)))
                    tasks[-1].add_done_callback(queue.put_nowait)
                await asyncio.sleep(0)
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
