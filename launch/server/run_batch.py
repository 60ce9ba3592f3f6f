"""`lockstep run-batch`: answer a file of requests through the server's own application, without a port."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator

import httpx
import transformers.models.auto.tokenization_auto  # noqa: F401 - imported here, where the command holds signals back
from tqdm import tqdm

from ...runtime.config import Config
from ..engine.async_engine import AsyncEngine
from ..errors import RankFailed
from ..signals import signals_wait
from .app import create_app
from .batch_file import AnswerFile, BatchFiles, BatchRequest
from .handlers import Handlers
from .local_client import LocalEngineClient
from .server_config import BatchOptions, ChatOptions, ServerConfig, ServerLimits

IN_FLIGHT = 2  # requests sent at once, in batches of the largest size: the next ones are tokenized meanwhile
WAIT_S = 2.0  # after an answer that asks to wait
HEADERS = {"content-type": "application/json"}


def run_batch(config: Config, options: BatchOptions, batch: BatchFiles, chat_template: str | None) -> None:
    """Answer the requests of a batch that have no answer.

    Raises RankFailed if the ranks fail for good: the answers until then are in the output file, and the same command
    continues.
    """
    num_left = len(batch.left)
    if config.scheduling_policy == "fair":  # nobody else waits
        config = dataclasses.replace(config, scheduling_policy="fcfs")
    chat_fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(ChatOptions)}
    server_config = ServerConfig(**chat_fields, max_concurrent_requests=num_left, max_queued=num_left * 128)
    engine = AsyncEngine(config, max_restarts=server_config.max_restarts, chat_template=chat_template)
    try:
        engine.start()
        engine.tokenizer.start()
        asyncio.run(_answer_all(engine, server_config, batch))
    finally:
        with signals_wait():
            asyncio.run(engine.close())


async def _answer_all(engine: AsyncEngine, config: ServerConfig, batch: BatchFiles) -> None:
    limits, left, total = ServerLimits(), batch.left, len(batch.requests)
    client_of_engine = LocalEngineClient(engine, config, limits)
    app, iterator = create_app(Handlers(client_of_engine, config, limits), config), iter(left)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    num_senders = min(len(left), IN_FLIGHT * engine.limits.max_num_seqs)
    with tqdm(total=total, initial=total - len(left), unit=" requests", desc="batch") as progress:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=None) as client:
            senders = [
                asyncio.ensure_future(_send_some(client, engine, iterator, batch.answers, progress))
                for _ in range(num_senders)
            ]
            try:
                await asyncio.gather(*senders)
            finally:
                for sender in senders:
                    sender.cancel()
                await asyncio.gather(*senders, return_exceptions=True)


async def _send_some(
    client: httpx.AsyncClient,
    engine: AsyncEngine,
    requests: Iterator[BatchRequest],
    answers: AnswerFile,
    progress: tqdm[None],
) -> None:
    """Send requests, one after the other, until there are none left."""
    for request in requests:
        response = await client.post(request.url, content=bytes(request.body), headers=HEADERS)
        while response.status_code in (429, 503):
            if engine.health.state == "failed":
                raise RankFailed(f"{engine.health.reason}; the same command continues this batch")
            await asyncio.sleep(WAIT_S)
            response = await client.post(request.url, content=bytes(request.body), headers=HEADERS)
        answers.append(request, response.status_code, response.content)
        progress.update()
