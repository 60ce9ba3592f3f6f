"""Start a server, wait until it is healthy, send requests at once, and drain it.

python examples/serve_and_query.py [SERVE_OPTION ...]      # for example: --tp 2
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx

START_S = 120.0
PROMPTS = ["In the beginning", "And the king said unto", "Blessed is the man that", "The LORD is my"]


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_healthy(server: subprocess.Popen[bytes], url: str) -> None:
    """Return once /health answers 200; connections are refused until the ranks are ready."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with status {server.returncode}; its log says why")
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass  # the port is bound already, but the server does not listen yet
        time.sleep(0.2)
    raise SystemExit(f"the server was not healthy within {START_S:.0f} s")


def complete(url: str, prompt: str) -> str:
    """Return the completion of one prompt."""
    body = {"prompt": prompt, "max_tokens": 24, "temperature": 0.8, "seed": 1}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status()
    return str(response.json()["choices"][0]["text"])


def main() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(["lockstep", "serve", *sys.argv[1:], "--port", str(port)])
    try:
        wait_until_healthy(server, url)
        with ThreadPoolExecutor() as pool:
            for prompt, text in zip(PROMPTS, pool.map(lambda p: complete(url, p), PROMPTS), strict=True):
                print(f"{prompt!r} -> {text!r}")
        metrics = httpx.get(f"{url}/metrics").text.splitlines()
        print(next(line for line in metrics if line.startswith("lockstep:generation_tokens_total")))
    finally:
        server.send_signal(signal.SIGTERM)  # drains: live requests end, new ones get 503
        status = server.wait()
    print(f"server ended with status {status}")


if __name__ == "__main__":
    main()
