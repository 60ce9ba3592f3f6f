"""The process of an API server: HTTP, validation, tokenization and streams, without a model.

It reads an ApiServerStart from stdin and answers there with None, or with a user's mistake. Then it takes connections
and messages from two sockets that it has inherited. It ends after Shutdown, or when the engine's process ends.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from types import FrameType

import msgspec
import uvicorn

from ...runtime.limits import Limits
from ...runtime.sampling_params import SamplingParams
from ...runtime.tokenizer import Tokenizer
from ..engine.async_tokenizer import AsyncTokenizer
from ..open_files import raise_file_limit
from ..options import start_logging
from ..signals import ENDING
from ..standard_streams import protect_standard_streams
from .message_link import MessageLink
from .remote_client import RemoteEngineClient
from .server_config import ServerConfig, ServerLimits
from .uvicorn_setup import create_uvicorn_config, run_loop

MOST_AT_ONCE = 64  # connections taken in one turn of the loop


class ApiServerStart(msgspec.Struct, frozen=True):
    """What the process needs to start; `link` and `connections` are descriptors that it inherits."""

    link: int
    connections: int
    folder: str  # of the checkpoint
    chat_template: str | None
    name: str
    started_at: int
    limits: Limits
    default_params: SamplingParams
    options: ServerConfig
    server_limits: ServerLimits
    log_level: str


def main() -> None:
    """Serve until Shutdown; exits with status 1 after a mistake of the user's."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print goes to the log
    sys.modules["torch"] = None  # type: ignore[assignment]  # transformers' tokenizers do without these 240 MB and 2 s
    for number in ENDING:  # a supervisor may send them to all processes: requests are drained first
        signal.signal(number, signal.SIG_IGN)
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=ApiServerStart)
    protect_standard_streams()
    start_logging(start.log_level)
    raise_file_limit()
    try:
        with closing(AsyncTokenizer(Tokenizer(Path(start.folder), start.chat_template))) as tokenizer:
            tokenizer.start()
            run_loop(_serve(start, tokenizer, answers), is_logged=False)
    except ValueError as error:
        os.write(answers, msgspec.json.encode(str(error)) + b"\n")
        sys.exit(1)


async def _serve(start: ApiServerStart, tokenizer: AsyncTokenizer, answers: int) -> None:
    link = MessageLink(lambda message: client.receive(message), _end_at_once)
    client = RemoteEngineClient(
        start.name, start.started_at, start.limits, start.default_params, tokenizer, link.send,
        lambda: server.end(),
    )  # fmt: skip
    config = create_uvicorn_config(client, start.options, start.server_limits, client.note_closed)
    server = ApiServer(config, socket.socket(fileno=start.connections), client.note_closed)
    await link.connect(socket.socket(fileno=start.link))
    gc.collect()
    gc.freeze()
    os.write(answers, b"null\n")
    await server.serve(sockets=[])


def _end_at_once() -> None:
    os._exit(1)  # without the engine's process nothing can be completed, and other threads may be busy


class ApiServer(uvicorn.Server):
    """uvicorn's server for connections that another process has accepted and passes through a socket.

    on_close  called for a connection that cannot be served; the protocol of `config` does so for others
    """

    def __init__(self, config: uvicorn.Config, connections: socket.socket, on_close: Callable[[], None]) -> None:
        super().__init__(config)
        self._connections, self._on_close = connections, on_close
        self._starting: set[asyncio.Task[None]] = set()  # connections

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to take connections."""
        await super().startup(sockets)
        self._connections.setblocking(False)
        asyncio.get_running_loop().add_reader(self._connections, self._take)

    def end(self) -> None:
        """Take no more connections, complete the answers and return from `serve`."""
        asyncio.get_running_loop().remove_reader(self._connections)
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ignore signals that end a process: the engine's process drains, and sends Shutdown."""

    def _take(self) -> None:
        """Serve the connections that wait in the socket."""
        for _ in range(MOST_AT_ONCE):
            try:
                data, descriptors, _, _ = socket.recv_fds(self._connections, 1, 1)
            except BlockingIOError:
                return
            if not data:
                _end_at_once()
            for descriptor in descriptors:
                task = asyncio.ensure_future(self._start(socket.socket(fileno=descriptor)))
                self._starting.add(task)
                task.add_done_callback(self._starting.discard)

    async def _start(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        new_protocol: Callable[..., asyncio.Protocol] = self.config.http_protocol_class
        protocol = partial(
            new_protocol, config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        try:
            await asyncio.get_running_loop().connect_accepted_socket(protocol, connection)
        except OSError:  # the client is gone
            connection.close()
            self._on_close()
