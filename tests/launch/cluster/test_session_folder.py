"""The folder of a local Ray: private, short, and swept once its owner has ended."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep.launch.cluster import session_folder
from lockstep.launch.cluster.session_folder import PREFIX, UNIX_PATH_BYTES, SessionFolder, sweep


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short temporary folder, the only one that is considered."""
    with tempfile.TemporaryDirectory(prefix="ls-", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.setattr(session_folder, "FALLBACKS", ())
        yield Path(folder)


def test_folder_is_private_and_holds_a_new_token(parent: Path) -> None:
    umask = os.umask(0)
    try:
        first, second = SessionFolder(), SessionFolder()
    finally:
        os.umask(umask)
    assert first.path.parent == parent
    assert stat.S_IMODE(first.path.stat().st_mode) == 0o700
    assert stat.S_IMODE(first.token_path.stat().st_mode) == 0o600
    tokens = {folder.token_path.read_text() for folder in (first, second)}
    assert len(tokens) == 2
    assert all(re.fullmatch("[0-9a-f]{64}", token) for token in tokens)
    for folder in (first, second):
        folder.close()
        folder.close()
    assert list(parent.iterdir()) == []


def test_sweep_removes_folders_whose_owner_was_killed_and_no_others(parent: Path) -> None:
    ours = SessionFolder()
    program = f"""
import os, signal, sys
sys.path.append({str(Path(session_folder.__file__).parents[3])!r})
from lockstep.launch.cluster.session_folder import SessionFolder
folder = SessionFolder()
(folder.path / "r").mkdir()
(folder.path / "r" / "log").write_text("x")
print(folder.path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    stale = Path(killed.stdout.strip())
    assert stale.is_dir(), killed.stderr
    other, public, link = parent / "other", parent / f"{PREFIX}public", parent / f"{PREFIX}link"
    other.mkdir(mode=0o700)
    public.mkdir()
    public.chmod(0o755)  # not made by us
    link.symlink_to(other)
    (other / "file").touch()
    sweep()
    assert not stale.exists()
    assert ours.path.is_dir()
    assert (other / "file").exists()
    assert public.exists()
    assert link.is_symlink()
    ours.close()


def test_folder_of_another_user_is_left(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = parent / f"{PREFIX}stale"
    stale.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: stale.stat().st_uid + 1)
    sweep()
    assert stale.exists()
    monkeypatch.undo()


def test_long_temporary_folder_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    folder = SessionFolder()
    sockets = f"{folder.path}/r/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1"
    assert len(sockets) <= UNIX_PATH_BYTES
    folder.close()


def test_full_temporary_folder_is_not_used(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=rf"no folder for Ray's.*{parent}: No space left on device.*RAY_TMPDIR"):
        SessionFolder()
    assert list(parent.iterdir()) == []


def test_no_folder_with_a_short_path(parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    with pytest.raises(OSError, match="name a short one with RAY_TMPDIR"):
        SessionFolder()
