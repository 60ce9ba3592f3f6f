"""One page in headless Chromium, driven over the DevTools protocol as a user would: keys, clicks, and what is shown.

Events are kept as they come, so that a test can ask at its end what the page requested and complained about.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless=new", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage", "--remote-debugging-port=0"]
DOMAINS = ("Page", "Runtime", "Log", "Network")
PATIENCE_S = 30.0


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Chromium with one empty page; it ends with the block."""
    assert PROGRAM is not None
    root = ["--no-sandbox"] if os.geteuid() == 0 else []  # its sandbox refuses to run as root
    command = [PROGRAM, *FLAGS, *root, f"--user-data-dir={profile}", "about:blank"]
    with (profile / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        # No queue's end and no pings: nobody reads events while a test is busy with the server.
        with connect(_address(profile, process), max_size=None, max_queue=None, ping_interval=None) as wire:
            browser = Browser(wire)
            yield browser
            browser.call("Browser.close")
            process.wait(PATIENCE_S)
    finally:
        process.kill()
        process.wait(PATIENCE_S)


def _address(profile: Path, process: subprocess.Popen[bytes]) -> str:
    """Return the address of the page; the browser writes its port into the profile."""
    port, until = profile / "DevToolsActivePort", time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        assert process.poll() is None, (profile / "log").read_text()
        if port.exists() and (lines := port.read_text().splitlines()):
            targets = httpx.get(f"http://127.0.0.1:{lines[0]}/json/list").json()
            for page in (target for target in targets if target["type"] == "page"):
                return str(page["webSocketDebuggerUrl"])
        time.sleep(0.02)
    raise AssertionError(f"Chromium shows no page: {(profile / 'log').read_text()}")


class Browser:
    """The page, and its events since `open`."""

    def __init__(self, wire: ClientConnection) -> None:
        self._wire = wire
        self._calls = 0
        self.events: list[dict[str, Any]] = []
        for domain in DOMAINS:
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol; return its result."""
        self._calls += 1
        self._wire.send(json.dumps({"id": self._calls, "method": method, "params": params}))
        while True:
            message: dict[str, Any] = json.loads(self._wire.recv(PATIENCE_S))
            if message.get("id") == self._calls:
                assert "error" not in message, f"{method}: {message}"
                return message["result"]  # type: ignore[no-any-return]
            self.events.append(message)

    def find(self, method: str) -> list[dict[str, Any]]:
        """Return the parameters of the events of this name so far."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def evaluate(self, script: str) -> Any:
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, f"{script}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def wait(self, script: str) -> None:
        """Wait until the script is true for the page."""
        until = time.monotonic() + PATIENCE_S
        while not self.evaluate(f"Boolean({script})"):
            shown = "document.body.innerText"
            assert time.monotonic() < until, f"{script} did not become true; the page shows:\n{self.evaluate(shown)}"
            time.sleep(0.02)

    def open(self, url: str) -> None:
        """Load the page; requests of the page before it, which may fail with its server, no longer count."""
        self.call("Page.navigate", url="about:blank")
        self.wait("location.href === 'about:blank'")
        self.events.clear()
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def text(self, selector: str) -> str:
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent"))

    def click(self, selector: str) -> None:
        """Click the middle of an element, which must be visible, with the mouse."""
        element = f"document.querySelector({json.dumps(selector)})"
        box = self.evaluate(f"{element}.scrollIntoView(), {element}.getBoundingClientRect().toJSON()")
        assert box["width"], f"{selector} is not shown"
        where = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **where)

    def type(self, selector: str, text: str) -> None:
        """Replace the text of an element."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).select()")
        if text:
            self.call("Input.insertText", text=text)
        else:
            self.press("Delete")

    def press(self, key: str) -> None:
        code = {"Enter": 13, "Delete": 46}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)

    def complaints(self) -> list[str]:
        """Return uncaught exceptions, and errors and warnings of the console."""
        self.call("Runtime.evaluate", expression="0")  # events before this one have come
        said = [str(p["exceptionDetails"]) for p in self.find("Runtime.exceptionThrown")]
        said += [str(p) for p in self.find("Runtime.consoleAPICalled") if p["type"] in ("error", "warning", "assert")]
        entries = [p["entry"] for p in self.find("Log.entryAdded")]
        return said + [f"{e['text']} {e.get('url', '')}" for e in entries if e["level"] in ("error", "warning")]

    def requests(self, path: str = "") -> list[dict[str, Any]]:
        """Return the requests since `open` whose URL ends with `path`, in order."""
        return [p["request"] for p in self.find("Network.requestWillBeSent") if p["request"]["url"].endswith(path)]
