"""`lockstep serve` with two clocks: when a step's tokens came from the ranks, and when a token went to its socket.

    python scripts/soak/measured_serve.py serve MODEL ...

Between the two lies all that the server adds to a token: decoding, text, the way to the event loop and its queue there,
JSON, the write. For tokens of one step that includes waiting for each other. At the end a JSON object goes to
$MEASURED_TIMES: microseconds of the tokens, and the CPU seconds of the process while there was work.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

from lockstep.launch.cli.main import main
from lockstep.launch.cluster.ray_executor import RayExecutor
from lockstep.launch.engine import async_engine
from lockstep.launch.server.handlers import Handlers
from lockstep.runtime.outputs import Event

came: dict[int, tuple[float, float]] = {}  # of each event on its way: when its step came, when it was handed on
latest = 0.0  # when a step came
to_loop: list[float] = []
to_socket: list[float] = []
busy: list[tuple[float, float]] = []  # time, CPU seconds of this process: at each token


def stamp_steps() -> None:
    take_in, put = RayExecutor._take_in, async_engine._put

    def stamped(self: RayExecutor, messages: list[bytes]) -> Any:
        global latest
        latest = time.perf_counter()
        return take_in(self, messages)

    def putting(batch: Sequence[tuple[Any, Any]]) -> None:
        now = time.perf_counter()
        for _, event in batch:
            came[id(event)] = (latest_of.pop(id(event), now), now)
        put(list(batch))

    latest_of: dict[int, float] = {}
    send = async_engine.AsyncEngine._send

    def sending(self: Any, events: Any) -> None:
        batch = list(events)
        latest_of.update((id(event), latest) for _, event in batch)
        send(self, batch)

    RayExecutor._take_in = stamped  # type: ignore[method-assign]
    async_engine.AsyncEngine._send = sending  # type: ignore[method-assign]
    async_engine._put = putting


def stamp_joins() -> None:
    join = Event.joined

    def joining(self: Event, *later: Event) -> Event:
        joined = join(self, *later)
        if id(self) in came:  # the times of the first; the later ones have been counted with it
            came[id(joined)] = came.pop(id(self))
        for event in later:
            came.pop(id(event), None)
        return joined

    Event.joined = joining  # type: ignore[method-assign]


def stamp_writes() -> None:
    pieces = Handlers._pieces

    async def stamped(self: Handlers, *arguments: Any) -> AsyncGenerator[tuple[int, Any], None]:
        async for index, event in pieces(self, *arguments):
            step, loop = came.pop(id(event))
            yield index, event
            now = time.perf_counter()  # the event has been sent when the next one is asked for
            to_loop.append(1e6 * (loop - step))
            to_socket.append(1e6 * (now - step))
            busy.append((now, time.process_time()))

    Handlers._pieces = stamped  # type: ignore[method-assign]


def save() -> None:
    cpu = busy[-1][1] - busy[0][1] if busy else 0.0
    found = {"to_loop_us": to_loop, "to_socket_us": to_socket, "at": [when for when, _ in busy], "cpu_s": cpu}
    Path(os.environ["MEASURED_TIMES"]).write_text(json.dumps(found))


if __name__ == "__main__":
    stamp_steps()
    stamp_joins()
    stamp_writes()
    try:
        main()
    finally:
        save()
