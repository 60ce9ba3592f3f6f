"""The ways to all-reduce between GPUs, as names. This module needs no torch."""

from __future__ import annotations

from typing import Literal, get_args

PeerAlgorithm = Literal["push", "one-shot", "two-shot"]  # over peer memory; symmetric.py has the kernel of each
AllReduceAlgorithm = Literal["nccl", PeerAlgorithm]
AllReduceChoice = Literal["auto", AllReduceAlgorithm]  # auto: the fastest for each size
PEER_ALGORITHMS: tuple[PeerAlgorithm, ...] = get_args(PeerAlgorithm)
ALL_REDUCE_ALGORITHMS: tuple[AllReduceAlgorithm, ...] = ("nccl", *PEER_ALGORITHMS)
