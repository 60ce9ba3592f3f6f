"""Events on their way from the engine thread to the asyncio tasks that wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress

from ...runtime.ledger import Generation, Output
from ...runtime.outputs import Event
from ..errors import EngineFailed


class OutputQueue:
    """The events of one generation, for a task of the loop in which the queue was made.

    Events that come while the task is busy are joined: a slow reader gets fewer events, of more tokens each.
    """

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.loop = asyncio.get_running_loop()
        self._events: dict[int, Event] = {}  # by output
        self._failure: EngineFailed | None = None
        self._ready = asyncio.Event()

    def put(self, item: Event | EngineFailed) -> None:
        """Add an event, or the failure that comes after all of them; for the loop's thread."""
        if isinstance(item, EngineFailed):
            self._failure = item
        else:
            before = self._events.get(item.index)
            self._events[item.index] = item if before is None else before.joined(item)
        self._ready.set()

    async def get(self) -> list[Event]:
        """Wait for events and return at most one of each output; raises the EngineFailed after the last of them."""
        await self._ready.wait()
        events, self._events = list(self._events.values()), {}
        if self._failure is None:
            self._ready.clear()
        elif not events:
            raise self._failure
        return events


class OutputQueues:
    """The queues of the live generations, filled by the engine thread."""

    def __init__(self) -> None:
        self._queues: dict[int, OutputQueue] = {}  # by the generation's number

    def __len__(self) -> int:
        return len(self._queues)

    @property
    def generations(self) -> list[Generation]:
        return [queue.generation for queue in self._queues.values()]

    def add(self, queue: OutputQueue) -> None:
        self._queues[queue.generation.number] = queue

    def remove(self, generation: Generation) -> None:
        self._queues.pop(generation.number, None)

    def deliver(self, outputs: Iterable[Output]) -> None:
        """Put what is new of these outputs into their queues; queues of finished generations are removed."""
        pairs = [(output, self._queues.get(output.generation.number)) for output in outputs]
        send([(queue, output.take_event()) for output, queue in pairs if queue is not None])
        for output, _ in pairs:
            if output.generation.finished:
                self.remove(output.generation)

    def fail(self, generations: Iterable[Generation], error: EngineFailed) -> None:
        """End the queues of these generations with an error."""
        queues = [self._queues.pop(generation.number, None) for generation in generations]
        send([(queue, error) for queue in queues if queue is not None])


def send(items: Iterable[tuple[OutputQueue, Event | EngineFailed]]) -> None:
    """Put items into their queues from another thread, with one wake-up for each loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[OutputQueue, Event | EngineFailed]]] = {}
    for queue, item in items:
        by_loop.setdefault(queue.loop, []).append((queue, item))
    for loop, batch in by_loop.items():
        with suppress(RuntimeError):  # the loop was closed, and its tasks have ended
            loop.call_soon_threadsafe(put_all, batch)


def put_all(batch: Iterable[tuple[OutputQueue, Event | EngineFailed]]) -> None:
    for queue, item in batch:
        queue.put(item)
