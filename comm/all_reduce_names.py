"""The ways to all-reduce between GPUs, as names. This module needs no torch."""

from __future__ import annotations

from typing import Literal, get_args

PeerAlgorithm = Literal["push", "one-shot", "two-shot"]  # over peer memory; symmetric.py has the kernel of each
Algorithm = Literal["nccl", PeerAlgorithm]
AllReduce = Literal["auto", Algorithm]  # auto: the fastest for each size
PEER_ALGORITHMS: tuple[PeerAlgorithm, ...] = get_args(PeerAlgorithm)
ALGORITHMS: tuple[Algorithm, ...] = ("nccl", *PEER_ALGORITHMS)
