"""The pace of refusals: an address that gets many errors waits for further ones.

A request that is refused costs the event loop about a millisecond. A client that sends it again at once, on a few
connections, would take the interpreter from the requests of others.
"""

from __future__ import annotations

import asyncio
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

REFUSALS_PER_S = 100  # to one address; the first second's come at once
LONGEST_S = 5.0  # wait of a refusal
MAX_WAITING = 1024  # refusals that wait at once; further ones are sent without a wait


class RefusalPacing:
    """Delays responses of status 4xx to an address that gets more than REFUSALS_PER_S of them. Others pass at once."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._next_at: dict[str, float] = {}  # address -> time.monotonic of its next refusal, if that is to come
        self._num_waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_turn(message: Message) -> None:
            if message["type"] == "http.response.start" and 400 <= message["status"] < 500:
                await self._wait(scope["client"][0] if scope.get("client") else "")
            await send(message)

        await self._app(scope, receive, send_in_turn)

    async def _wait(self, address: str) -> None:
        delay_s = self.next_delay(address, time.monotonic())
        if delay_s > 0 and self._num_waiting < MAX_WAITING:
            self._num_waiting += 1
            try:
                await asyncio.sleep(delay_s)
            finally:
                self._num_waiting -= 1

    def next_delay(self, address: str, now: float) -> float:
        """Return how long the next refusal to an address must wait, in seconds, and count it; 0 or less: not at all."""
        if len(self._next_at) > MAX_WAITING:
            self._next_at = {other: next_at for other, next_at in self._next_at.items() if next_at > now - 1}
        next_at = max(self._next_at.get(address, 0.0), now - 1) + 1 / REFUSALS_PER_S
        self._next_at[address] = min(next_at, now + LONGEST_S)
        return self._next_at[address] - now
