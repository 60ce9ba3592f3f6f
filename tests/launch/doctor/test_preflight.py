"""The checks before a start: what refuses it, what is only said, and that nothing of them is left."""

from __future__ import annotations

import logging
import os
import subprocess
from contextlib import closing
from typing import Any

import pytest

from lockstep.launch.doctor import preflight
from lockstep.launch.doctor.preflight import Preflight
from lockstep.runtime.config import Config

from small import COMMAND
from waiting import wait_until

FINDINGS: list[dict[str, str]] = [
    {"name": "devices", "status": "fail", "finding": "2 ranks do not fit", "remedy": "add nodes"},
    {"name": "memory", "status": "fail", "finding": "no checkpoint", "remedy": ""},
    {"name": "tokenizer", "status": "fail", "finding": "no checkpoint", "remedy": ""},
    {"name": "neighbours", "status": "warn", "finding": "GPU 0: pid 7", "remedy": "end it"},
    {"name": "interface", "status": "ok", "finding": "lo", "remedy": ""},
]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """What the checks find, in place of what they do."""
    findings = list(FINDINGS)
    monkeypatch.setattr(Preflight, "_findings", lambda self: findings)
    return findings


def judge(**options: Any) -> None:
    with closing(Preflight(Config(**options))) as checks:
        checks.judge()


def test_all_that_fails_is_said_at_once(found: list[dict[str, str]], caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"^the start would fail \(--no-preflight ") as caught:
        judge()
    assert str(caught.value).splitlines()[1:] == [
        "  devices: 2 ranks do not fit; add nodes",
        "  memory, tokenizer: no checkpoint",
    ]
    assert [record.getMessage() for record in caplog.records] == ["neighbours: GPU 0: pid 7; end it"]


def test_devices_of_nodes_that_may_join_are_not_missed(found: list[dict[str, str]]) -> None:
    with pytest.raises(ValueError, match="memory, tokenizer: no checkpoint") as caught:
        judge(wait_for_resources=5)
    assert "devices" not in str(caught.value)
    found[:] = [FINDINGS[0], FINDINGS[4]]
    judge(wait_for_resources=5)


def test_the_checks_are_the_doctors(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        judge(num_pages=256)
    assert not caplog.records
    with pytest.raises(ValueError, match=r"\n  tensor parallel, memory: 4 attention heads, .* over 3 ranks; use "):
        judge(tensor_parallel_size=3)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import time; time.sleep(60)", "have not ended within 1 s; lockstep doctor shows"),
        ("1 / 0", "ZeroDivisionError"),
    ],
    ids=["hangs", "breaks"],
)
def test_checks_that_do_not_end_are_no_reason_to_wait(
    monkeypatch: pytest.MonkeyPatch, program: str, message: str
) -> None:
    monkeypatch.setattr(preflight, "PROGRAM", program)
    monkeypatch.setattr(preflight, "DEADLINE_S", 1.0)
    with pytest.raises(ValueError, match=message):
        judge()


def test_closing_ends_all_that_the_checks_have_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "PROGRAM", "import subprocess; subprocess.run(['sleep', '600'])")
    checks = Preflight(Config())
    group = checks._process.pid
    wait_until(lambda: len(members(group)) == 2)
    checks.close()
    wait_until(lambda: not members(group))


def members(group: int) -> list[str]:
    found = subprocess.run(["ps", "-o", "pid=,stat=", "--no-headers", "-s", str(group)], capture_output=True, text=True)
    return [line for line in found.stdout.splitlines() if "Z" not in line]


@pytest.mark.process
def test_the_server_does_not_start_where_the_checks_fail() -> None:
    command = [*COMMAND, "serve", "--tp=3", "--port=0"]
    for flags, text in (([], "error: the start would fail"), (["--no-preflight"], "error: 4 attention heads")):
        ended = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=60, env=dict(os.environ))
        assert ended.returncode == 2
        assert text in ended.stderr
