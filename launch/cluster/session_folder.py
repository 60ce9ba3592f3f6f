"""The private folder of a Ray cluster that lockstep starts: its token, its sockets and its logs.

A folder is locked by its owner. The kernel drops the lock when the owner's processes have ended, however they ended,
so that the next start recognizes and removes folders that were left behind.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import shutil
import stat
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from ...comm.message_text import format_bytes
from ..errors import PlacementError

log = logging.getLogger(__name__)
PREFIX = "lockstep-ray-"
SOCKETS = {"plasma_store_socket_name": "s/plasma", "raylet_socket_name": "s/raylet"}  # Ray's options, and paths inside
UNIX_PATH_BYTES = 107  # sun_path of unix(7), without the final zero
MAX_PARENT_BYTES = UNIX_PATH_BYTES - len(f"/{PREFIX}12345678/s/plasma")
MIN_FREE_BYTES = 16 * 2**20  # Ray's logs take 200 KiB at the start
DEFAULTS = ("/tmp", "/var/tmp", "/dev/shm")
TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN")
REMOVE_S = 5.0  # the last of Ray's processes may take this long to end


class SessionFolder:
    """A new folder that only this user can enter, with a new token in it; always call `close`.

    Raises PlacementError if RAY_TMPDIR cannot hold it or, without RAY_TMPDIR, if no temporary folder can.
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


def folder_sockets(path: Path) -> dict[str, str]:
    """Return Ray's options for the paths of its sockets in this folder."""
    return {option: str(path / name) for option, name in SOCKETS.items()}


def with_token(environment: dict[str, str], path: Path) -> dict[str, str]:
    """Return an environment in which Ray accepts and sends the token in this file, and no other."""
    others = {name: value for name, value in environment.items() if name not in TOKEN_VARIABLES}
    return others | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


def sweep() -> None:
    """Remove the folders of this user whose owner has ended without removing them."""
    for parent in {*_parents(), *map(Path, DEFAULTS)}:
        for path in parent.glob(f"{PREFIX}*"):
            with suppress(OSError):  # in use, removed by another process meanwhile, or not ours
                _remove_if_stale(path)


def remove_folder(path: Path) -> None:
    """Remove a folder to which processes may still write, once they have ended."""
    deadline = time.monotonic() + REMOVE_S
    while path.exists():
        try:
            shutil.rmtree(path)
        except OSError as error:
            if time.monotonic() > deadline:
                log.warning("Ray's folder %s cannot be removed: %s", path, error)
                return
        time.sleep(0.02)


def remove_folder_of_argument() -> None:
    """Run as a program: remove the folder that its argument names, and again if a process that ends makes it anew."""
    for _ in range(10):
        remove_folder(Path(sys.argv[1]))
        time.sleep(0.05)


def _create() -> tuple[Path, int]:
    """Return the path of a new folder and the file descriptor that locks it."""
    problems: list[str] = []
    for parent in _parents():
        try:
            created = _create_in(parent)
        except OSError as error:
            problems.append(f"{parent}: {error.strerror or error}")
        else:
            if problems:
                log.warning("Ray's sockets and logs are in %s, because of %s", parent, "; ".join(problems))
            return created
    subject = "RAY_TMPDIR cannot" if os.environ.get("RAY_TMPDIR") else "no temporary folder can"
    remedy = "name another folder with RAY_TMPDIR, with a short path"
    raise PlacementError(f"{subject} hold Ray's sockets and logs ({'; '.join(problems)}); {remedy}")


def _create_in(parent: Path) -> tuple[Path, int]:
    """Do as `_create` in this folder; raises OSError with the reason why it cannot be used."""
    _check_room(parent)
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


def _check_room(parent: Path) -> None:
    length = len(os.fsencode(parent))
    if length > MAX_PARENT_BYTES:
        raise OSError(errno.ENAMETOOLONG, f"its path has {length} bytes, and sockets in it allow {MAX_PARENT_BYTES}")
    free = shutil.disk_usage(parent).free
    if free < MIN_FREE_BYTES:
        raise OSError(errno.ENOSPC, f"{format_bytes(free)} are free, and Ray needs {format_bytes(MIN_FREE_BYTES)}")


def _parents() -> list[Path]:
    """Return the folders that may be used, the preferred one first: RAY_TMPDIR alone if it is set."""
    chosen = os.environ.get("RAY_TMPDIR")
    names = [chosen] if chosen else [os.environ.get("TMPDIR"), *DEFAULTS]
    return [Path(os.path.abspath(name)) for name in dict.fromkeys(names) if name]


def _remove_if_stale(path: Path) -> None:
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(lock)
        if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == 0o700:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                shutil.rmtree(path)
            except OSError as error:
                log.warning("%s, which an ended process had left, cannot be removed: %s", path, error)
            else:
                log.info("removed %s, which an ended process had left", path)
    finally:
        os.close(lock)
