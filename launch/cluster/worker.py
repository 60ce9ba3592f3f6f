"""The Ray actors of ranks: their common base, and the one that runs a model as leader (rank 0) or follower.

Ray starts it, assigns its GPU and reports its death, but is not involved in a step. The methods are called in this
order, on all ranks at once: bind, load, allocate, run.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import ray
import torch

from ...comm.all_reduce_policy import COLUMNS
from ...comm.base import Communicator
from ...comm.connect import connect
from ...comm.message_sockets import Address, PullSocket, PushSocket
from ...comm.rendezvous import RankStore
from ...runtime.config import Config
from ...runtime.engine import Engine
from ...runtime.leader_loop import lead
from ...runtime.limits import Limits
from ...runtime.memory.memory_plan import MemoryPlan
from ...runtime.model.attention.select_backend import import_ahead
from ...runtime.model.checkpoint import checkpoint_folder, read_model
from ...runtime.plan import StepPlan, Stop, decode_plan, encode
from ...runtime.scheduler.scheduler import Scheduler
from ...runtime.startup import LoadedRank
from ...runtime.startup_timer import StartupTimer
from .network import interface_of
from .rank_warnings import WarningCollector

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Endpoint:
    """A rank's host and process, and its addresses."""

    rank: int
    host: str
    ip: str
    interface: str  # network interface with this address; empty if unknown
    pid: int
    gpus: list[str]  # the host's numbers of the GPUs that Ray has assigned
    stderr: str  # path of its stderr on that host
    inbox: Address
    rendezvous: Address

    def __str__(self) -> str:
        gpus = "".join(f", GPU {gpu}" for gpu in self.gpus)
        return f"rank {self.rank} on {self.host} ({self.ip}){gpus}, pid {self.pid}"


class RankActor:
    """One rank; `config` is resolved, `environment` has the variables that the driver passes on (NCCL_*, HF_*, ...)."""

    def __init__(self, rank: int, size: int, config: Config, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        self.rank, self.size, self.config = rank, size, config
        # Not from os.environ: Ray sets OMP_NUM_THREADS=1 in its workers, in some only after torch has read it.
        cores = max(1, len(os.sched_getaffinity(0)) // size) if config.device == "cpu" else 1
        torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", cores)))

    def bind(self, ip: str | None) -> Endpoint:
        """Open this rank's ports on `ip`, by default the node's address in the cluster; return the endpoint."""
        self._ip = ip or ray.util.get_node_ip_address()
        interface = interface_of(self._ip)
        if interface:
            # Otherwise NCCL chooses an interface by name: one that other hosts can reach, or that other ranks cannot.
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
        elif self.config.device == "cuda" and "NCCL_SOCKET_IFNAME" not in os.environ:
            text = "%s is not the first address of an interface: NCCL chooses one; set NCCL_SOCKET_IFNAME to name it"
            log.warning(text, self._ip)
        self._inbox, self._store = PullSocket(self._ip), RankStore(self._ip)
        host, pid, gpus = socket.gethostname(), os.getpid(), [str(gpu) for gpu in ray.get_gpu_ids()]
        stderr = os.readlink("/proc/self/fd/2")
        addresses = self._inbox.address, self._store.address
        return Endpoint(self.rank, host, self._ip, interface, pid, gpus, stderr, *addresses)

    def connect(
        self, endpoints: Sequence[Endpoint], hidden_size: int = COLUMNS, dtype: torch.dtype = torch.bfloat16
    ) -> Communicator:
        """Connect to the other ranks, given in rank order; they will sum rows of `hidden_size` elements."""
        addresses = [endpoint.rendezvous for endpoint in endpoints]
        self._store.join(self.rank, addresses, self.config.startup_timeout)
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
            hidden_size=hidden_size,
            dtype=dtype,
            timeout_s=self.config.step_timeout,
        )


@dataclass(frozen=True)
class LoadReport:
    """A rank's report after its weights are loaded and its largest step has been rehearsed."""

    memory: MemoryPlan
    loading_s: float
    device: str
    communication: str
    warnings: list[str]


@dataclass(frozen=True)
class AllocationReport:
    """A rank's report when it can run steps."""

    phases: dict[str, float]  # seconds of each phase of the start
    warnings: list[str]  # since the LoadReport


class Worker(RankActor):
    """One rank of a model."""

    def __init__(self, rank: int, size: int, config: Config, environment: dict[str, str]) -> None:
        self._warnings = WarningCollector()
        super().__init__(rank, size, config, environment)
        import_ahead(config)

    def load(self, endpoints: list[Endpoint], output: Address) -> LoadReport:
        """Connect to the other ranks and load this rank's share of the weights."""
        self._phases = StartupTimer()
        folder = checkpoint_folder(self.config.model, self.config.revision)
        model = read_model(self.config, folder)
        with self._phases("connecting"):
            comm = self.connect(endpoints, model.hidden_size, self.config.torch_dtype)
        if not comm.uses_rendezvous:
            self._store.close()
        self._loaded = LoadedRank(self.config, model, folder, comm, self._phases)
        if self.rank == 0:
            self._outputs = PushSocket(output)
            self._followers = [PushSocket(e.inbox) for e in endpoints[1:]]
        memory, seconds = self._loaded.plan_memory(), self._phases.seconds["weights"]
        return LoadReport(memory, seconds, str(self._loaded.device), comm.description, self._warnings.take())

    def allocate(self, limits: Limits) -> AllocationReport:
        """Allocate the KV cache, of the same size on all ranks, and capture the graphs."""
        self._limits = limits
        self._runner = self._loaded.allocate(limits)
        del self._loaded  # it holds a graph, and NCCL waits for graphs when it ends
        self._warnings.close()
        return AllocationReport(self._phases.seconds, self._warnings.take())

    def run(self) -> None:
        """Run steps until the Stop command; Ray passes an exception to the driver, which ends the group."""
        if self.rank == 0:
            self._lead()
        else:
            self._follow()
        self._runner.close()

    def _lead(self) -> None:
        engine = Engine(Scheduler(self._limits), self._runner, self._publish, overlap=self._runner.overlaps)
        lead(engine, self._inbox, self._outputs)
        self._publish(Stop())

    def _follow(self) -> None:
        while not isinstance(plan := decode_plan(self._inbox.receive_one()), Stop):
            self._runner.launch(plan)

    def _publish(self, plan: StepPlan | Stop) -> None:
        message = encode(plan) if self._followers else b""
        for follower in self._followers:
            follower.send(message)
