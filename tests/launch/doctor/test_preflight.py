"""The checks before a start: failures refuse it, warnings are logged, and no process is left."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lockstep.launch.doctor import preflight
from lockstep.launch.doctor.preflight import Preflight
from lockstep.runtime.config import DEMO_MODEL, Config

from small import COMMAND

FINDINGS: list[dict[str, str]] = [
    {"name": "devices", "status": "fail", "finding": "2 ranks do not fit", "remedy": "add nodes"},
    {"name": "memory", "status": "fail", "finding": "no checkpoint", "remedy": ""},
    {"name": "tokenizer", "status": "fail", "finding": "no checkpoint", "remedy": ""},
    {"name": "other processes", "status": "warn", "finding": "GPU 0: pid 7", "remedy": "end it"},
    {"name": "interface", "status": "ok", "finding": "lo", "remedy": ""},
]


@pytest.fixture
def findings(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Findings in place of those of the checks."""
    replaced = list(FINDINGS)
    monkeypatch.setattr(Preflight, "_findings", lambda self: replaced)
    return replaced


def verify(**options: Any) -> None:
    with closing(Preflight(Config(**options))) as checks:
        checks.verify()


def test_all_failures_are_reported_at_once(findings: list[dict[str, str]], caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"^the start would fail \(--no-preflight ") as caught:
        verify()
    assert str(caught.value).splitlines()[1:] == [
        "  devices: 2 ranks do not fit; add nodes",
        "  memory, tokenizer: no checkpoint",
    ]
    assert [record.getMessage() for record in caplog.records] == ["other processes: GPU 0: pid 7; end it"]


def test_missing_devices_are_no_failure_if_nodes_may_join(findings: list[dict[str, str]]) -> None:
    with pytest.raises(ValueError, match="memory, tokenizer: no checkpoint") as caught:
        verify(wait_for_resources=5)
    assert "devices" not in str(caught.value)
    findings[:] = [FINDINGS[0], FINDINGS[4]]
    verify(wait_for_resources=5)


def test_checks_are_those_of_the_doctor(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        verify(num_pages=256)
    assert not caplog.records
    with pytest.raises(ValueError, match=r"^.*: tensor parallel, memory: 4 attention heads .* over 5 ranks; use "):
        verify(tensor_parallel_size=5)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import time; time.sleep(60)", "have not ended within 0 s; lockstep doctor shows"),
        ("1 / 0", "ZeroDivisionError"),
    ],
    ids=["hangs", "breaks"],
)
def test_checks_that_hang_or_break_end_the_wait(monkeypatch: pytest.MonkeyPatch, program: str, message: str) -> None:
    monkeypatch.setattr(preflight, "calling", lambda _: ["-c", program])
    monkeypatch.setattr(preflight, "DEADLINE_S", 60.0 if "sleep" not in program else 0.3)
    with pytest.raises(ValueError, match=message):
        verify()


@pytest.mark.process
def test_server_does_not_start_if_checks_fail(tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO_MODEL, tmp_path / "model")
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Nothing"}}')
    command = [*COMMAND, "serve", str(folder), "--port=0"]
    for flags, text in (([], "error: the start would fail"), (["--no-preflight"], "error: no usable tokenizer in")):
        ended = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=60, env=dict(os.environ))
        assert ended.returncode == 2
        assert text in ended.stderr
