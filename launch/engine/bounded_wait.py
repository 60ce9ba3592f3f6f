"""A wait for the result of a thread, with a time limit."""

from __future__ import annotations

import asyncio
from typing import TypeVar

Result = TypeVar("Result")


async def result_within(timeout_s: float, future: asyncio.Future[Result], late: Exception) -> Result:
    """Return the result of a future, or raise `late` after `timeout_s`; cancels a future that has not ended.

    Not wait_for: before Python 3.12 it loses a cancellation that comes together with the result.
    """
    try:
        done, _ = await asyncio.wait((future,), timeout=timeout_s)
    finally:
        future.cancel()
    if not done:
        raise late
    return future.result()
