"""The client of an HTTP request, for fair scheduling: its API key, `user` or address."""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

from starlette.requests import Request

from ...runtime.request import Origin
from .server_config import ServerConfig


class ClientRecognition:
    """Recognizes clients by their API key if there are several keys, else by `user`, else by address."""

    def __init__(self, config: ServerConfig) -> None:
        self._has_several_keys = len(config.api_key or []) > 1

    def origin(self, request: Request, body: Any) -> Origin:
        """Return the origin of a request with a checked body; two requests of a client differ in the call."""
        address = request.client.host if request.client else ""
        if self._has_several_keys:
            name = f"key {request.state.key_index}"
        elif user := _user(body):
            name = f"user {user}"
        else:
            name = f"address {address}"
        # Equal in all processes of a server, unlike hash().
        digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()
        client, call = int.from_bytes(digest, "big", signed=True), secrets.randbits(63)
        return Origin(client, call, getattr(body, "priority", None) or 0)


def _user(body: Any) -> str | None:
    """Return the end user that the fields of OpenAI's or Anthropic's API name."""
    metadata = getattr(body, "metadata", None) or {}
    user: str | None = getattr(body, "user", None) or getattr(body, "safety_identifier", None)
    return user or metadata.get("user_id")
