"""An API server without its process: its client of the engine, linked to the engine's side in the same event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from lockstep.launch.engine.async_engine import AsyncEngine
from lockstep.launch.server.engine_gateway import EngineGateway
from lockstep.launch.server.local_client import LocalEngineClient
from lockstep.launch.server.remote_client import RemoteEngineClient
from lockstep.launch.server.request_metrics import RequestMetrics
from lockstep.launch.server.server_config import ServerConfig, ServerLimits


class LinkedClient(RemoteEngineClient):
    """A RemoteEngineClient whose messages take one turn of the event loop; `gateway` is the engine's side."""

    def __init__(self, local: LocalEngineClient) -> None:
        engine = local.engine
        super().__init__(
            engine.name, local.started_at, engine.limits, engine.default_params, engine.tokenizer,
            lambda message: asyncio.get_running_loop().call_soon(self.gateway.receive, message), lambda: None,
        )  # fmt: skip
        self.gateway = EngineGateway(local, self._gathered_metrics, self._deliver)

    def _deliver(self, message: bytes) -> None:
        asyncio.get_running_loop().call_soon(self.receive, message)

    async def _gathered_metrics(self) -> RequestMetrics:
        await self.gateway.refresh_metrics()
        return self.gateway.metrics


def linked_clients() -> Callable[[AsyncEngine, ServerConfig, ServerLimits], LinkedClient]:
    """Return what makes clients that share one LocalEngineClient, with the limits of the first one."""
    shared: list[LocalEngineClient] = []

    def new_client(engine: AsyncEngine, config: ServerConfig, limits: ServerLimits) -> LinkedClient:
        if not shared:
            shared.append(LocalEngineClient(engine, config, limits))
        return LinkedClient(shared[0])

    return new_client
