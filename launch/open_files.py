"""The limit of open files of this process, which the processes that it starts inherit."""

from __future__ import annotations

import resource

from .errors import PlacementError

MIN_FILES = 512  # Ray and torch need these descriptors; 60 of the raylet with two ranks on CPUs


def raise_file_limit() -> None:
    """Raise this process's soft limit of open files to the hard limit: each connection needs a descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def require_open_files() -> None:
    """Raise a soft limit below MIN_FILES; raises PlacementError if the hard limit is lower, too.

    Ray reports a lack of descriptors as an abort of one of its processes, or not at all.
    """
    if is_below(resource.getrlimit(resource.RLIMIT_NOFILE)[0], MIN_FILES):
        raise_file_limit()
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        if is_below(hard, MIN_FILES):
            raise PlacementError(f"the limit of open files is {hard}, and Ray needs {MIN_FILES}; {remedy(MIN_FILES)}")


def is_below(limit: int, number: int) -> bool:
    """Return whether a limit of open files allows fewer than `number`."""
    return limit != resource.RLIM_INFINITY and limit < number


def remedy(number: int) -> str:
    """Return how to raise a hard limit, which only root can."""
    return f"as root ulimit -n {number}, docker run --ulimit nofile={number}, or systemd's LimitNOFILE={number}"
