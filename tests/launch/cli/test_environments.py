"""Commands in the environments of containers, clusters and services: the answer is that of a usual one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from small import COMMAND, SMALL_FLAGS

pytestmark = [pytest.mark.process, pytest.mark.nightly]
PROXIES = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://192.0.2.1:9")


def shell(script: str, *prefix: str) -> list[str]:
    """Return the beginning of a command line that runs the rest of it after a script of the shell."""
    return [*prefix, "sh", "-ec", f'{script}; exec "$@"', "sh"]


def variables(**changes: str) -> list[str]:
    return ["env", *(f"{name}={value}" for name, value in changes.items())]


ENVIRONMENTS: dict[str, Callable[[Path], list[str]]] = {
    "a proxy that does not answer": lambda folder: variables(**PROXIES),
    "no visible GPU": lambda folder: variables(CUDA_VISIBLE_DEVICES=""),
    "stdin is closed": lambda folder: shell("exec <&-"),
    "no home": lambda folder: variables(HOME="/nonexistent", XDG_CACHE_HOME="/nonexistent/cache"),
    "a home that cannot be written": lambda folder: variables(HOME="/proc"),
    "no temporary folder": lambda folder: variables(TMPDIR="/nonexistent"),
    "a long temporary folder": lambda folder: shell(f"mkdir -p {folder}/{'x' * 90}", *variables(
        TMPDIR=f"{folder}/{'x' * 90}")),
    "a full temporary folder": lambda folder: shell(
        f"mount -t tmpfs -o size=64k tmpfs {folder}; dd if=/dev/zero of={folder}/x bs=1k 2>&- || true",
        *variables(TMPDIR=str(folder)), "unshare", "--mount",
    ),
    "1 MiB of shared memory": lambda folder: shell("mount -t tmpfs -o size=1m tmpfs /dev/shm", "unshare", "--mount"),
    "a host name without an address": lambda folder: shell("hostname no.such.host", "unshare", "--uts"),
    "no interface but loopback": lambda folder: shell("ip link set lo up", "unshare", "--net"),
    "a user without a name": lambda folder: ["unshare", "--user", "--map-user=54321", "--map-group=54321"],
}  # fmt: skip


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.serial)])
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_answer_is_that_of_a_usual_environment(name: str, ranks: int, tmp_path: Path) -> None:
    prefix = ENVIRONMENTS[name](tmp_path)
    if "unshare" in prefix and subprocess.run(["unshare", "--mount", "--net", "--uts", "true"], check=False).returncode:
        pytest.skip("needs root")
    assert generate(tuple(prefix), ranks) == generate((), 1)


@cache
def generate(prefix: tuple[str, ...], ranks: int) -> str:
    """Return what `lockstep generate` prints after this beginning of its command line."""
    command = [*COMMAND, "generate", "--prompt=In the beginning", "--temperature=0", f"--tp={ranks}", *SMALL_FLAGS]
    usual = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([*prefix, *command], capture_output=True, text=True, timeout=240, env=usual)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout
