"""The end of a connection whose client may still send: its data is read and dropped, so that it gets the response.

The kernel resets a connection that is closed with unread data, and the client then loses what it has not read. So the
server closes its own side first (RFC 9112, section 9.6).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

MAX_DROPPED_BYTES = 64 * 2**20
QUIET_S = 2.0  # a client that has sent nothing for this long has read the response, or never will


class LingeringTransport:
    """The part of asyncio.Transport that uvicorn uses. `close` ends the connection within `timeout_s`.

    is_sending  returns whether the client may send anything that has not been read
    """

    def __init__(self, transport: asyncio.Transport, is_sending: Callable[[], bool], timeout_s: float) -> None:
        self._transport, self._is_sending, self._timeout_s = transport, is_sending, timeout_s
        self._loop = asyncio.get_running_loop()
        self._end_timer: asyncio.TimerHandle | None = None
        self._is_lingering = False
        self._num_dropped = 0
        self.write, self.abort, self.get_extra_info = transport.write, transport.abort, transport.get_extra_info
        self.get_write_buffer_size = transport.get_write_buffer_size
        self.pause_reading, self.resume_reading = transport.pause_reading, transport.resume_reading

    def is_closing(self) -> bool:
        """Return whether `close` has been called; `write` must not be called then."""
        return self._is_lingering or self._transport.is_closing()

    def close(self) -> None:
        """Send what has been written, then close. While the client may send, close this side only."""
        if self.is_closing():
            return
        self._start_end_timer()
        if self._is_sending():
            self._is_lingering = True
            self.resume_reading()
            with suppress(OSError):  # the client may be gone
                self._transport.write_eof()
            self._close_if_quiet(-1)
        else:
            self._transport.close()

    def drop(self, data: bytes) -> None:
        """Count data that is not read as HTTP; too much of it ends the connection."""
        self._num_dropped += len(data)
        if self._num_dropped > MAX_DROPPED_BYTES:
            self.close()  # starts the deadline, if nothing has before
            self._transport.close()

    def shorten(self, timeout_s: float) -> None:
        """Take this time for `timeout_s`, from now if `close` has been called."""
        self._timeout_s = timeout_s
        if self.is_closing():
            self._start_end_timer()

    def cancel_timer(self) -> None:
        """Forget the deadline of a connection that has ended."""
        if self._end_timer is not None:
            self._end_timer.cancel()

    def _start_end_timer(self) -> None:
        self.cancel_timer()
        self._end_timer = self._loop.call_later(self._timeout_s, self.abort)

    def _close_if_quiet(self, num_before: int) -> None:
        """Close if nothing has arrived since the last call, when `num_before` bytes had."""
        if self._num_dropped == num_before:
            self._transport.close()
        else:
            self._loop.call_later(QUIET_S, self._close_if_quiet, self._num_dropped)
