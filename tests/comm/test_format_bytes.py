"""Numbers of bytes as text."""

from __future__ import annotations

import pytest

from lockstep.comm.message_text import format_bytes


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (512, "0.5 KiB"),
        (8192, "8 KiB"),
        (2**20 - 1, "1024 KiB"),
        (2**23, "8 MiB"),
        (7_759_462, "7.4 MiB"),
        (2**27, "0.12 GiB"),
        (16 * 2**30, "16.00 GiB"),
        (-3 * 2**20, "-3 MiB"),
    ],
)
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text
