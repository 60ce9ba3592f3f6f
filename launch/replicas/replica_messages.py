"""What replicas send to the front end, over ZeroMQ: a message a step for all requests, not one for each."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from ...runtime.executor import RankLocation
from ...runtime.limits import Limits
from ...runtime.plan import StepOutput
from ...runtime.stats import EngineStats
from ..cluster.sockets import Address


@dataclass(frozen=True)
class FrontendInfo:
    """What a replica must know of the front end; travels through Ray."""

    inbox: Address
    lifeline: tuple[str, int]  # ip, port; a connection to it ends when the front end does
    ip: str | None  # for the ranks to listen on: the loopback address where there is only one machine
    environment: dict[str, str]  # that the ranks get


class ReplicaReady(msgspec.Struct, frozen=True, tag=True):
    """A replica is ready."""

    replica: str
    limits: Limits
    locations: list[RankLocation]


class StepReport(msgspec.Struct, frozen=True, tag=True):
    """A step of a replica has ended; the counters are all of this replica's until now."""

    replica: str
    output: StepOutput
    stats: EngineStats


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(ReplicaReady | StepReport).decode
