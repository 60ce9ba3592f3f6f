"""The cost of a token in the server: `lockstep serve` over an executor that computes nothing.

    python scripts/bench/bench_frontend.py --streams 64 256 --tokens 400 --step-ms 10

Each live request gets its next token every --step-ms, or later if the front end has not finished the tokens before.
One process is all clients, and only counts. Prints a line of JSON for each number of streams: tokens and chunks per
second, and microseconds of the server's processor time per token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lockstep.launch.cli import main as command_line
from lockstep.launch.engine import async_engine
from lockstep.runtime.plan import RequestEnd, StepOutput
from lockstep.runtime.request import Limits
from lockstep.runtime.stats import EngineStats
from lockstep.runtime.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "soak"))
from server_process import ServerProcess, cpu_seconds

TEXT = "And it came to pass in those days, that the king of Babylon said unto all the people of the land: Behold. "
STEP_VARIABLE = "BENCH_STEP_S"  # environment variable of the server


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

    def submit(self, requests: Sequence[Any]) -> None:
        self._live |= {request.uid: [0, request.params.max_tokens] for request in requests}

    def cancel(self, uids: Sequence[int]) -> None:
        self._ended += [RequestEnd(uid, "abort", None) for uid in uids if self._live.pop(uid, None)]

    def poll(self, timeout_s: float) -> list[Any]:
        if not self._live and not self._ended:
            time.sleep(min(timeout_s, 0.001))
            return []
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

    def wait(self, wakeup: Any) -> None:
        wakeup.wait()

    def start_profile(self, num_steps: int) -> None: ...

    def take_profile(self) -> None: ...

    def close(self) -> None: ...


def serve() -> None:
    async_engine.start_executor = TextExecutor  # type: ignore[assignment]
    command_line.main()


async def stream(port: int, tokens: int) -> int:
    """Return the number of chunks of one answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"prompt": "In the", "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True})
    head = ["POST /v1/completions HTTP/1.1", "host: localhost", "connection: close", "content-type: application/json"]
    writer.write("\r\n".join([*head, f"content-length: {len(body)}", "", body]).encode())
    answer = bytearray()
    while piece := await reader.read(1 << 16):
        answer += piece
    writer.close()
    assert answer.count(b'"finish_reason":"length"') == 1, answer[-500:]
    return answer.count(b"data: {")


async def measure(server: ServerProcess, port: int, streams: int, tokens: int) -> dict[str, float]:
    pid = server.process.pid
    cpu, started = cpu_seconds(pid), time.perf_counter()
    chunks = sum(await asyncio.gather(*(stream(port, tokens) for _ in range(streams))))
    seconds, total = time.perf_counter() - started, streams * tokens
    return {
        "streams": streams,
        "tokens_per_s": round(total / seconds),
        "chunks_per_s": round(chunks / seconds),
        "server_cpu_us_per_token": round((cpu_seconds(pid) - cpu) / total * 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--step-ms", type=float, default=10.0)
    options = parser.parse_args()
    server = ServerProcess("--device=cpu", program=[__file__], **{STEP_VARIABLE: str(options.step_ms / 1000)})
    try:
        port = int(server.url().rpartition(":")[2])
        asyncio.run(stream(port, 10))
        for streams in options.streams:
            print(json.dumps(asyncio.run(measure(server, port, streams, options.tokens))), flush=True)
        server.end()
    finally:
        server.kill()


if __name__ == "__main__":
    serve() if sys.argv[1:2] == ["serve"] else main()
