"""`lockstep serve`: bind the port, start the engine, serve until a signal, drain, and stop.

Whenever a signal comes, the ranks are stopped and nothing is left behind.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import sys
from contextlib import closing, nullcontext

import transformers.models.auto.tokenization_auto  # noqa: F401 - imported here, where the command holds signals back

from ...runtime.config import Config
from ..doctor.preflight import Preflight
from ..engine.async_engine import AsyncEngine
from ..errors import EngineFailed
from ..signals import signals_wait
from .api_server_pool import ApiServerPool
from .dispatching_server import DispatchingServer
from .draining_server import DrainingServer
from .http_protocol import raise_file_limit
from .local_client import LocalEngineClient
from .server_config import ServerConfig, ServerLimits, read_template
from .uvicorn_setup import create_uvicorn_config, run_loop

log = logging.getLogger(__name__)


def serve(config: Config, options: ServerConfig, preflight: Preflight | None) -> None:
    """Serve until a signal: the first one drains, the second one stops at once with status 128 + its number.

    Raises EngineFailed when the engine has failed for good, unless options.keep_alive_on_engine_death is set.
    """
    raise_file_limit()
    chat_template = read_template(options.chat_template)
    with bind(options) as listener:  # before the model is loaded: a port in use is reported at once
        if preflight is not None:
            preflight.verify()
            preflight.close()  # it has ended, and is waited for
        engine = AsyncEngine(
            config, max_restarts=options.max_restarts, replicas=options.replicas, max_queued=options.max_queued,
            chat_template=chat_template,
        )  # fmt: skip
        count = options.api_server_count
        try:
            # They import their modules while the model is loaded.
            with nullcontext() if count == 1 else closing(ApiServerPool(count, options)) as pool:
                engine.start()
                gc.collect()
                gc.freeze()  # imports leave so many objects that a full collection would stop all streams for 50 ms
                signal_number = run_loop(serve_until_signal(engine, options, listener, pool))
        finally:
            with signals_wait():
                asyncio.run(engine.close())
    if signal_number is not None:
        sys.exit(128 + signal_number)


def bind(options: ServerConfig) -> socket.socket:
    """Return a socket bound to the server's address; raises ValueError with a message of one line."""
    try:
        family, _, _, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sets NODELAY for TCP only
    except OSError as error:
        raise ValueError(f"host={options.host!r} is not an address to listen on: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ValueError(f"cannot listen on {options.host} port {options.port}: {error.strerror}") from error
    return listener


async def serve_until_signal(
    engine: AsyncEngine, options: ServerConfig, listener: socket.socket, pool: ApiServerPool | None = None
) -> int | None:
    """Serve until the engine has drained; returns the number of a second signal that ended the draining early.

    The processes of `pool` answer; without them this process does.
    """
    if not options.api_key and listener.getsockname()[0] not in ("127.0.0.1", "::1"):
        log.warning("every client that reaches %s can use this server: there is no --api-key", options.host)
    if pool is not None:
        server: DrainingServer = DispatchingServer(engine, options, pool)
    else:
        engine.tokenizer.start()
        limits = ServerLimits()
        client = LocalEngineClient(engine, options, limits)
        server = DrainingServer(create_uvicorn_config(client, options, limits), engine, options)
    await server.serve(sockets=[listener])
    if server.failure:
        raise EngineFailed(server.failure)
    return server.forced_by
