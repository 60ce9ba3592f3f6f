"""Standard streams that are full or closed: the process goes on, and says what was lost."""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.launch.standard_streams import MAX_QUEUED, WITHOUT_TRACEBACK, QueuedStderr, Throttle

from waiting import wait_until

PIPE_BYTES = 4096


def small_pipe() -> tuple[int, int]:
    """Return the ends of a pipe of one page; writing to it does not block."""
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    os.set_blocking(write_end, False)
    return read_end, write_end


def test_full_pipe_blocks_nobody_and_drops_are_counted() -> None:
    read_end, write_end = small_pipe()
    stream = QueuedStderr(write_end)
    lines = [f"line {i:06d} {'x' * 85}\n" for i in range(5000)]
    for line in lines:
        stream.write(line)
    stream.drain(0.05)  # a deadline, although nothing can be written
    os.set_blocking(read_end, False)
    received = ""

    def has_all() -> bool:
        nonlocal received
        try:
            received += os.read(read_end, 1 << 20).decode()
        except BlockingIOError:
            return False
        return "dropped" in received and received.endswith("\n")

    wait_until(has_all)
    *kept, notice = received.splitlines(keepends=True)
    assert kept == lines[: len(kept)], "the first lines are kept, whole and in order"
    assert MAX_QUEUED <= len(kept) < MAX_QUEUED + 100
    assert notice == f"{len(lines) - len(kept)} log lines were dropped: stderr was not read in time\n"
    os.set_blocking(read_end, True)
    stream.write("again\n")
    assert os.read(read_end, 100) == b"again\n"
    for end in (read_end, write_end):
        os.close(end)


def test_reader_that_is_gone_is_no_error() -> None:
    read_end, write_end = small_pipe()
    os.close(read_end)
    stream = QueuedStderr(write_end)
    print("text", file=stream)
    stream.drain(5.0)
    os.close(write_end)


def test_throttle_counts_equal_messages(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    monkeypatch.setattr("lockstep.launch.standard_streams.time.monotonic", lambda: now)
    logger = logging.getLogger("throttled")
    throttle = Throttle()
    logger.addFilter(throttle)
    try:
        for i in range(1351):
            now += 0.003
            logger.warning("invalid %d", i)
        logger.warning("another")
    finally:
        logger.removeFilter(throttle)
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == "invalid 0"
    assert messages[-1] == "another"
    assert len(messages) == 1 + 4 + 1, "4.05 s"
    counts = [int(m.partition("(")[2].split()[0]) for m in messages[1:-1]]
    assert all(330 < count < 340 for count in counts)


PROGRAM = """
import sys, os, logging
from lockstep.launch.standard_streams import protect_standard_streams
protect_standard_streams()
logging.basicConfig(level=logging.INFO, format="%(message)s")
"""
FLOOD = """
for i in range(20000): logging.info("line %d", i)
try: os.write(2, b"y" * 100000)
except BlockingIOError: pass
open(sys.argv[1], "w").write("went on")
"""


@pytest.mark.process
def test_stderr_that_nobody_reads_does_not_stop_a_process(tmp_path: Path) -> None:
    done = tmp_path / "done"
    with subprocess.Popen([sys.executable, "-c", PROGRAM + FLOOD, done], stderr=subprocess.PIPE) as process:
        assert process.wait(60) == 0, "the queue has a deadline at exit"
        assert done.read_text() == "went on"
        assert process.stderr is not None
        assert process.stderr.read().startswith(b"line 0\nline 1\n")


@pytest.mark.process
def test_all_lines_are_written_at_exit() -> None:
    early = "import atexit, sys; atexit.register(lambda: print('last of all', file=sys.stderr))"
    program = early + PROGRAM + "for i in range(900): logging.info('line %d', i)\nraise ValueError('the end')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "line 899\n" in done.stderr
    assert done.stderr.endswith("ValueError: the end\nlast of all\n")


@pytest.mark.process
def test_file_is_appended_to(tmp_path: Path) -> None:
    """A file that is opened again would be written from its start."""
    with open(tmp_path / "log", "w") as log:
        log.write("before\n")
        log.flush()
        subprocess.run([sys.executable, "-c", PROGRAM + "logging.info('after')"], stderr=log, timeout=60, check=True)
    assert (tmp_path / "log").read_text() == "before\nafter\n"


@pytest.mark.process
@pytest.mark.parametrize("closed", [(0, 1, 2), (2,), (1,), (0,)], ids=str)
def test_closed_streams_are_replaced(tmp_path: Path, closed: tuple[int, ...]) -> None:
    program = (
        PROGRAM
        + f"""
import socket
logging.info("text")
print("text")
print("text", file=sys.stderr)
number = socket.socket().fileno()
open({str(tmp_path / "done")!r}, "w").write(str(number > 2))
assert all(os.readlink(f"/proc/self/fd/{{i}}") == "/dev/null" for i in {closed})
assert sys.stdin.read() == ""
"""
    )
    redirections = " ".join(f"{number}>&-" for number in closed)
    command = f'"$0" -c "$1" {redirections} </dev/null' if 0 not in closed else f'"$0" -c "$1" {redirections}'
    done = subprocess.run(["sh", "-c", command, sys.executable, program], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "done").read_text() == "True"


def test_exceptions_are_logged_without_traceback(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("test_standard_streams")
    log.addFilter(WITHOUT_TRACEBACK)
    try:
        for error in (ValueError("first line\nthe reason"), KeyError()):
            try:
                raise error
            except Exception:
                log.exception("failed to read %s", "a stream")
    finally:
        log.removeFilter(WITHOUT_TRACEBACK)
    assert caplog.messages == ["failed to read a stream: the reason", "failed to read a stream: KeyError"]
    assert "Traceback" not in caplog.text
