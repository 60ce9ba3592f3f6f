"""The ports of a server: their addresses, and strangers who connect to all of them while it starts and runs.

docs/security.md has the same table in words.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from hostile_peers import ATTACKS, MIB, half_open, resident_bytes
from listeners import Listener, listeners
from processes import kill_marked, marked, new_mark
from small import COMMAND, SMALL_FLAGS
from waiting import holds_within, left_after, wait_until

pytestmark = pytest.mark.process
NIGHTLY = [pytest.mark.nightly, pytest.mark.serial]
GROWTH = 100 * MIB  # of a process under attack; each attack sends as much, and a start allocates on its own
HALF_OPEN = 20
# Titles of the processes with a port, and who they are.
RAY = r"gcs_server|/raylet/raylet|ray::(DashboardAgent|RuntimeEnvAgent|IDLE)|serve_cluster"
SERVE = r"ray::(ServeController|ServeReplica|Replica|ProxyActor)"
RANK = r"ray::(Worker|RankActor)"
COMMAND_LINE = r"lockstep\.launch\.cli\.main"


class Attacker:
    """A thread of a stranger who sends every attack to every port of the processes with a mark, over and over."""

    def __init__(self, mark: dict[str, str]) -> None:
        self._mark, self._end = mark, threading.Event()
        self.attacked: set[Listener] = set()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(0.1):
            for listener in listeners(marked(self._mark)):
                if self._end.is_set():
                    return
                try:
                    connections = half_open(listener.place, HALF_OPEN)
                except OSError:  # ended meanwhile
                    continue
                for attack in ATTACKS.values():
                    attack(listener.place)
                for connection in connections:
                    connection.close()
                self.attacked.add(listener)

    def close(self) -> None:
        self._end.set()
        self._thread.join()


@contextmanager
def serving(log: Path, mark: dict[str, str], *flags: str) -> Iterator[httpx.Client]:
    command = [*COMMAND, "serve", "--port=0", *SMALL_FLAGS, *flags]
    with log.open("w") as errors:
        process = subprocess.Popen(command, stderr=errors, env={**os.environ, **mark}, start_new_session=True)
    try:
        assert holds_within(150, lambda: " on http://" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        url = log.read_text().rpartition(" on ")[2].split()[0]
        with httpx.Client(base_url=url, timeout=60) as client:
            yield client
        process.terminate()
        assert process.wait(60) == 0, log.read_text()
        assert not left_after(lambda: marked(mark))
    finally:
        kill_marked(mark)


def stream(client: httpx.Client, count: int) -> str:
    """Return the greedy text of `count` tokens from a stream that must be complete."""
    body = {"prompt": "In the", "max_tokens": count, "temperature": 0, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    choices = [json.loads(line)["choices"][0] for line in lines]
    assert choices[-1]["finish_reason"] == "length"
    return "".join(choice["text"] for choice in choices)


def refuses_calls(port: int) -> bool:
    """Return whether Ray Serve's gRPC server refuses a call without a token, before it unpickles the request."""
    import grpc  # with Ray Serve

    method = "/ray.serve.ASGIService/HandleRequest"
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(method)(b"", timeout=20)
        return bool(caught.value.code() == grpc.StatusCode.UNAUTHENTICATED)


@pytest.mark.parametrize(
    ("flags", "allowed"),
    [
        (["--tp=1"], COMMAND_LINE),
        pytest.param(["--tp=2"], f"{COMMAND_LINE}|{RAY}|{RANK}", marks=NIGHTLY),
        pytest.param(["--replicas=2"], f"{COMMAND_LINE}|{RAY}|{RANK}|{SERVE}", marks=NIGHTLY),
    ],
)
def test_ports_are_on_loopback_and_of_known_processes(tmp_path: Path, flags: list[str], allowed: str) -> None:
    mark = new_mark()
    with serving(tmp_path / "log", mark, *flags) as client:
        assert stream(client, 20)
        found = listeners(marked(mark))
        beyond = [listener for listener in found if not listener.address.is_loopback]
        assert all(listener.title.startswith("ray::ServeReplica") for listener in beyond)
        assert all(refuses_calls(listener.port) for listener in beyond)
        assert not [listener for listener in found if re.search(allowed, listener.title) is None]
        if flags == ["--tp=1"]:
            assert [listener.port for listener in found] == [client.base_url.port]


@pytest.mark.nightly
@pytest.mark.serial
def test_strangers_at_every_port_of_two_ranks(tmp_path: Path) -> None:
    """They attack from the first moment: the server starts, streams, grows by less than one attack sends, and ends."""
    mark = new_mark()
    attacker = Attacker(mark)
    try:
        with serving(tmp_path / "log", mark, "--tp=2") as client:
            processes = marked(mark)
            before = {pid: resident_bytes(pid) for pid in processes}
            num_attacked = len(attacker.attacked)
            assert num_attacked > 0, "during the start"
            texts = set()
            for _ in range(4):
                texts.add(stream(client, 100))
                assert client.get("/health").status_code == 200
            wait_until(lambda: len(attacker.attacked) > num_attacked)
            attacker.close()
            grown = {processes[pid]: resident_bytes(pid) - size for pid, size in before.items()}
            assert {title: size for title, size in grown.items() if size > GROWTH} == {}
            found = listeners(marked(mark))
            assert not [listener for listener in found if not listener.address.is_loopback]
            assert texts == {stream(client, 100)}
    finally:
        attacker.close()
    text = (tmp_path / "log").read_text()
    assert "failed" not in text, text
