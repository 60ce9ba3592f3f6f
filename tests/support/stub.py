"""A server that speaks just enough of OpenAI's protocol, over plain sockets, and remembers what it was asked."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from waiting import join

Reply = Callable[[int, dict[str, Any]], list[bytes]]  # (number of the request, its body) -> pieces of the response
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
PAUSE_S = 0.002  # between pieces


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields, ensure_ascii=False).encode() + b"\n\n"


def refuse(status: int, message: str) -> list[bytes]:
    body = json.dumps({"error": {"message": message}}).encode()
    return [f"HTTP/1.1 {status} No\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body]


def completion(number: int, body: dict[str, Any]) -> list[bytes]:
    """Return one chunk for each of max_tokens tokens, then the usage."""
    count = body["max_tokens"]
    chunks = [
        event(choices=[{"text": "x", "finish_reason": "length" if i == count - 1 else None}]) for i in range(count)
    ]
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
    return [HEAD, *chunks, event(choices=[], usage=usage), b"data: [DONE]\n\n"]


def conversation(number: int, body: dict[str, Any]) -> list[bytes]:
    """Return the events of an answer: the role, the words of the last message reversed, the end, the usage."""
    words = [
        event(choices=[{"delta": {"content": word + " "}}]) for word in body["messages"][-1]["content"].split()[::-1]
    ]
    first = event(choices=[{"delta": {"role": "assistant", "content": ""}}])
    last = event(choices=[{"delta": {}, "finish_reason": "stop"}])
    usage = event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": len(words)})
    return [HEAD, first, *words, last, usage, b"data: [DONE]\n\n"]


@dataclass
class Stub:
    reply: Reply
    port: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    holds: Callable[[], bool] = lambda: False  # while it returns True, no answer begins

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, path, _ = head.split(" ", 2)
        if method == "GET":
            models = b'{"data": [{"id": "stub"}]}'
            pieces = [f"HTTP/1.1 200 OK\r\ncontent-length: {len(models)}\r\nconnection: close\r\n\r\n".encode(), models]
        else:
            length = next(int(line.split(":")[1]) for line in head.lower().split("\r\n") if "content-length" in line)
            self.bodies.append(json.loads(await reader.readexactly(length)))
            self.paths.append(path)
            self.headers.append(head)
            pieces = self.reply(len(self.bodies) - 1, self.bodies[-1])
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        while self.holds():
            await asyncio.sleep(PAUSE_S)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(PAUSE_S)
        self.in_flight -= 1  # before the client can know that it is over
        writer.close()


@contextmanager
def stub_server(reply: Reply) -> Iterator[Stub]:
    """Yield a stub that listens, in a thread."""
    stub, loop = Stub(reply), asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(stub.answer, "127.0.0.1", 0))
    stub.port = server.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield stub
    finally:
        loop.call_soon_threadsafe(loop.stop)
        join(thread)
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
