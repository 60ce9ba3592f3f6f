"""AsyncTokenizer over the demo model's tokenizer: results, refusals, the time limit."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest

from lockstep.launch.engine.async_tokenizer import AsyncTokenizer, TokenizationRefused
from lockstep.runtime.config import DEMO_MODEL
from lockstep.runtime.tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "Who was Moses?"}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(Path(DEMO_MODEL))


def test_results_equal_the_synchronous_tokenizer(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        tokenizing = AsyncTokenizer(tokenizer)
        ids = tokenizer.encode("In the beginning")
        assert await tokenizing.encode(["In the beginning", "Blessed"]) == [ids, tokenizer.encode("Blessed")]
        assert await tokenizing.encode_chat(CHAT) == tokenizer.encode_chat(CHAT)
        assert await tokenizing.decode(ids, skip_special_tokens=True) == "In the beginning"
        assert await tokenizing.decode(ids, skip_special_tokens=False) == "<|bos|>In the beginning"
        assert "".join(await tokenizing.decode_each(ids)) == "<|bos|>In the beginning"

    asyncio.run(main())


def test_conversation_rejected_by_the_template_names_the_field(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        with pytest.raises(TokenizationRefused, match="the chat template does not accept these messages") as caught:
            await AsyncTokenizer(tokenizer).encode_chat([{"role": "user"}])
        assert (caught.value.param, caught.value.timed_out) == ("messages", False)

    asyncio.run(main())


def test_time_limit_is_kept_while_other_calls_proceed(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    release, encode = threading.Event(), tokenizer.encode

    def slow(text: str) -> list[int]:
        if text == "slow":
            release.wait(10)
        return encode(text)

    async def main() -> None:
        tokenizing = AsyncTokenizer(tokenizer, time_limit_s=0.3)
        monkeypatch.setattr(tokenizer, "encode", slow)
        started = time.monotonic()
        waiting = asyncio.create_task(tokenizing.encode(["slow"]))
        await asyncio.sleep(0)
        assert await tokenizing.encode(["Blessed"]) == [encode("Blessed")]
        with pytest.raises(TokenizationRefused, match="prompt took more than 0 s to turn into tokens") as caught:
            await waiting
        assert (caught.value.param, caught.value.timed_out) == ("prompt", True)
        assert time.monotonic() - started < 5
        release.set()

    asyncio.run(main())
