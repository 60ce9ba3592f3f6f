"""AsyncTokenizer over the demo model's tokenizer: results, refusals, and lanes that do not delay each other."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep.launch.engine import async_tokenizer
from lockstep.launch.engine.async_tokenizer import SHORT_CHARS, AsyncTokenizer, TokenizationRefused
from lockstep.launch.errors import TokenizerBusy
from lockstep.runtime.config import DEMO_MODEL
from lockstep.runtime.tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "Who was Moses?"}]
LONG = "In the beginning " * (SHORT_CHARS // 10)
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(Path(DEMO_MODEL))


@pytest.fixture(scope="module")
def tokenizing(tokenizer: Tokenizer) -> Iterator[AsyncTokenizer]:
    shared = AsyncTokenizer(tokenizer)
    yield shared
    shared.close()


def test_results_equal_the_synchronous_tokenizer(tokenizer: Tokenizer, tokenizing: AsyncTokenizer) -> None:
    async def main() -> None:
        ids = tokenizer.encode("In the beginning")
        assert await tokenizing.encode(["In the beginning", "Blessed"]) == [ids, tokenizer.encode("Blessed")]
        assert await tokenizing.encode_chat(CHAT) == tokenizer.encode_chat(CHAT)
        variables = {"add_generation_prompt": False}
        assert await tokenizing.encode_chat(CHAT, variables) == tokenizer.encode_chat(CHAT, variables)
        assert await tokenizing.decode(ids, skip_special_tokens=True) == "In the beginning"
        assert await tokenizing.decode(ids, skip_special_tokens=False) == "<|bos|>In the beginning"
        assert "".join(await tokenizing.names(ids)).replace("Ġ", " ") == "<|bos|>In the beginning"

    asyncio.run(main())


def test_long_input_gives_the_same_in_the_other_process(tokenizer: Tokenizer, tokenizing: AsyncTokenizer) -> None:
    async def main() -> None:
        ids = tokenizer.encode(LONG)
        assert await tokenizing.encode([LONG, "Blessed"]) == [ids, tokenizer.encode("Blessed")]
        assert await tokenizing.decode(ids, skip_special_tokens=True) == LONG
        assert "".join(await tokenizing.names(ids)).replace("Ġ", " ") == "<|bos|>" + LONG
        chat = [{"role": "user", "content": LONG * 3}]
        assert await tokenizing.encode_chat(chat) == tokenizer.encode_chat(chat)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[0].nothing.at_all }}", "'dict object' has no attribute 'nothing'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 10.0 ** 1000 }}", "out of range"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{{ 'a' * 10 ** 10 }}", "MemoryError"),
        ("{% for %}", "Expected an expression"),
    ],
)
def test_template_that_fails_in_any_way_names_the_field(tokenizing: AsyncTokenizer, template: str, reason: str) -> None:
    async def main() -> None:
        with pytest.raises(TokenizationRefused, match="the chat template does not accept these messages") as caught:
            await tokenizing.encode_chat(CHAT, {"chat_template": template})
        assert reason in str(caught.value)
        assert (caught.value.param, caught.value.code) == ("messages", "invalid_value")

    asyncio.run(main())


def test_endless_template_ends_in_time_while_other_texts_proceed(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        tokenizing = AsyncTokenizer(tokenizer, time_limit_s=2)
        try:
            await tokenizing.encode_chat(CHAT)
            started = time.monotonic()
            waiting = asyncio.create_task(tokenizing.encode_chat(CHAT, {"chat_template": ENDLESS}))
            await asyncio.sleep(0.05)
            assert await tokenizing.encode(["Blessed"]) == [tokenizer.encode("Blessed")]
            assert await tokenizing.encode([LONG]) == [tokenizer.encode(LONG)]
            with pytest.raises(TokenizationRefused, match=r"the input took more than 2 s to turn into") as caught:
                await waiting
            assert (caught.value.param, caught.value.code) == ("messages", "too_complex")
            assert time.monotonic() - started < 30
            assert await tokenizing.encode_chat(CHAT) == tokenizer.encode_chat(CHAT), "in another process"
        finally:
            tokenizing.close()

    asyncio.run(main())


def test_long_texts_in_flight_are_limited(tokenizing: AsyncTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_tokenizer, "MAX_WAITING_BYTES", 2 * len(LONG))

    async def main() -> None:
        results = await asyncio.gather(*(tokenizing.encode([LONG]) for _ in range(4)), return_exceptions=True)
        refused = [result for result in results if isinstance(result, TokenizerBusy)]
        assert len(refused) == 3, "the JSON is longer than the text"
        assert "bytes of long texts; try again later" in str(refused[0])
        assert len(await tokenizing.encode([LONG * 3])) == 1, "alone, a text of any length has its turn"

    asyncio.run(main())


def test_short_text_that_waits_too_long_is_not_at_fault(
    tokenizer: Tokenizer, tokenizing: AsyncTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, encode = threading.Event(), tokenizer.encode
    monkeypatch.setattr(async_tokenizer, "WAIT_S", 0.1)
    monkeypatch.setattr(tokenizer, "encode", lambda text, **options: (release.wait(60), encode(text, **options))[1])

    async def main() -> None:
        with pytest.raises(TokenizerBusy, match=r"waited 0\.1 s for its tokens; try again later"):
            await tokenizing.encode(["Blessed"])
        release.set()
        assert await tokenizing.encode(["Blessed"]) == [encode("Blessed")]

    asyncio.run(main())
