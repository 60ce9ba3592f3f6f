"""An address that gets many errors waits for further ones; others, and answers that are no errors, do not wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from lockstep.launch.server.refusal_pacing import LONGEST_S, MAX_WAITING, REFUSALS_PER_S, RefusalPacing

from fake_engine import COMPLETION, Running, fake


@pytest.fixture(autouse=True)
def refusals_per_s() -> int:
    """The rate of the server, in place of that of other tests."""
    return REFUSALS_PER_S


async def no_app(*args: Any) -> None:
    raise AssertionError


def test_refusals_of_one_address_come_at_the_rate() -> None:
    pacing = RefusalPacing(no_app)
    delays = [pacing.next_delay("a", 100.0) for _ in range(3 * REFUSALS_PER_S)]
    assert max(delays[:REFUSALS_PER_S]) <= 1e-9, "those of the first second come at once"
    assert delays[-1] == pytest.approx(2.0), "300 take two seconds more"
    assert pacing.next_delay("b", 100.0) < 0, "another address does not wait"
    assert pacing.next_delay("a", 200.0) < 0, "later it does not wait, either"


def test_wait_and_memory_have_limits() -> None:
    pacing = RefusalPacing(no_app)
    delays = [pacing.next_delay("a", 100.0) for _ in range(100 * REFUSALS_PER_S)]
    assert max(delays) == pytest.approx(LONGEST_S)
    for i in range(3 * MAX_WAITING):
        pacing.next_delay(str(i), 200.0 + 2 * i)
    assert len(pacing._next_at) <= MAX_WAITING + 1


def test_errors_wait_and_answers_do_not(run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    addresses: list[str] = []

    def next_delay(self: RefusalPacing, address: str, now: float) -> float:
        addresses.append(address)
        return 0.2 if len(addresses) == 5 else 0.0

    monkeypatch.setattr(RefusalPacing, "next_delay", next_delay)
    running = run(allowed_hosts=["localhost"], max_body_bytes=1000, max_queued=0)
    for status, send in (
        (400, lambda: running.post("/v1/completions", COMPLETION | {"n": -1})),
        (403, lambda: running.http.get("/health", headers={"host": "example.com"})),
        (404, lambda: running.http.get("/nothing")),
        (405, lambda: running.http.get("/v1/completions")),
        (413, lambda: running.post("/tokenize", {"prompt": "a" * 1000})),
    ):
        started = time.monotonic()
        assert send().status_code == status
        assert status != 413 or time.monotonic() - started >= 0.2
    fake(running).waiting = 1
    assert running.post("/v1/completions", COMPLETION).status_code == 429
    assert addresses == ["127.0.0.1"] * 6
    fake(running).waiting = 0
    assert running.post("/v1/completions", COMPLETION).status_code == 200
    assert running.http.get("/health").status_code == 200
    assert len(addresses) == 6
