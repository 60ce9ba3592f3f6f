"""The folder of a local Ray: private, short, and swept once its owner has ended."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from lockstep.launch.cluster import session_folder
from lockstep.launch.cluster.session_folder import PREFIX, UNIX_PATH_BYTES, SessionFolder, folder_sockets, sweep
from lockstep.launch.errors import PlacementError


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short temporary folder, the only one that is considered."""
    with tempfile.TemporaryDirectory(prefix="ls-", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.setattr(session_folder, "DEFAULTS", ())
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


def test_stale_folder_that_cannot_be_removed_is_named(
    parent: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stale = parent / f"{PREFIX}stale"
    stale.mkdir(mode=0o700)

    def refuse(path: Path) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as context:
        context.setattr(shutil, "rmtree", refuse)
        sweep()
    assert f"{stale}, which an ended process had left, cannot be removed: [Errno 30] Read-only" in caplog.text


def long_folder(parent: Path, num_bytes: int) -> Path:
    """Return a new folder below `parent` whose path has this length."""
    folder = parent / ("x" * (num_bytes - len(str(parent)) - 1))
    folder.mkdir()
    return folder


def test_sockets_in_the_longest_folder_have_paths_that_fit(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(long_folder(parent, 76)))
    folder = SessionFolder()
    assert max(map(len, folder_sockets(folder.path).values())) == UNIX_PATH_BYTES
    folder.close()
    monkeypatch.setenv("RAY_TMPDIR", str(long_folder(parent, 77)))
    with pytest.raises(PlacementError, match="its path has 77 bytes, and sockets in it allow 76"):
        SessionFolder()


def test_ray_tmpdir_that_cannot_be_used_is_refused(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user has chosen the place: another one would be a surprise."""
    monkeypatch.setattr(session_folder, "DEFAULTS", ("/tmp",))
    monkeypatch.setenv("RAY_TMPDIR", str(parent / "missing"))
    with pytest.raises(
        PlacementError, match=rf"^RAY_TMPDIR cannot hold Ray's .*\({parent}/missing: No such file or dir"
    ):
        SessionFolder()
    file = parent / "file"
    file.touch()
    monkeypatch.setenv("RAY_TMPDIR", str(file))
    with pytest.raises(PlacementError, match=rf"\({file}: Not a directory\); name another folder with RAY_TMPDIR"):
        SessionFolder()


def test_default_that_cannot_be_used_is_named_with_its_successor(
    parent: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    long, missing = long_folder(parent, 80), parent / "missing"
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(session_folder, "DEFAULTS", (str(missing), str(parent)))
    folder = SessionFolder()
    assert folder.path.parent == parent
    assert [record.getMessage() for record in caplog.records] == [
        f"Ray's sockets and logs are in {parent}, because of {long}: its path has 80 bytes, and sockets in it allow 76;"
        f" {missing}: No such file or directory"
    ]
    folder.close()
    monkeypatch.setattr(session_folder, "DEFAULTS", (str(missing),))
    with pytest.raises(
        PlacementError, match=r"^no temporary folder can hold Ray's sockets and logs \(.*80 bytes.*missin"
    ):
        SessionFolder()


def test_full_folder_is_refused(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(Path, "write_text", full)
        with pytest.raises(PlacementError, match=rf"Ray's sockets and logs \({parent}: No space left on device\)"):
            SessionFolder()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(PlacementError, match=rf"\({parent}: 1 MiB are free, and Ray needs 16 MiB\)"):
        SessionFolder()
    assert list(parent.iterdir()) == []
