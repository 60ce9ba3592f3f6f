"""The engine options of most tests, as keyword arguments and as flags, and the command that takes the flags."""

from __future__ import annotations

import sys
from typing import Any

SMALL: dict[str, Any] = {"device": "cpu", "num_pages": 256, "max_num_seqs": 8, "max_num_batched_tokens": 256}
COMMAND = [sys.executable, "-u", "-c", "from lockstep.launch.cli.main import main; main()"]


def as_flags(options: dict[str, Any]) -> list[str]:
    """Return the options as flags of the command line."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


SMALL_FLAGS = as_flags(SMALL)
