"""The event loop of a process that answers HTTP requests, and uvicorn's configuration with the application."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from importlib import metadata
from typing import Any, TypeVar, cast

import uvicorn

from ..standard_streams import Throttle
from .app import create_app
from .engine_client import EngineClient
from .handlers import Handlers
from .http_protocol import TimeoutHTTPProtocol
from .server_config import ServerConfig, ServerLimits

log = logging.getLogger(__name__)
Result = TypeVar("Result")
STRANGERS = ("uvicorn.error", "asyncio")  # loggers of messages that clients cause
SHUTDOWN_S = 2  # after the engine stops, complete answers have this time to be sent


def run_loop(main: Coroutine[Any, Any, Result], *, is_logged: bool = True) -> Result:
    """Run a coroutine like asyncio.run, on uvloop's event loop where that is installed."""
    try:
        import uvloop
    except ImportError:
        if is_logged:
            log.warning("event loop: asyncio; pip install uvloop for a faster one")
        return asyncio.run(main)
    if is_logged:
        log.info("event loop: uvloop %s", metadata.version("uvloop"))
    return uvloop.run(main)


def create_uvicorn_config(
    client: EngineClient, options: ServerConfig, limits: ServerLimits, on_close: Callable[[], None] | None = None
) -> uvicorn.Config:
    """Return uvicorn's configuration with the application; `on_close` is called when a connection has ended."""
    for name in STRANGERS:
        logging.getLogger(name).addFilter(Throttle())
    handlers = Handlers(client, options, limits)
    protocol = cast("type[asyncio.Protocol]", partial(TimeoutHTTPProtocol, limits=limits, on_close=on_close))
    return uvicorn.Config(
        create_app(handlers, options), http=protocol, ws="none", lifespan="off", log_config=None,
        access_log=False, server_header=False, callback_notify=client.tick, timeout_notify=1,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )  # fmt: skip
