"""A client of OpenAI-compatible servers: the connection, the events of a stream, and the error messages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec

CONNECT_S = 60.0
MAX_REASON = 300  # longest quote of an error that is not in OpenAI's envelope, in characters


class Delta(msgspec.Struct):
    """New text of a chat, or the role of its author."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # the same under vLLM's newer name


class Choice(msgspec.Struct):
    """The new part of one output: `text` in a completion, `delta` in a chat."""

    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None

    @property
    def new_text(self) -> str:
        """The new text, empty if there is none."""
        return self.text or (self.delta.content if self.delta else None) or ""

    @property
    def new_reasoning(self) -> str:
        """The new text of the reasoning, empty if there is none."""
        return (self.delta.reasoning_content or self.delta.reasoning or "") if self.delta else ""

    @property
    def is_role_only(self) -> bool:
        """True for the first event of a chat, which holds the role alone."""
        return self.delta is not None and self.delta.role is not None and not self.new_text + self.new_reasoning


class StreamUsage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Chunk(msgspec.Struct):
    """One event of a stream."""

    choices: list[Choice] = []
    usage: StreamUsage | None = None
    error: Any = None


class ModelEntry(msgspec.Struct):
    id: str


class ModelEntries(msgspec.Struct):
    data: list[ModelEntry]


class EventParser:
    """A parser of server-sent events that takes a body in pieces of any size.

    Lines end at line feeds only. A JSON string may hold characters that `str.splitlines`, and so httpx, splits at.
    """

    def __init__(self) -> None:
        self._rest = b""  # the beginning of a line that has not ended

    def push(self, data: bytes) -> Iterator[Chunk]:
        """Yield the events that `data` completes; raises ValueError for an error or invalid JSON."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            event = line.removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or event == b"[DONE]":
                continue
            chunk = msgspec.json.decode(event, type=Chunk)
            if chunk.error is not None:
                raise ValueError(_reason(event))
            yield chunk


def connection(base_url: str) -> dict[str, Any]:
    """Return the arguments of an httpx client; it sends OPENAI_API_KEY with every request if that is set."""
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
    """Return the first model in a response of /v1/models; raises ValueError."""
    if response.status_code != 200:
        raise refusal(response.status_code, response.content)
    try:
        return msgspec.json.decode(response.content, type=ModelEntries).data[0].id
    except (ValueError, IndexError) as error:
        raise ValueError(f"{response.url} names no model; give one") from error


def refusal(status: int, body: bytes) -> ValueError:
    """Return the exception for an error response; its message is the server's."""
    return ValueError(f"HTTP {status}: {_reason(body)}")


def describe(error: Exception) -> str:
    """Return the error's message, or its type: some errors of httpx have no message."""
    return str(error) or type(error).__name__


def _reason(body: bytes) -> str:
    """Return the message in OpenAI's envelope if there is one, otherwise the beginning of the body."""
    try:
        content = msgspec.json.decode(body)
    except ValueError:
        content = None
    error = content.get("error", content) if isinstance(content, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return str(message) if message else body[:MAX_REASON].decode(errors="replace").strip() or "no reason is given"
