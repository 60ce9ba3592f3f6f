"""`lockstep serve`: start the engine, serve on a port that is bound, until a signal, drain, and stop.

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
from ..open_files import raise_file_limit
from ..signals import signals_wait
from .api_server_pool import ApiServerPool
from .dispatching_server import DispatchingServer
from .draining_server import DrainingServer
from .local_client import LocalEngineClient
from .server_config import ServerConfig, ServerLimits
from .server_socket import allow_reuse
from .uvicorn_setup import create_uvicorn_config, run_loop

log = logging.getLogger(__name__)


def serve(
    config: Config,
    options: ServerConfig,
    listener: socket.socket,
    chat_template: str | None,
    preflight: Preflight | None,
) -> None:
    """Serve until a signal: the first one drains, the second one stops at once with status 128 + its number.

    `listener` is the result of `bind`. Raises EngineFailed when the engine has failed for good, unless
    options.keep_alive_on_engine_death is set.
    """
    raise_file_limit()
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
    allow_reuse(listener)
    await server.serve(sockets=[listener])
    if server.failure:
        raise EngineFailed(server.failure)
    return server.forced_by
