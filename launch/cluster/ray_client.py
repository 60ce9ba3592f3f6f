"""The connection of this process to a running Ray cluster, and the token for it."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.job_config import JobConfig

from ...comm.message_text import first_line
from ..errors import PlacementError
from ..signals import signals_wait
from .session_folder import TOKEN_VARIABLES, with_token


class IsolatedJob(JobConfig):  # type: ignore[misc]  # without stubs
    """A job whose workers import installed packages only.

    Ray puts the driver's script folder and current folder before all others on a worker's path, unless the workers get
    a folder of files from the driver. There a file named json.py or a folder named lockstep would hide the real one.
    """

    def _runtime_env_has_working_dir(self) -> bool:
        return True


def join_ray(address: str) -> None:
    """Connect this process to the cluster at host:port or "auto"; raises PlacementError if it cannot."""
    # Otherwise ray.shutdown resets SIGTERM to its default below Python, and a SIGTERM that comes before our own end is
    # complete leaves processes behind. Python's faulthandler, which Ray enables, still reports crashes.
    ray._private.ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = True  # Ray reads the variable when it is imported
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, job_config=IsolatedJob(), logging_level=logging.ERROR, log_to_driver=False)
    except (RayError, ConnectionError, TimeoutError, ValueError, RuntimeError) as error:
        raise PlacementError(
            f"no Ray cluster at {address}: {first_line(error)}; see that it runs, with the same Ray and Python"
        ) from error
    if threading.current_thread() is threading.main_thread():
        # Ray has set a handler that exits; its processes end with this one in any case.
        signal.signal(signal.SIGTERM, on_sigterm)


def join_on_loopback(address: str) -> None:
    """Connect this process to the cluster at 127.0.0.1:port, where only this host can reach it."""
    constants = ray._private.ray_constants
    enabled, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False  # else Ray replaces 127.0.0.1
    try:
        with signals_wait():
            join_ray(address)
    finally:
        constants.ENABLE_RAY_CLUSTER = enabled


@contextmanager
def ray_prints_nothing() -> Iterator[None]:
    """Keep Ray from printing messages such as the last lines of the raylet's log when the raylet has ended."""
    worker = ray._private.worker
    original, worker.print_to_stdstream = worker.print_to_stdstream, lambda data, ignore_prefix: None
    try:
        yield
    finally:
        worker.print_to_stdstream = original


def while_connected(end: Callable[..., Any], *arguments: Any) -> None:
    """Call `end`, unless the user has called ray.shutdown(): the call would start Ray again."""
    if ray.is_initialized():
        end(*arguments)


@contextmanager
def token_of(path: Path) -> Iterator[None]:
    """Let this process use the token in this file; the user's own settings come back at the end."""
    before = {name: value for name in TOKEN_VARIABLES if (value := os.environ.get(name)) is not None}
    _set_token_variables(with_token({}, path))
    try:
        yield
    finally:
        _set_token_variables(before)


def _set_token_variables(values: dict[str, str]) -> None:
    for name in TOKEN_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(values)
    ray._raylet.Config.initialize("")  # Ray has read the mode when it was imported, and keeps the token
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()
