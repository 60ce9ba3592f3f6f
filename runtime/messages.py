"""Messages between the front end and the leader, encoded as msgpack, never pickle."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from .plan import StepOutput, StepPlan
from .request import Request
from .stats import EngineStats, Profile


class Report(msgspec.Struct, frozen=True):
    """The leader's message after a step: its output, the counters, and a profile if one is complete."""

    output: StepOutput
    stats: EngineStats
    profile: Profile | None


class Admit(msgspec.Struct, frozen=True, tag=True):
    """Queue requests."""

    requests: list[Request]


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """End requests early."""

    uids: list[int]


class StartProfile(msgspec.Struct, frozen=True, tag=True):
    """Profile the next decode steps."""

    num_steps: int


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End the loops of followers and leader."""


Command = Admit | Cancel | StartProfile | Stop


def _array_to_bytes(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value, dtype=np.int32).tobytes()
    raise TypeError(f"{type(value).__name__} does not travel between ranks")


def _bytes_to_array(kind: type, value: Any) -> Any:
    if kind is np.ndarray:
        return np.frombuffer(value, dtype=np.int32).copy()  # the message's memory is read-only
    raise TypeError(f"{kind.__name__} does not travel between ranks")


encode = msgspec.msgpack.Encoder(enc_hook=_array_to_bytes).encode

decode_command = msgspec.msgpack.Decoder(Command, dec_hook=_bytes_to_array).decode

decode_plan = msgspec.msgpack.Decoder(StepPlan | Stop, dec_hook=_bytes_to_array).decode

decode_report = msgspec.msgpack.Decoder(Report, dec_hook=_bytes_to_array).decode
