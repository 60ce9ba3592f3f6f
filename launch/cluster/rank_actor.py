"""The base of the Ray actors of a group: open ports, report the endpoint, connect to the other ranks.

Its subclasses are Worker, which runs a model, and CommBenchActor, which times collectives.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import ray
import torch
from torch.distributed import Store  # type: ignore[attr-defined]  # exported, but not in its stubs

from ...comm.base import Communicator
from ...comm.connect import connect
from ...comm.rendezvous import join_rendezvous, open_rendezvous
from ...runtime.config import Config
from .network import interface_of
from .sockets import Address, PullSocket


@dataclass(frozen=True)
class Endpoint:
    """A rank's host and process, and its addresses."""

    rank: int
    host: str
    ip: str
    interface: str  # that has this address; empty if unknown
    pid: int
    gpus: list[str]  # assigned by Ray, as numbers on the host
    stderr: str  # the file of its stderr, on that host
    inbox: Address
    rendezvous_port: int  # of rank 0; 0 on the others

    def __str__(self) -> str:
        gpus = "".join(f", GPU {gpu}" for gpu in self.gpus)
        return f"rank {self.rank} on {self.host} ({self.ip}){gpus}, pid {self.pid}"


class RankActor:
    """One rank; `config` is resolved, `environment` has the variables that the driver passes on (NCCL_*, HF_*, ...)."""

    def __init__(self, rank: int, size: int, config: Config, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        self.rank, self.size, self.config = rank, size, config
        self._store: Store | None = None
        if config.device == "cpu":
            # Not from os.environ: Ray sets OMP_NUM_THREADS=1 in its workers.
            cores = len(os.sched_getaffinity(0)) // size
            torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", max(1, cores))))

    def bind(self, ip: str | None) -> Endpoint:
        """Open this rank's ports on `ip`, by default the node's address in the cluster; return the endpoint."""
        self._ip = ip or ray.util.get_node_ip_address()
        interface = interface_of(self._ip)
        if ip is None and interface:
            # Otherwise NCCL chooses an interface by name, perhaps one that the other nodes cannot reach.
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
        self._inbox = PullSocket(self._ip)
        port = 0
        if self.rank == 0 and self.size > 1:
            self._store = store = open_rendezvous(self._ip, self.config.startup_timeout)
            port = store.port
        gpus = [str(gpu) for gpu in ray.get_gpu_ids()]
        stderr = os.readlink("/proc/self/fd/2")
        return Endpoint(
            self.rank, socket.gethostname(), self._ip, interface, os.getpid(), gpus, stderr, self._inbox.address, port
        )

    def connect(self, leader: Endpoint) -> Communicator:
        """Connect to the other ranks; `leader` is rank 0's endpoint."""
        if self.size > 1 and self._store is None:
            address = (leader.ip, leader.rendezvous_port)
            self._store = join_rendezvous(address, self.rank, self.config.startup_timeout)
        return connect(
            self.rank,
            self.size,
            store=self._store,
            own_ip=self._ip,
            device=torch.device(self.config.device),
            shares_device=self.config.gpus_per_rank < 1,
            library=self.config.nccl_library,
            all_reduce=self.config.all_reduce,
            batch_invariant=self.config.deterministic,
            timeout_s=self.config.step_timeout,
        )
