"""The messages from replicas to the front end over ZeroMQ: one for each step, not one for each request."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from ...runtime.executor import RankLocation
from ...runtime.plan import StepOutput
from ...runtime.request import Limits
from ...runtime.stats import EngineStats
from ..cluster.sockets import Address


@dataclass(frozen=True)
class FrontendInfo:
    """The front end's addresses and settings for its replicas; travels through Ray."""

    address: Address  # of its PullSocket
    lifeline: tuple[str, int]  # ip, port; a connection to it breaks when the front end ends
    ip: str | None  # for the ranks' sockets: the loopback address if there is only one machine
    environment: dict[str, str]  # for the ranks


class ReplicaReady(msgspec.Struct, frozen=True, tag=True):
    """The report of a replica that has started."""

    replica: str
    limits: Limits
    locations: list[RankLocation]


class StepReport(msgspec.Struct, frozen=True, tag=True):
    """The output of a replica's step, and its counters since it started."""

    replica: str
    output: StepOutput
    stats: EngineStats


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(ReplicaReady | StepReport).decode
