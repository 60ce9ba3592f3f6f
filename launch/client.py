"""The client's side of an OpenAI-compatible server: how to reach it, the events of its streams, what it refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec

CONNECT_S = 60.0
LONGEST_REASON = 300  # characters of an error that is not OpenAI's


class ServerRefused(ValueError):
    """The server's answer is an error; the message is its own."""


class Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None


class Choice(msgspec.Struct):
    """New text of an output: `text` of a completion, `delta` of a chat."""

    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None

    @property
    def new_text(self) -> str:
        return self.text or (self.delta.content if self.delta else None) or ""

    @property
    def opens(self) -> bool:
        """It only says who speaks."""
        return self.delta is not None and self.delta.role is not None and not self.new_text


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Chunk(msgspec.Struct):
    """One event of a stream."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


class Model(msgspec.Struct):
    id: str


class Models(msgspec.Struct):
    data: list[Model]


class Events:
    """The server-sent events of a body that comes in pieces, however they are cut.

    Lines are cut at line feeds only: JSON strings may hold what `str.splitlines`, and so httpx, takes for a line's end.
    """

    def __init__(self) -> None:
        self._rest = b""

    def push(self, piece: bytes) -> Iterator[Chunk]:
        """Events that this piece completes; raises ServerRefused for an error, ValueError for what is no event."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or data == b"[DONE]":
                continue
            chunk = msgspec.json.decode(data, type=Chunk)
            if chunk.error is not None:
                raise ServerRefused(_reason(data))
            yield chunk


def connection(base_url: str) -> dict[str, Any]:
    """How an httpx client reaches the server; OPENAI_API_KEY goes with every request if it is set."""
    key = os.environ.get("OPENAI_API_KEY")
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise ValueError(f"{base_url} is not a URL: {error}; give one like http://127.0.0.1:8000") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"{base_url} is not the URL of a server; give one like http://127.0.0.1:8000")
    return {
        "base_url": url,
        "headers": {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {}),
        "timeout": httpx.Timeout(None, connect=CONNECT_S),  # a queue may be long
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=None),
    }


def first_model(response: httpx.Response) -> str:
    """The model that an answer of /v1/models names first; raises ServerRefused."""
    if response.status_code != 200:
        raise refusal(response.status_code, response.content)
    try:
        return msgspec.json.decode(response.content, type=Models).data[0].id
    except (ValueError, IndexError) as error:
        raise ServerRefused(f"{response.url} names no model; give one") from error


def refusal(status: int, body: bytes) -> ServerRefused:
    """The error that an answer is."""
    return ServerRefused(f"HTTP {status}: {_reason(body)}")


def describe(error: Exception) -> str:
    """In one line; some errors of httpx have no text."""
    return str(error) or type(error).__name__


def _reason(body: bytes) -> str:
    """OpenAI's message if there is one, otherwise the beginning of the body."""
    try:
        found = msgspec.json.decode(body)
    except ValueError:
        found = None
    error = found.get("error", found) if isinstance(found, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return str(message) if message else body[:LONGEST_REASON].decode(errors="replace").strip() or "no reason is given"
