"""Merging async generators: all items, failures, early ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from lockstep.launch.engine.event_streams import merge


class Stream:
    """Counts to `number`; whether it was closed."""

    def __init__(self, number: int, error: Exception | None = None) -> None:
        self.number, self.error, self.closed = number, error, False

    async def items(self) -> AsyncGenerator[int, None]:
        try:
            for item in range(self.number):
                await asyncio.sleep(0)
                yield item
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True


@pytest.mark.parametrize("numbers", [[3], [3, 0, 5], [1] * 20], ids=str)
def test_merged_items_keep_the_order_of_each_stream(numbers: list[int]) -> None:
    async def main() -> None:
        merged = [entry async for entry in merge([Stream(number).items() for number in numbers], asyncio.Lock())]
        for index, number in enumerate(numbers):
            assert [item for stream, item in merged if stream == index] == list(range(number))

    asyncio.run(main())


@pytest.mark.parametrize("count", [1, 3])
def test_failure_of_one_stream_is_raised_and_closes_all(count: int) -> None:
    async def main() -> None:
        streams = [Stream(2, KeyError("broken")), *(Stream(10**9) for _ in range(count - 1))]
        with pytest.raises(KeyError, match="broken"):
            async for _ in merge([stream.items() for stream in streams], asyncio.Lock()):
                pass
        assert all(stream.closed for stream in streams)

    asyncio.run(main())


@pytest.mark.parametrize("count", [1, 3])
def test_merged_generator_closed_early_closes_all(count: int) -> None:
    async def main() -> None:
        streams = [Stream(10**9) for _ in range(count)]
        async with aclosing(merge([stream.items() for stream in streams], asyncio.Lock())) as merged:
            for _ in range(2 * count):
                await anext(merged)
        assert all(stream.closed for stream in streams)

    asyncio.run(main())
