"""Kill processes of a server while clients stream from it, and check that no stream is wrong or lost.

    python scripts/soak/soak_kills.py --seconds 300 -- --tp 2 --device cpu
    python scripts/soak/soak_kills.py --kill raylet:SIGKILL --phase load -- --tp 2 --device cpu
    python scripts/soak/soak_kills.py --kill rank:SIGKILL,gcs_server:SIGKILL --kill raylet:SIGSTOP -- --tp 2

With --seconds, one or two random processes get a random signal every few seconds. With --kill, the processes of each
--kill get their signals at once while all clients stream, in one phase: "start" (as soon as the process exists),
"load", "recovery" (while the ranks start again after the loss of one), "ray-recovery" (while Ray starts again after the
loss of the raylet), "drain". One server after another serves for all of them, the same one as long as it lives.
Flags after `--` go to the server.

Each stream has a seed, and its text is compared with that of an undisturbed server. Two of the streams have a grammar
that no other request has, and two are chats. Three call a tool, in each of the three APIs of chats. A server may end
with status 1 and the reason in its last line; then another one is started, as a supervisor does, and its clients'
streams do not count. Faults are: wrong text, an error or no end of a stream of a server that lives, an end with another
status or without a reason, processes that are left.

Prints one line for each kill and for each fault. The last line is JSON. The exit status is 1 if there were faults.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
from process_tree import process_tree
from server_process import ServerProcess, wait

NUM_STREAMS, CHATS = 16, (12, 13)
TOOL_PATHS = {9: "/v1/chat/completions", 10: "/v1/responses", 11: "/v1/messages"}
WORDS = {"type": "array", "items": {"enum": ["sun", "moon", "star"]}, "minItems": 20, "maxItems": 30}
SCHEMA = {"type": "object", "properties": {"words": WORDS}, "required": ["words"], "additionalProperties": False}
ENDS = ("response.completed", "response.incomplete", "message_stop")
STREAM_S = 300.0  # a stream without an end for so long is lost; ranks may be down for most of it
END_S = 90.0
NOTICE = re.compile(r"ERROR|error:|WARNING the grammar compiler")
SIGNALS = ("SIGKILL", "SIGKILL", "SIGSEGV", "SIGSTOP")
HAVE_TIME_LIMITS = ("grammar compiler", "text process")
REASONS = ("error: ", "Failed to connect to GCS")  # the second one is of Ray's library, see docs/failures.md
SERVER, API_SERVER = "server", "API server"  # the streams of an API server end with it: no random one is killed
FIRST_VICTIMS = {"recovery": "rank", "ray-recovery": "raylet"}  # by phase
PHASES = ("start", "load", *FIRST_VICTIMS, "drain")
ENDING_PHASES = ("start", "drain")  # each kill gets another server


@dataclass
class Outcome:
    """The counts of the whole run."""

    kills: Counter[str] = field(default_factory=Counter)
    right: int = 0
    wrong: int = 0
    lost: int = 0
    restarts: int = 0
    exits: list[str] = field(default_factory=list)  # last lines of servers that have ended
    rounds: list[dict[str, object]] = field(default_factory=list)  # the result of each --kill
    faults: list[str] = field(default_factory=list)

    def fault(self, text: str) -> None:
        self.faults.append(text)
        print(f"FAULT: {text}", flush=True)


def body_of(number: int, unique: int, length: int) -> dict[str, object]:
    """Return a request; numbers 9 to 11 call a tool, 12 and 13 are chats, 14 and 15 have a grammar of their own."""
    prompt = ["In the beginning", "And it came to pass", "The king", "Blessed is"][number % 4]
    if number in TOOL_PATHS:
        return tool_body(TOOL_PATHS[number], [{"role": "user", "content": prompt}], length)
    body: dict[str, object] = {
        "seed": number, "max_tokens": length, "temperature": 0.9, "stream": True, "ignore_eos": True,
    }  # fmt: skip
    body |= {"messages": [{"role": "user", "content": prompt}]} if number in CHATS else {"prompt": prompt}
    if number >= 14:
        body |= {"structured_outputs": {"regex": grammar(unique)}, "ignore_eos": False, "max_tokens": 400}
    return body


def tool_body(path: str, messages: list[dict[str, str]], length: int) -> dict[str, object]:
    """Return a chat with a tool that must be called."""
    body: dict[str, object] = {"model": "lockstep-demo", "temperature": 0, "stream": True}
    function: dict[str, object] = {"name": "say", "parameters": SCHEMA}
    if path == "/v1/messages":
        tool = {"name": "say", "input_schema": SCHEMA}
        return body | {"messages": messages, "max_tokens": length, "tools": [tool], "tool_choice": {"type": "any"}}
    body["tool_choice"] = "required"
    if path == "/v1/responses":
        return body | {"input": messages, "max_output_tokens": length, "tools": [{"type": "function", **function}]}
    return body | {"messages": messages, "max_tokens": length, "tools": [{"type": "function", "function": function}]}


def path_of(number: int) -> str:
    return TOOL_PATHS.get(number, "/v1/chat/completions" if number in CHATS else "/v1/completions")


def text_of(event: dict[str, Any]) -> str:
    """Return the text or the arguments of an event of any API."""
    if "choices" not in event:
        delta = event.get("delta") or ""
        return delta if isinstance(delta, str) else delta.get("partial_json") or delta.get("text") or ""
    choice = event["choices"][0]
    if "text" in choice:
        return str(choice["text"])
    calls = "".join(call["function"].get("arguments") or "" for call in choice["delta"].get("tool_calls") or ())
    return (choice["delta"].get("content") or "") + calls


def is_end(event: dict[str, Any]) -> bool:
    return bool(event["choices"][0]["finish_reason"]) if "choices" in event else event["type"] in ENDS


def grammar(unique: int) -> str:
    return f"(([a-z]{{2,6}} ){{12,18}}){unique}"


async def stream(client: httpx.AsyncClient, url: str, body: dict[str, object], times: list[float] | None = None) -> str:
    """Return the text of a stream; raises RuntimeError for an error of the server. Appends each event's time."""
    text, finished = "", False
    async with client.stream("POST", url, json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"HTTP {response.status_code}: {(await response.aread()).decode()[:300]}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if times is not None:
                    times.append(time.monotonic())
                if event.get("type") == "error" or event.get("error"):
                    raise RuntimeError(str(event)[:300])
                text += text_of(event)
                finished = finished or is_end(event)
    if not finished:
        raise RuntimeError("the stream ended early")
    return text


class Clients:
    """Sixteen clients of one server."""

    def __init__(self, server: ServerProcess, outcome: Outcome, expected: list[str], length: int) -> None:
        self._server, self._outcome, self._expected, self._length = server, outcome, expected, length
        self._numbers = itertools.count(1000)
        self._times: list[list[float]] = [[] for _ in range(NUM_STREAMS)]  # of each stream's events

    async def run(self, until: asyncio.Event, url: str) -> None:
        """Start one stream after another with each client, until the event."""
        async with httpx.AsyncClient(timeout=httpx.Timeout(STREAM_S)) as client:
            await asyncio.gather(*(self._repeat(client, url, number, until) for number in range(NUM_STREAMS)))

    async def run_once(self, url: str) -> None:
        """Receive one stream with each client."""
        async with httpx.AsyncClient(timeout=httpx.Timeout(STREAM_S)) as client:
            await asyncio.gather(*(self._stream(client, url, number) for number in range(NUM_STREAMS)))

    @property
    def all_begun(self) -> bool:
        return all(self._times)

    async def _repeat(self, client: httpx.AsyncClient, url: str, number: int, until: asyncio.Event) -> None:
        while not until.is_set() and self._server.process.poll() is None:
            await self._stream(client, url, number)

    async def _stream(self, client: httpx.AsyncClient, url: str, number: int) -> None:
        unique, times = next(self._numbers), self._times[number]
        times.clear()
        body = body_of(number, unique, self._length)
        try:
            text = await asyncio.wait_for(stream(client, url + path_of(number), body, times), STREAM_S)
        except Exception as error:  # noqa: BLE001 - anything is a lost stream
            last = f", the last one {time.monotonic() - times[-1]:.0f} s ago" if times else ""
            await asyncio.sleep(0.5)
            await self._lose(f"stream {number}, after {len(times)} events{last}", error)
            return
        is_right = re.fullmatch(grammar(unique), text) if number >= 14 else text == self._expected[number]
        if is_right:
            self._outcome.right += 1
        else:
            self._outcome.wrong += 1
            self._outcome.fault(f"stream {number} is wrong: {text[:200]!r}")

    async def _lose(self, name: str, error: Exception) -> None:
        """Count a stream as lost, unless the server is about to end."""
        deadline = time.monotonic() + 10
        while self._server.process.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        if self._server.process.poll() is None and not self._server.drains:
            self._outcome.lost += 1
            log = "".join(self._server.log().splitlines(keepends=True)[-30:])
            self._outcome.fault(f"lost is {name}: {type(error).__name__}: {error}; the log ends with\n{log}")


class Soak:
    """One server after another, its clients, and the kills."""

    def __init__(self, flags: list[str], length: int, seed: int, prints_logs: bool = False) -> None:
        self.prints_logs = prints_logs
        self.flags = ["--max-restarts=1000", "--step-timeout=8", "--max-num-seqs=16", "--drain-timeout=60", *flags]
        self.outcome, self.length, self.chance = Outcome(), length, random.Random(seed)
        self.expected: list[str] = []

    def start(self) -> KillableServer:
        return KillableServer(*self.flags)

    async def learn(self, server: KillableServer, url: str) -> None:
        """Note the texts of an undisturbed server."""
        async with httpx.AsyncClient(timeout=STREAM_S) as client:
            bodies = [(path_of(number), body_of(number, 999, self.length)) for number in range(NUM_STREAMS)]
            self.expected = await asyncio.gather(*(stream(client, url + path, body) for path, body in bodies))

    async def kill_at_random(self, seconds: float, least_s: float, most_s: float) -> None:
        """Serve for some seconds and send random signals."""
        deadline, server = time.monotonic() + seconds, self.start()
        while time.monotonic() < deadline:
            url = await asyncio.to_thread(server.url)
            if not self.expected:
                await self.learn(server, url)
                deadline = time.monotonic() + seconds
            done = asyncio.Event()
            clients = asyncio.create_task(Clients(server, self.outcome, self.expected, self.length).run(done, url))
            while time.monotonic() < deadline and server.process.poll() is None:
                await asyncio.sleep(self.chance.uniform(least_s, most_s))
                for _ in range(self.chance.choice([1, 1, 2])):
                    self._kill_random(server)
            done.set()
            await clients
            await self.end(server)
            if time.monotonic() < deadline:
                server = self.start()

    def _kill_random(self, server: KillableServer) -> None:
        tree = process_tree(server.process.pid)
        if tree and server.process.poll() is None:
            role = self.chance.choice(sorted(set(tree.values()) - {API_SERVER}))
            # A grammar or a text is refused, rightly, if its process is stopped: it has taken too long.
            self.kill(server, role, self.chance.choice(SIGNALS[:3] if role in HAVE_TIME_LIMITS else SIGNALS))

    async def kill_in_rounds(self, rounds: list[str], phase: str) -> None:
        """For each element, send its signals once in this phase and wait for the streams."""
        server: KillableServer | None = None
        outcome = self.outcome
        for kills in rounds:
            targets = [tuple(kill.rsplit(":", 1)) for kill in kills.split(",")]
            right, restarts, num_exits, started = outcome.right, outcome.restarts, len(outcome.exits), time.monotonic()
            server = server or self.start()
            if phase == "start":
                await self._kill_at_start(server, targets)
            else:
                await self._kill_with_streams(server, targets, phase)
            outcome.restarts += server.num_new_restarts()
            if phase in ENDING_PHASES or server.ended or len(outcome.rounds) == len(rounds) - 1:
                await self.end(server)
                server = None
            outcome.rounds.append({
                "kills": kills, "right": outcome.right - right, "restarts": outcome.restarts - restarts,
                "exits": outcome.exits[num_exits:], "seconds": round(time.monotonic() - started, 1),
            })  # fmt: skip
            print(outcome.rounds[-1], flush=True)

    async def _kill_at_start(self, server: KillableServer, targets: list[tuple[str, ...]]) -> None:
        for role, number in targets:
            await asyncio.to_thread(wait, lambda r=role: server.pids(r) or server.ended, END_S)
            self.kill(server, role, number)
        await asyncio.to_thread(wait, lambda: "on http://" in server.log() or server.ended, END_S)

    async def _kill_with_streams(self, server: KillableServer, targets: list[tuple[str, ...]], phase: str) -> None:
        url = await asyncio.to_thread(server.url)
        if not self.expected:
            await self.learn(server, url)
        right, roles = self.outcome.right, [role for role, _ in targets]
        await asyncio.to_thread(wait, server.is_complete, END_S)
        clients = Clients(server, self.outcome, self.expected, self.length)
        running = asyncio.create_task(clients.run_once(url))
        await asyncio.to_thread(
            wait, lambda: (clients.all_begun and all(map(server.pids, roles))) or server.ended, END_S
        )
        if phase in FIRST_VICTIMS:
            await self._start_recovery(server, FIRST_VICTIMS[phase], roles[0])
        if phase == "drain":
            server.drains = True
            server.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
        for role, number in targets:
            self.kill(server, role, number)
        await running
        if not server.ended and self.outcome.right - right < NUM_STREAMS:
            self.outcome.fault(f"only {self.outcome.right - right} of {NUM_STREAMS} streams ended")

    async def _start_recovery(self, server: KillableServer, victim: str, next_victim: str) -> None:
        """Kill a process; return when there is another one with its role, and one of the next role."""
        before = set(server.pids(victim))
        self.kill(server, victim, "SIGKILL")
        await asyncio.to_thread(
            wait, lambda: (set(server.pids(victim)) - before and server.pids(next_victim)) or server.ended, END_S
        )

    def kill(self, server: KillableServer, role: str, name: str) -> None:
        """Send the signal to one of the processes with this role."""
        pids = [pid for pid in server.pids(role) if pid not in server.killed]
        if not pids:
            print(f"no process has the role {role}", flush=True)
            return
        pid = self.chance.choice(pids)
        with suppress(ProcessLookupError):
            os.kill(pid, getattr(signal, name))
        server.killed[pid] = role
        self.outcome.kills[f"{role} {name}"] += 1
        print(f"{time.strftime('%H:%M:%S')} {name} to {role} ({pid})", flush=True)

    async def end(self, server: KillableServer) -> None:
        """End the server, if it lives, and check how it has ended and what is left."""
        was_killed = SERVER in server.killed.values()
        if server.process.poll() is None and not server.drains:
            server.drains = True
            server.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(wait, lambda: server.process.poll() is not None, END_S)
        status, log = server.process.poll(), server.log()
        if self.prints_logs:
            print(log)
        self.outcome.restarts += server.num_new_restarts()
        last = log.strip().rpartition("\n")[2]
        if status is None:
            self.outcome.fault(f"the server does not end; the last line of its log: {last}")
        elif status != 0 and not was_killed:
            self.outcome.exits.append(f"status {status}: {last}")
            print(f"the server has ended with status {status}: {last}", flush=True)
            if status not in (1, 2) or not any(reason in last for reason in REASONS):
                self.outcome.fault(f"status {status} after: {log[-1500:]}")
        if "Traceback" in log:
            self.outcome.fault(f"a traceback: {log[max(0, log.index('Traceback') - 300) :][:3000]}")
        remains = await asyncio.to_thread(server.remains, 15)
        if remains:
            self.outcome.fault(f"left behind: {remains}")
        server.kill()


class KillableServer(ServerProcess):
    """A server, the signals that its processes got, and whether it drains."""

    def __init__(self, *flags: str) -> None:
        super().__init__(*flags)
        self.killed: dict[int, str] = {}  # pid -> role
        self.drains = False
        self._num_restarts, self._num_ranks = 0, 0

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def pids(self, role: str) -> list[int]:
        if role == SERVER:
            return [self.process.pid]
        return [pid for pid, found in process_tree(self.process.pid).items() if found == role]

    def is_complete(self) -> bool:
        """Return whether it has as many ranks as at the first call: replicas are replaced while streams go on."""
        self._num_ranks = self._num_ranks or len(self.pids("rank"))
        return len(self.pids("rank")) == self._num_ranks

    def num_new_restarts(self) -> int:
        """Return how often its ranks were started again since the last call."""
        before, self._num_restarts = self._num_restarts, self.log().count("back after")
        return self._num_restarts - before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0, help="time of random kills")
    parser.add_argument("--pause", type=float, nargs=2, default=(1, 20), help="shortest and longest time between kills")
    parser.add_argument("--kill", action="append", default=[], help="ROLE:SIGNAL,ROLE:SIGNAL at once")
    parser.add_argument("--phase", choices=PHASES, default="load", help="when --kill happens")
    parser.add_argument("--length", type=int, default=400, help="tokens of a stream")
    parser.add_argument("--seed", type=int, default=1, help="of the random kills")
    parser.add_argument("--log", action="store_true", help="print the logs of the servers")
    parser.add_argument("flags", nargs="*", help="flags of the server")
    options = parser.parse_args()
    soak = Soak(options.flags, options.length, options.seed, options.log)
    if options.kill:
        asyncio.run(soak.kill_in_rounds(options.kill, options.phase))
    else:
        asyncio.run(soak.kill_at_random(options.seconds, *options.pause))
    outcome = soak.outcome
    print(json.dumps({
        "kills": sum(outcome.kills.values()), "by role": dict(sorted(outcome.kills.items())), "right": outcome.right,
        "wrong": outcome.wrong, "lost": outcome.lost, "restarts": outcome.restarts, "exits": outcome.exits,
        "rounds": outcome.rounds, "faults": len(outcome.faults),
    }))  # fmt: skip
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
