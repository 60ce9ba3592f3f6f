"""The process of a ProcessExecutor: one rank that leads itself, without Ray.

It reads a RankStart from stdin, answers there with a RankReady or a RankError, and then works over ZeroMQ. It ends when
the Stop command comes or when the process that has started it ends.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from pathlib import Path

import msgspec

from ..comm.message_sockets import Address, PullSocket, PushSocket
from ..comm.message_text import first_line
from ..runtime.config import Config
from ..runtime.executor import LocalExecutor
from ..runtime.limits import Limits
from ..runtime.model.checkpoint import read_model
from ..runtime.rank_location import RankLocation
from .options import start_logging
from .signals import ENDING
from .standard_streams import protect_standard_streams

log = logging.getLogger(__name__)
LOOPBACK = "127.0.0.1"


class RankStart(msgspec.Struct, frozen=True):
    """The settings of the process; it sends its reports to `outputs`."""

    config: Config
    folder: str  # the folder of the checkpoint
    outputs: Address
    log_level: str


class RankReady(msgspec.Struct, frozen=True, tag=True):
    """The first answer of a process that has started; `inbox` takes its commands."""

    inbox: Address
    limits: Limits
    locations: list[RankLocation]
    startup: dict[str, float]


class RankError(msgspec.Struct, frozen=True, tag=True):
    """The last answer of a process that fails."""

    message: str
    is_mistake: bool  # the user's: another attempt would not help


def main() -> None:
    """Run the rank until the Stop command; exits with status 1 after a RankError."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print goes to the log
    for number in ENDING:  # a supervisor may send them to all processes: requests are drained first
        signal.signal(number, signal.SIG_IGN)
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=RankStart)
    threading.Thread(target=_end_with_parent, name="lockstep-parent", daemon=True).start()
    protect_standard_streams()
    start_logging(start.log_level)
    try:
        _run(start, answers)
    except (ValueError, OSError) as error:
        _answer(answers, RankError(str(error), is_mistake=True))
        sys.exit(1)
    except Exception as error:  # a step raises anything
        log.exception("the engine failed")
        _answer(answers, RankError(f"{type(error).__name__}: {first_line(error)}", is_mistake=False))
        sys.exit(1)


def _run(start: RankStart, answers: int) -> None:
    outputs, inbox, folder = PushSocket(start.outputs), PullSocket(LOOPBACK), Path(start.folder)
    executor = LocalExecutor(start.config, read_model(start.config, folder), folder)
    _answer(answers, RankReady(inbox.address, executor.limits, executor.locations, executor.startup))
    executor.lead(inbox, outputs)
    executor.close()
    outputs.close()


def _answer(answers: int, answer: RankReady | RankError) -> None:
    os.write(answers, msgspec.json.encode(answer) + b"\n")


def _end_with_parent() -> None:
    """End this process at once when the other end of stdin is closed."""
    while os.read(0, 1):
        pass
    os._exit(1)
