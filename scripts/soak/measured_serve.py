"""`lockstep serve` that measures how long a token takes from the ranks to its socket.

    MEASURED_TIMES=times.json python scripts/soak/measured_serve.py serve MODEL ...

The first clock is read when the front end has a step's tokens, the second when a token has been written. The time
between them is the server's share of the latency: text, the queue of the event loop, JSON and the write. It includes
the time that the tokens of one step wait for each other. Only answers of the engine's process are measured.

At the end, a JSON object goes to $MEASURED_TIMES. `to_loop_us` and `to_socket_us` hold the latency of each token in
microseconds, to the event loop and to the socket. `at` holds the time of each write, and `cpu_s` the CPU seconds of the
process between the first and the last write.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncGenerator, Iterable
from pathlib import Path
from typing import Any

from lockstep.launch.cli.main import main
from lockstep.launch.engine import event_streams
from lockstep.launch.server.handlers import Handlers
from lockstep.runtime.frontend import Frontend
from lockstep.runtime.outputs import Event
from lockstep.runtime.plan import StepOutput

step_received_at = 0.0
times_of: dict[int, tuple[float, float]] = {}  # id of a live event -> (arrival of its step, arrival in the loop)
to_loop_us: list[float] = []
to_socket_us: list[float] = []
writes: list[tuple[float, float]] = []  # time and CPU seconds of this process after each write


def measure_steps() -> None:
    """Note when each event's step arrived, and when the event reached the event loop."""
    update, put, send = Frontend._update, event_streams.put_all, event_streams.send
    step_of: dict[int, float] = {}

    def timed_update(self: Frontend, step: StepOutput) -> Any:  # every executor's steps pass it
        global step_received_at
        step_received_at = time.perf_counter()
        return update(self, step)

    def timed_send(items: Iterable[tuple[Any, Any]]) -> None:
        batch = list(items)
        step_of.update((id(event), step_received_at) for _, event in batch)
        send(batch)

    def timed_put(batch: Iterable[tuple[Any, Any]]) -> None:
        now, items = time.perf_counter(), list(batch)
        times_of.update((id(event), (step_of.pop(id(event), now), now)) for _, event in items)
        put(items)

    Frontend._update = timed_update  # type: ignore[method-assign]
    event_streams.send, event_streams.put_all = timed_send, timed_put


def measure_joins() -> None:
    """Give a joined event the times of its first event."""
    join = Event.joined

    def timed_join(self: Event, *later: Event) -> Event:
        joined = join(self, *later)
        if id(self) in times_of:
            times_of[id(joined)] = times_of.pop(id(self))
        for event in later:
            times_of.pop(id(event), None)
        return joined

    Event.joined = timed_join  # type: ignore[method-assign]


def measure_writes() -> None:
    """Note when each event has been written."""
    events = Handlers._events

    async def timed_events(*arguments: Any) -> AsyncGenerator[tuple[int, Event], None]:
        async for choice, event in events(*arguments):
            step_at, loop_at = times_of.pop(id(event))
            yield choice, event
            now = time.perf_counter()  # the event has been written when the next one is requested
            to_loop_us.append(1e6 * (loop_at - step_at))
            to_socket_us.append(1e6 * (now - step_at))
            writes.append((now, time.process_time()))

    Handlers._events = timed_events  # type: ignore[method-assign]


def save() -> None:
    """Write the measurements to $MEASURED_TIMES."""
    cpu_s = writes[-1][1] - writes[0][1] if writes else 0.0
    times = {"to_loop_us": to_loop_us, "to_socket_us": to_socket_us, "at": [at for at, _ in writes], "cpu_s": cpu_s}
    Path(os.environ["MEASURED_TIMES"]).write_text(json.dumps(times))


if __name__ == "__main__":
    measure_steps()
    measure_joins()
    measure_writes()
    try:
        main()
    finally:
        save()
