"""`lockstep doctor`: what would keep the ranks from starting, on this machine or on the cluster they would run on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

from ...runtime.config import Config
from . import checks
from .checks import Finding
from .p2p import peer_test

LOOPBACK = "127.0.0.1"


def diagnose(config: Config) -> Iterator[Finding]:
    """Each finding about a start with `config`, as soon as it is there."""
    if (config.ray_address or os.environ.get("RAY_ADDRESS", "local")) == "local":
        yield from examine(config, LOOPBACK, alone=True)
        return
    from .cluster_survey import survey  # imports Ray: half a second

    yield from survey(config, examine)


def examine(config: Config, ip: str, *, alone: bool) -> Iterator[Finding]:
    """The findings of this machine, which the others reach at `ip`; `alone`: all ranks would run here."""
    with peer_test(config) as test:
        case = checks.Case(config, ip, starts_ray=alone and config.tensor_parallel_size > 1, peers=test)
        for name, check in {**(checks.ALONE if alone else {}), **checks.CHECKS}.items():
            yield checks.run(name, partial(check, case))
