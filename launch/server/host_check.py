"""The Host headers and the origins that the server accepts: pages of other sites must not reach it through a browser.

A site may let its name resolve to 127.0.0.1 (DNS rebinding). The browser then takes this server for the site's own.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from .api_errors import MAX_QUOTE, ApiError, shorten
from .server_config import ServerConfig

HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^\[\]:/@\s]+)(:[0-9]*)?")
PREFLIGHT_S = 600  # browsers remember the answer to a preflight for this long


def check_origin(app: ASGIApp, config: ServerConfig) -> ASGIApp:
    """Return `app` behind the checks that the configuration asks for; preflights are answered without a key."""
    if config.cors_origins:
        app = CORSMiddleware(
            app, allow_origins=config.cors_origins, allow_methods=("GET", "HEAD", "POST"), allow_headers=("*",),
            max_age=PREFLIGHT_S,
        )  # fmt: skip
    if config.allowed_hosts or is_loopback(config.host):
        app = HostCheck(app, config.allowed_hosts or [])
    return app


class HostCheck:
    """Answers requests for a loopback host or one of `allowed` (names without port), and others with 403.

    A request without a Host header passes: browsers always send one.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self._app, self._allowed = app, {name.lower().rstrip(".") for name in allowed}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), None)
        if host is None or self._accepts(host):
            await self._app(scope, receive, send)
        else:
            message = f"this server is not reached as {shorten(host, MAX_QUOTE)!r}; --allowed-hosts adds a name to it"
            await ApiError(403, message, code="host_not_allowed").response()(scope, receive, send)

    def _accepts(self, host: str) -> bool:
        match = HOST.fullmatch(host.strip().lower())
        name = match["name"].strip("[]").rstrip(".") if match else ""
        return bool(name) and ("*" in self._allowed or name in self._allowed or is_loopback(name))


def is_loopback(host: str) -> bool:
    """Return whether a name or address always means this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
