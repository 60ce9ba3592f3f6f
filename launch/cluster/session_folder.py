"""The private folder of a Ray cluster that lockstep starts: its token, its sockets and its logs.

A folder is locked by its owner. The kernel drops the lock when the owner's processes have ended, however they ended,
so that the next start recognizes and removes folders that were left behind.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)
PREFIX = "lockstep-ray-"
# Ray's longest socket path in a folder: <folder>/r/session_<date and time, 26 characters>_<pid>/sockets/plasma_store
SOCKET_PATH_BYTES = len("/r/session__4194304/sockets/plasma_store.1") + 26
UNIX_PATH_BYTES = 107  # sun_path of unix(7), without the final zero
FALLBACKS = ("/tmp", "/var/tmp", "/dev/shm")  # a long TMPDIR leaves no room for the paths of sockets
TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN")
REMOVE_S = 5.0  # the last of Ray's processes may take this long to end


class SessionFolder:
    """A new folder that only this user can enter, with a new token in it; always call `close`.

    Raises OSError if no temporary folder has a short path and room for the token.
    """

    def __init__(self) -> None:
        self.path, self.lock = _create()
        self.token_path = self.path / "token"

    def close(self) -> None:
        """Remove the folder, to which processes may still write until they have ended; safe to call twice."""
        if self.lock >= 0:
            remove_folder(self.path)
            os.close(self.lock)
            self.lock = -1


def with_token(environment: dict[str, str], path: Path) -> dict[str, str]:
    """Return an environment in which Ray accepts and sends the token in this file, and no other."""
    others = {name: value for name, value in environment.items() if name not in TOKEN_VARIABLES}
    return others | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


def sweep() -> None:
    """Remove the folders of this user whose owner has ended without removing them."""
    for parent in _parents():
        for path in parent.glob(f"{PREFIX}*"):
            with suppress(OSError):  # removed by another process meanwhile, or not ours
                _remove_if_stale(path)


def remove_folder(path: Path) -> None:
    """Remove a folder to which processes may still write, once they have ended."""
    deadline = time.monotonic() + REMOVE_S
    while path.exists():
        shutil.rmtree(path, ignore_errors=True)
        if time.monotonic() > deadline:
            log.warning("Ray's folder %s cannot be removed", path)
            return
        time.sleep(0.02)


def remove_folder_of_argument() -> None:
    """Run as a program: remove the folder that its argument names, and again if a process that ends makes it anew."""
    for _ in range(10):
        remove_folder(Path(sys.argv[1]))
        time.sleep(0.05)


def _create() -> tuple[Path, int]:
    """Return the path of a new folder and the file descriptor that locks it."""
    failures = []
    for parent in _parents():
        try:
            return _create_in(parent)
        except OSError as error:
            failures.append(f"{parent}: {error.strerror or error}")
    raise OSError(f"no folder for Ray's sockets and logs ({'; '.join(failures)}); name a short one with RAY_TMPDIR")


def _create_in(parent: Path) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (path / "token").touch(mode=0o600)
            (path / "token").write_text(secrets.token_hex(32))
            return path, lock
        except (BlockingIOError, FileNotFoundError):  # the sweep of another start was faster than the lock
            os.close(lock)
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)
            raise


def _parents() -> Iterator[Path]:
    """Yield the temporary folders with a path short enough for Ray's sockets, the preferred one first."""
    preferred = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    for folder in dict.fromkeys([os.path.abspath(preferred), *FALLBACKS]):
        length = len(os.fsencode(folder)) + len(f"/{PREFIX}") + 8 + SOCKET_PATH_BYTES  # 8: mkdtemp's random characters
        if length <= UNIX_PATH_BYTES and os.path.isdir(folder):
            yield Path(folder)


def _remove_if_stale(path: Path) -> None:
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(lock)
        if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == 0o700:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)
            log.info("removed %s, which an ended process had left", path)
    finally:
        os.close(lock)
