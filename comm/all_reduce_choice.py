"""The ways to all-reduce between GPUs, as names. This module needs no torch."""

from __future__ import annotations

from typing import Literal

Algorithm = Literal["nccl", "one-shot", "two-shot"]
AllReduce = Literal["auto", "nccl", "one-shot", "two-shot"]  # auto: the fastest for each size
