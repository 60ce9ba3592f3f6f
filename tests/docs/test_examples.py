"""The examples, as a reader runs them."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from listeners import free_port, urls_of
from small import COMMAND, SMALL_FLAGS
from waiting import wait_until

EXAMPLES = Path(__file__).parents[2] / "examples"
TIMEOUT_S = 180


def run_here(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    """Run an example in this process: torch is imported already."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def run(*command: str) -> str:
    """Run an example as a process with the commands of this environment; return its stdout."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, "PATH": path}, cwd=EXAMPLES
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_tested_and_listed() -> None:
    tests = Path(__file__), Path(__file__).parents[1] / "launch/server/test_metrics.py"
    source = "".join(path.read_text() for path in tests)
    listed = set(re.findall(r"^\| \[([\w.]+)\]", (EXAMPLES / "README.md").read_text(), re.M))
    assert listed == {path.name for path in EXAMPLES.iterdir() if path.name[0] != "_" and path.suffix != ".md"}
    assert not {name for name in listed if f'"{name}"' not in source}


def test_offline(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_here(monkeypatch, "offline.py")
    lines = capsys.readouterr().out.splitlines()
    assert sum("prompt tokens ->" in line for line in lines) == 3
    assert lines[-1].startswith("chat: ")


def test_structured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_here(monkeypatch, "structured.py")
    out = capsys.readouterr().out
    assert "parsed: {'name': " in out
    assert re.search(r"^regex: [A-Z][a-z]{2,8} begat [A-Z][a-z]{2,8} \(stop\)$", out, re.M)
    assert re.search(r"^choice: (yea|nay) \(stop\)$", out, re.M)


@pytest.mark.process
def test_two_ranks_cpu() -> None:
    assert "equal tokens at TP=1 and TP=2" in run(sys.executable, str(EXAMPLES / "two_ranks_cpu.py"))


@pytest.mark.process
def test_serve_and_query() -> None:
    out = run(sys.executable, str(EXAMPLES / "serve_and_query.py"), *SMALL_FLAGS)
    assert out.count(" -> ") == 4
    assert "lockstep:generation_tokens_total" in out
    assert "server ended with status 0" in out


@pytest.fixture
def server() -> Iterator[str]:
    """The URL of a server with the demo model."""
    process = subprocess.Popen([*COMMAND, "serve", *SMALL_FLAGS, "--port=0", "--no-preflight"])

    def healthy() -> bool:
        nonlocal url
        assert process.poll() is None
        try:
            (url,) = urls_of(process.pid)
            return httpx.get(f"{url}/health").status_code == 200
        except (ValueError, httpx.TransportError):  # it does not listen, or not serve yet
            return False

    url = ""
    try:
        wait_until(healthy)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@pytest.mark.process
def test_chat_client(server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_here(monkeypatch, "chat_client.py", server, "And God said unto Noah,")
    out = capsys.readouterr().out
    assert re.search(r"^\d+ prompt tokens, [1-9]\d* generated$", out, re.M), out


def test_chat_client_without_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="no server at"):
        run_here(monkeypatch, "chat_client.py", f"http://127.0.0.1:{free_port()}")


@pytest.mark.process
def test_cluster() -> None:
    out = run("bash", str(EXAMPLES / "cluster.sh"), "127.0.0.1", str(free_port()))
    assert "Ray cluster: connected, 1 node\n" in out
    assert "FAIL" not in out.upper().replace("FAILED: 0", "")
    assert out.splitlines()[-1].strip()  # the text
