"""The thread that makes long answers, one at a time: on the event loop they would stop all streams meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Part = TypeVar("Part")
THREAD = ThreadPoolExecutor(1, "lockstep-answers")


async def make_long(make: Callable[[], Part]) -> Part:
    """Return what `make` returns, called in the thread."""
    return await asyncio.get_running_loop().run_in_executor(THREAD, make)
