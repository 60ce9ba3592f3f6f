"""The entry point of the command `lockstep`: until its libraries are imported, Ctrl-C ends the process at once.

The interpreter's own handler would print a traceback of the imports.
"""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as in a shell's background
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from .main import main

__all__ = ["main"]
