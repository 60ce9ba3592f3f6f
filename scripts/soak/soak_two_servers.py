"""Two servers on one machine: both start at once, answer equally, and lose nothing when the other one fails.

    python scripts/soak/soak_two_servers.py --kill rank:SIGKILL --kill raylet:SIGKILL -- --tp 2 --device cpu

Sixteen clients stream from each server, with the requests of soak_kills.py. For each --kill, processes of the first
server get the signals, and the second one must go on without a restart. At last the first server itself is killed and
started again. Flags after `--` go to both servers.

Prints one line for each kill and for each fault. The last line is JSON. The exit status is 1 if there were faults.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys

from server_process import wait
from soak_kills import END_S, NUM_STREAMS, SERVER, Clients, Outcome, Soak


class TwoServers:
    """Both servers, and what their clients got."""

    def __init__(self, flags: list[str], length: int) -> None:
        self._soak, self._length = Soak(flags, length, seed=1), length
        self.outcome = self._soak.outcome
        self._first, self._second = self._soak.start(), self._soak.start()
        self._urls: list[str] = []

    async def run(self, rounds: list[str]) -> None:
        """Send the signals of each round to the first server, kill it, and end both."""
        await self._learn()
        for kills in rounds:
            await self._kill(kills, num_restarts=1)
        await self._kill(f"{SERVER}:SIGKILL", num_restarts=0)
        await asyncio.to_thread(wait, lambda: not self._first.processes(), END_S)
        if left := self._first.processes():
            self.outcome.fault(f"left by the first server: {left}")
        self._first = self._soak.start()
        await self._learn()
        for server in (self._first, self._second):
            server.drains = True
            status = await asyncio.to_thread(server.end)
            if status != 0:
                self.outcome.fault(f"status {status} after: {server.log()[-1500:]}")
        for server in (self._first, self._second):
            if remains := await asyncio.to_thread(server.remains, 15):
                self.outcome.fault(f"left behind: {remains}")

    async def _learn(self) -> None:
        """Note the texts of the servers, which must be equal; raises SystemExit if one does not start."""
        self._urls = list(await asyncio.gather(*(asyncio.to_thread(s.url) for s in (self._first, self._second))))
        texts = [self._soak.expected] if self._soak.expected else []
        for server, url in zip((self._first, self._second), self._urls, strict=True):
            await self._soak.learn(server, url)
            texts.append(self._soak.expected)
        if any(text != texts[0] for text in texts):
            self.outcome.fault(f"the servers answer differently: {texts}")

    async def _kill(self, kills: str, num_restarts: int) -> None:
        """Send signals to the first server while both stream, and check the streams and restarts of both."""
        outcomes = Outcome(), Outcome()
        servers = self._first, self._second
        for server in servers:
            await asyncio.to_thread(wait, server.is_complete, END_S)
        clients = [
            Clients(server, outcome, self._soak.expected, self._length)
            for server, outcome in zip(servers, outcomes, strict=True)
        ]
        streams = [asyncio.create_task(c.run_once(url)) for c, url in zip(clients, self._urls, strict=True)]
        await asyncio.to_thread(wait, lambda: all(c.all_begun for c in clients), END_S)
        for kill in kills.split(","):
            self._soak.kill(self._first, *kill.rsplit(":", 1))
        await asyncio.gather(*streams)
        restarts = [server.num_new_restarts() for server in servers]
        expected_right = [0 if self._first.ended else NUM_STREAMS, NUM_STREAMS]
        result = {"kills": kills, "right": [outcome.right for outcome in outcomes], "restarts": restarts}
        print(result, flush=True)
        self.outcome.rounds.append(result)
        for outcome in outcomes:
            self.outcome.faults += outcome.faults
        if restarts != [num_restarts, 0] or outcomes[0].right < expected_right[0] or outcomes[1].right < NUM_STREAMS:
            self.outcome.fault(f"expected were {[num_restarts, 0]} restarts and {expected_right} streams, not {result}")

    def kill(self) -> None:
        """Kill what is left."""
        for server in (self._first, self._second):
            server.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kill", action="append", default=[], help="ROLE:SIGNAL,ROLE:SIGNAL at once")
    parser.add_argument("--length", type=int, default=100, help="tokens of a stream")
    parser.add_argument("flags", nargs="*", help="flags of the servers")
    options = parser.parse_args()
    servers = TwoServers(options.flags, options.length)
    try:
        asyncio.run(servers.run(options.kill))
    finally:
        servers.kill()
    outcome = servers.outcome
    print(json.dumps({"rounds": outcome.rounds, "faults": len(outcome.faults)}))
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
