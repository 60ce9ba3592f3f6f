"""Prompts with a salt share cached prefixes with prompts that have the same salt, and with no others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from lockstep import LLM, SamplingParams
from lockstep.runtime.engine import Engine
from lockstep.runtime.request import RequestRefused
from lockstep.runtime.scheduler.prefix_cache import PagePool

from engines import request, run_engine

PROMPT = list(range(3, 43))  # 10 pages of 4 tokens; the last token is always computed
SALTS = [None, "a", "b", "a", None, "b", "c", "a"]


@pytest.mark.parametrize("num_pages", [512, 40])
@pytest.mark.parametrize("tp", [1, 2])
def test_prefixes_are_shared_under_one_salt_only(llama_folder: Path, tp: int, num_pages: int) -> None:
    requests = [replace(request(i, PROMPT, max_tokens=2), cache_salt=salt) for i, salt in enumerate(SALTS)]

    def one_at_a_time(step: int, engine: Engine) -> None:
        if not engine.has_work and step // 2 < len(requests):
            engine.add([requests[step // 2]])

    actual = run_engine(llama_folder, requests[:1], tp=tp, between=one_at_a_time, num_pages=num_pages)
    assert len({tuple(tokens) for tokens in actual.tokens.values()}) == 1
    hits = [actual.cached[i] for i in range(len(SALTS))]
    if num_pages == 512:
        assert hits == [36 if salt in SALTS[:i] else 0 for i, salt in enumerate(SALTS)]
    else:  # the least recently used salts are evicted
        assert all(hit == 0 for i, hit in enumerate(hits) if SALTS[i] not in SALTS[:i])
        assert any(hits)


def test_request_for_prompt_logprobs_leaves_its_pages_under_its_salt(llama_folder: Path) -> None:
    requests = [
        replace(request(0, PROMPT, max_tokens=2, prompt_logprobs=1), cache_salt="a"),
        request(1, PROMPT, max_tokens=2),
        replace(request(2, PROMPT, max_tokens=2), cache_salt="a"),
    ]

    def one_at_a_time(step: int, engine: Engine) -> None:
        if not engine.has_work and step // 2 < len(requests):
            engine.add([requests[step // 2]])

    actual = run_engine(llama_folder, requests[:1], between=one_at_a_time)
    assert [actual.cached[i] for i in range(3)] == [0, 0, 36]


def test_unused_salts_are_forgotten() -> None:
    pool = PagePool(8, 4)
    kept = pool.tree.root_of("kept")
    pool.tree.insert(np.arange(4, dtype=np.int32), pool.allocate(1), kept)
    locked = pool.tree.root_of("locked")
    pool.tree.lock(locked)
    for number in range(10_000):
        pool.tree.root_of(f"salt {number}")
    assert len(pool.tree._salted) <= 70
    assert pool.tree.root_of("kept") is kept
    assert pool.tree.root_of("locked") is locked
    pool.tree.evict(1)
    for number in range(10_000):
        pool.tree.root_of(f"again {number}")
    assert pool.tree.root_of("kept") is not kept


def test_salt_of_an_offline_prompt() -> None:
    params = SamplingParams(temperature=0, max_tokens=2)
    with LLM(device="cpu", num_pages=64, max_num_seqs=4) as llm:
        text = "And the LORD said unto Moses, " * 4
        plain = llm.generate(text, params, use_tqdm=False)[0]
        ids = plain.prompt_token_ids
        hits = [
            llm.generate(prompt, params, use_tqdm=False)[0].num_cached_tokens
            for prompt in (
                {"prompt": text, "cache_salt": "a"},
                {"prompt_token_ids": ids, "cache_salt": "a"},
                [{"prompt_token_ids": ids, "cache_salt": "b"}],
                {"prompt": text},
            )
        ]
        assert [hit > 0 for hit in hits] == [False, True, False, True]
        for wrong in ({"text": text}, {"prompt": text, "prompt_token_ids": ids}, {"prompt": text, "multi": 1}):
            with pytest.raises(RequestRefused, match=r"a prompt with the fields 'text'|'prompt', '"):
                llm.generate(wrong, params)  # type: ignore[arg-type]
        with pytest.raises(RequestRefused, match="cache_salt='' must be a text that is not empty"):
            llm.generate({"prompt": text, "cache_salt": ""}, params)
