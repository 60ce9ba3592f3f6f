"""Processes that a test has started, however they were detached: they carry a mark in their environment."""

from __future__ import annotations

from pathlib import Path

MARK = "LOCKSTEP_TEST_MARK"


def marked(mark: str, title: str = "") -> dict[int, str]:
    """The live processes with this value of MARK whose command line contains `title`: pid -> command line."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            owned = f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # ended meanwhile
            continue
        if owned and title in command:
            found[int(folder.name)] = command
    return found
