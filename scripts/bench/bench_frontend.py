"""The cost of a token in the server: `lockstep serve` over an executor that computes nothing.

    python scripts/bench/bench_frontend.py --streams 64 256 --tokens 400 --step-ms 10
    python scripts/bench/bench_frontend.py --streams 256 --step-ms 9 --host-ms 2 --chat --profile loop.prof
    python scripts/bench/bench_frontend.py --streams 256 --step-ms 7 --api-server-count 4

Each live request gets its next token every --step-ms, or later if the front end has not finished the tokens before.
With --host-ms the executor also computes in Python for that long in each step, as a scheduler does.
One process is all clients, and only counts. Prints a line of JSON for each number of streams: tokens and chunks per
second, and microseconds of the server's processor time per token: in all, and of each of its busy threads. The loop is
asyncio's thread of the engine's process; the loops of other processes have the name of the process and its pid.
--profile writes the functions of the engine's process for `python -m pstats`, and slows it down.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lockstep.launch.cli import main as command_line
from lockstep.launch.engine import async_engine
from lockstep.launch.server import serve as server_command
from lockstep.runtime.limits import Limits
from lockstep.runtime.plan import RequestEnd, StepOutput
from lockstep.runtime.stats import EngineStats
from lockstep.runtime.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "soak"))
from server_process import ServerProcess

TEXT = "And it came to pass in those days, that the king of Babylon said unto all the people of the land: Behold. "
STEP_VARIABLE, HOST_VARIABLE, PROFILE_VARIABLE = "BENCH_STEP_S", "BENCH_HOST_S", "BENCH_PROFILE"  # of the server
BUSY_S = 0.02  # threads with less processor time are left out


class TextExecutor:
    """An Executor that answers every request with the tokens of TEXT."""

    def __init__(self, config: Any, model: Any, folder: Path, connection: Any = None) -> None:
        self.limits = Limits(
            max_model_len=4096, max_num_seqs=1024, max_num_batched_tokens=8192, num_pages=1 << 20, page_size=16,
            vocab_size=model.vocab_size,
        )  # fmt: skip
        self.startup: dict[str, float] = {}
        self.locations: list[Any] = []
        self.stats = EngineStats()
        self._ids = Tokenizer(folder).encode(TEXT)
        self._live: dict[int, list[int]] = {}  # uid -> [tokens produced, tokens requested]
        self._ended: list[Any] = []
        self._step_s, self._due = float(os.environ[STEP_VARIABLE]), 0.0
        self._host_s = float(os.environ[HOST_VARIABLE])

    def submit(self, requests: Sequence[Any]) -> None:
        self._live |= {request.uid: [0, request.params.max_tokens] for request in requests}

    def cancel(self, uids: Sequence[int]) -> None:
        self._ended += [RequestEnd(uid, "abort", None) for uid in uids if self._live.pop(uid, None)]

    def poll(self, timeout_s: float) -> list[Any]:
        if not self._live and not self._ended:
            time.sleep(min(timeout_s, 0.001))
            return []
        self._compute()
        time.sleep(max(0.0, self._due - time.perf_counter()))
        self._due = max(self._due, time.perf_counter() - self._step_s) + self._step_s
        cached = {uid: 0 for uid, (produced, _) in self._live.items() if produced == 0}
        tokens = [self._ids[produced % len(self._ids)] for produced, _ in self._live.values()]
        uids, ended = list(self._live), self._ended
        for uid in uids:
            self._live[uid][0] += 1
            if self._live[uid][0] == self._live[uid][1]:
                del self._live[uid]
                ended.append(RequestEnd(uid, "length", None))
        self._ended = []
        return [StepOutput(uids=uids, tokens=tokens, finished=ended, cached_tokens=cached)]

    def _compute(self) -> None:
        end = time.thread_time() + self._host_s
        while time.thread_time() < end:
            pass

    def wait(self, wakeup: Any) -> None:
        wakeup.wait()

    def start_profile(self, num_steps: int) -> None: ...

    def take_profile(self) -> None: ...

    def close(self) -> None: ...


def serve() -> None:
    async_engine.start_executor = TextExecutor  # type: ignore[assignment]
    profile, run = cProfile.Profile(), server_command.serve_until_signal

    async def profiled(*arguments: Any) -> Any:
        profile.enable()
        try:
            return await run(*arguments)
        finally:
            profile.disable()
            profile.dump_stats(os.environ[PROFILE_VARIABLE])

    if os.environ.get(PROFILE_VARIABLE):
        server_command.serve_until_signal = profiled
    command_line.main()


class CountingClient(asyncio.Protocol):
    """One streamed request; `chunks` is the number of its chunks after the end of the connection."""

    def __init__(self, body: bytes, path: str) -> None:
        self._content, self._answer = body, bytearray()
        self._head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n".encode()
        self.chunks: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        length = b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(self._content)
        transport.write(self._head + length + self._content)

    def data_received(self, data: bytes) -> None:
        self._answer += data

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer.count(b'"finish_reason":"length"') != 1:
            raise ValueError(f"no complete answer: {self._answer[-500:]!r}")
        self.chunks.set_result(self._answer.count(b"data: {"))


async def stream(port: int, tokens: int, *, is_chat: bool) -> int:
    """Return the number of chunks of one answer."""
    body: dict[str, Any] = {"max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    body |= {"messages": [{"role": "user", "content": "In the"}]} if is_chat else {"prompt": "In the"}
    path, content = "/v1/chat/completions" if is_chat else "/v1/completions", json.dumps(body).encode()
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(lambda: CountingClient(content, path), "127.0.0.1", port)
    return await client.chunks


def thread_seconds(server: ServerProcess) -> dict[str, float]:
    """Return the processor time of each thread of the server's processes by its name and id."""
    seconds = {}
    for pid in server.processes():
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):  # it has ended
                is_loop, command = task.name == str(pid), (task / "comm").read_text().strip()
                name = "loop" if pid == server.process.pid and is_loop else f"{command} {task.name}"
                seconds[name] = int((task / "schedstat").read_text().split()[0]) / 1e9
    return seconds


