"""Child processes that answer in JSON: several requests, deadlines, failures and the end."""

from __future__ import annotations

import subprocess
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from lockstep.launch.child_process import ChildFailed, ChildProcess, calling
from lockstep.launch.cli.main import main

from waiting import wait_until

DOUBLE = "import json, sys\nfor line in sys.stdin: print(json.dumps(2 * json.loads(line)), flush=True)"


def test_requests_are_answered_in_turn() -> None:
    with closing(ChildProcess(["-c", DOUBLE])) as child:
        assert [child.request(line, 60) for line in (b"7", b'"ab"', b"[1]")] == [14, "abab", [1, 1]]
        long = "x" * 500_000
        assert child.request(f'"{long}"'.encode(), 60) == 2 * long


def test_calling_imports_nothing_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json", "typer", "logging", "msgspec"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong file')")
    (tmp_path / "lockstep").mkdir()
    (tmp_path / "lockstep" / "__init__.py").write_text("raise SystemExit('the wrong folder')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    command = [*calling(main), "--version"]  # its answer, `lockstep 0.1.0`, is no JSON
    with closing(ChildProcess(command)) as child, pytest.raises(msgspec.DecodeError):
        child.answer(60)
    with closing(ChildProcess(["-c", "import json"])) as child, pytest.raises(ChildFailed, match="the wrong file"):
        child.answer(60)


def test_arguments_environment_and_files_are_passed_on(tmp_path: Path) -> None:
    answer = "[sys.argv[1:], os.environ.get('A'), os.fstat(int(sys.argv[1])).st_ino]"
    program = f"import json, os, sys; print(json.dumps({answer}))"
    with (tmp_path / "file").open("w") as file:
        arguments = ["-c", program, str(file.fileno())]
        with closing(ChildProcess(arguments, environment={"A": "b"}, inherited=[file.fileno()])) as child:
            assert child.has_answer(60)
            assert child.answer(1) == [[str(file.fileno())], "b", (tmp_path / "file").stat().st_ino]
    with closing(ChildProcess(["-c", "import time; time.sleep(60)"])) as silent:
        assert not silent.has_answer(0.1)


def test_failed_process_gives_the_last_line_of_stderr() -> None:
    with closing(ChildProcess(["-c", "1 / 0"])) as child:
        with pytest.raises(ChildFailed, match=r"^ZeroDivisionError: division by zero$"):
            child.answer(60)
        with pytest.raises(ChildFailed, match=r"^ZeroDivisionError"):
            child.request(b"1", 60)


def test_process_that_exits_silently_has_no_message() -> None:
    with closing(ChildProcess(["-c", "pass"])) as child, pytest.raises(ChildFailed, match=r"^exit status 0$"):
        child.answer(60)


def test_silent_process_ends_the_wait_at_the_deadline() -> None:
    with closing(ChildProcess(["-c", "import time; time.sleep(60)"])) as child:
        with pytest.raises(TimeoutError):
            child.answer(0.2)
        with pytest.raises(TimeoutError):  # more than the socket's buffer holds
            child.request(b"1" * 10_000_000, 0.2)


def test_memory_limit_ends_the_process() -> None:
    program = "import sys; sys.stdin.readline(); bytearray(2**30)"
    child = ChildProcess(["-c", program], memory_bytes=2**28)
    with closing(child), pytest.raises(ChildFailed, match="MemoryError"):
        child.request(b"1", 60)


def test_close_ends_all_that_the_process_started() -> None:
    child = ChildProcess(["-c", "import subprocess; subprocess.run(['sleep', '600'])"])
    wait_until(lambda: len(session_members(child.pid)) == 2)
    child.close()
    child.close()
    wait_until(lambda: not session_members(child.pid))


def session_members(session: int) -> list[str]:
    listing = subprocess.run(
        ["ps", "-o", "pid=,stat=", "--no-headers", "-s", str(session)], capture_output=True, text=True
    )
    return [line for line in listing.stdout.splitlines() if "Z" not in line]
