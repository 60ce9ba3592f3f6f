"""Two machines for a test: network namespaces joined by one link, each with a host name and a Ray node of its own.

All processes carry a mark in their environment, by which they are found and ended however they were detached.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from processes import kill_marked, marked, new_mark
from waiting import holds_within, wait_until

HEAD = "10.213.7.1"  # seen in the namespaces only
ADDRESSES = {"a": HEAD, "b": "10.213.7.2"}
RAY_START = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
RAY_SIZE = ["--num-cpus=1", "--num-gpus=0", "--object-store-memory=80000000"]
# Ray takes a silent node for dead after 65 s; here after 3.
SOON = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "3",
}


def why_not() -> str:
    """Return why this machine cannot have namespaces; empty if it can."""
    missing = [tool for tool in ("ip", "unshare", "sh", "hostname") if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    trial = f"ls-trial-{uuid.uuid4().hex[:6]}"
    made = subprocess.run(["ip", "netns", "add", trial], capture_output=True, text=True)
    if made.returncode:
        return f"needs network namespaces: {made.stderr.strip()}"
    exists = subprocess.run(["ip", "netns", "exec", trial, "unshare", "--uts", "true"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", trial], check=True)
    return f"needs network namespaces: {exists.stderr.strip()}" if exists.returncode else ""


class Nodes:
    """The nodes "a", with the head, and "b", of one CPU each; always call `close`."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ls-"))  # short: it holds sockets, whose paths end at 107 characters
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(uuid.uuid4().hex * 2)
        self._ray: dict[str, subprocess.Popen[str]] = {}
        self._tag = uuid.uuid4().hex[:8]
        self.mark = new_mark()
        self.environment = {
            **os.environ, **SOON, **self.mark, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": str(self.folder),
        }  # fmt: skip
        for node in ADDRESSES:
            _ip("netns", "add", self._space(node))
        a, b = (self.interface(node) for node in ADDRESSES)
        _ip("link", "add", a, "netns", self._space("a"), "type", "veth", "peer", "name", b, "netns", self._space("b"))
        for node, address in ADDRESSES.items():
            inside = ("-n", self._space(node))
            _ip(*inside, "addr", "add", f"{address}/24", "dev", self.interface(node))
            _ip(*inside, "link", "set", "lo", "up")
            _ip(*inside, "link", "set", self.interface(node), "up")

    def start_ray(self, node: str) -> None:
        """`ray start --block`, as the README has it; returns once the node runs."""
        own = [f"--node-ip-address={HEAD}", "--port=6379", "--head", "--include-dashboard=false"]
        said = self.folder / f"{node}-{time.monotonic_ns()}.log"
        role = own if node == "a" else [f"--address={HEAD}:6379"]
        started = self.start(node, [*RAY_START, *role, *RAY_SIZE], said, said)
        wait_until(lambda: "Ray runtime started" in said.read_text() or started.poll() is not None)
        assert started.poll() is None, said.read_text()
        self._ray[node] = started

    def end_ray(self, node: str) -> None:
        """End Ray on a node; one that Ray has given up ends without this."""
        self._ray[node].terminate()
        self._ray.pop(node).wait(60)

    def start(self, node: str, command: Sequence[str], out: Path, err: Path) -> subprocess.Popen[str]:
        """Start a command on a node, with its output in files: a pipe without a reader fills up."""
        inside = ["ip", "netns", "exec", self._space(node), "unshare", "--uts", "sh", "-c"]
        named = [*inside, 'hostname "$0" && exec "$@"', f"node-{node}", *command]
        with out.open("w") as to, err.open("w") as errors:
            return subprocess.Popen(
                named, env=self.environment, text=True, stdin=subprocess.DEVNULL, stdout=to, stderr=errors,
                start_new_session=True,
            )  # fmt: skip

    def run(self, node: str, command: Sequence[str], timeout_s: float = 60) -> str:
        """Return the stdout of a command that must succeed."""
        out, err = self.folder / "out", self.folder / "err"
        process = self.start(node, command, out, err)
        try:
            assert process.wait(timeout_s) == 0, err.read_text()
        finally:
            process.kill()
        return out.read_text()

    def link(self, state: str) -> None:
        """Set the link "up" or "down"; messages on their way are lost without an error."""
        _ip("-n", self._space("a"), "link", "set", self.interface("a"), state)

    def marked(self, title: str = "") -> list[int]:
        """Return the processes of these nodes whose command line contains `title`."""
        return list(marked(self.mark, title))

    def close(self) -> None:
        """End what runs, and remove the namespaces, with their interfaces, and the files."""
        kill_marked(self.mark)
        holds_within(10, lambda: not self.marked())
        for node in ADDRESSES:
            subprocess.run(["ip", "netns", "del", self._space(node)])
        shutil.rmtree(self.folder, ignore_errors=True)

    def _space(self, node: str) -> str:
        return f"ls{self._tag}{node}"

    def interface(self, node: str) -> str:
        return f"lan{node}{self._tag}"  # both are made in this namespace, so they need names of their own


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