async def measure(server: ServerProcess, port: int, streams: int, tokens: int, *, is_chat: bool) -> dict[str, Any]:
    before, started = thread_seconds(server), time.perf_counter()
    chunks = sum(await asyncio.gather(*(stream(port, tokens, is_chat=is_chat) for _ in range(streams))))
    seconds, total = time.perf_counter() - started, streams * tokens
    after = thread_seconds(server)
    used = {name: cpu_s - before.get(name, 0.0) for name, cpu_s in after.items()}
    by_thread = {name: round(cpu_s / total * 1e6, 1) for name, cpu_s in used.items() if cpu_s > BUSY_S}
    return {
        "streams": streams,
        "tokens_per_s": round(total / seconds),
        "chunks_per_s": round(chunks / seconds),
        "server_cpu_us_per_token": round(sum(used.values()) / total * 1e6, 1),
        "tokens_per_s_and_core": round(total / sum(used.values())),
        "cpu_us_per_token_by_thread": by_thread,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--host-ms", type=float, default=0.0)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--api-server-count", type=int, default=1)
    parser.add_argument("--profile", default="")
    options = parser.parse_args()
    variables = {STEP_VARIABLE: str(options.step_ms / 1000), HOST_VARIABLE: str(options.host_ms / 1000)}
    flags = "--device=cpu", f"--api-server-count={options.api_server_count}"
    server = ServerProcess(*flags, program=[__file__], **variables, **{PROFILE_VARIABLE: options.profile})
    try:
        port = int(server.url().rpartition(":")[2])
        asyncio.run(stream(port, 10, is_chat=options.chat))
        for streams in options.streams:
            result = asyncio.run(measure(server, port, streams, options.tokens, is_chat=options.chat))
            print(json.dumps(result), flush=True)
        server.end()
    finally:
        server.kill()


if __name__ == "__main__":
    serve() if sys.argv[1:2] == ["serve"] else main()
