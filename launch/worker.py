"""The Ray actor: one rank in a process of its own, leader (rank 0) or follower.

Ray starts it, gives it its GPU and reports its death; it is not on the path of a step. The calls come in this order,
on all ranks at once: bind, load, allocate, run.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import ray
import torch

from ..comm.base import Communicator
from ..comm.connect import connect, join_rendezvous, open_rendezvous
from ..runtime.config import Config
from ..runtime.engine import Engine
from ..runtime.executor import load_rank
from ..runtime.hub import checkpoint_folder
from ..runtime.memory import MemoryPlan
from ..runtime.model.config import ModelConfig
from ..runtime.phases import Phases
from ..runtime.plan import Admit, Cancel, Report, StepPlan, Stop, Trace, decode_command, decode_plan, encode
from ..runtime.scheduler import Limits, Scheduler
from .channel import Address, Inbox, Outbox
from .interfaces import interface_of


@dataclass(frozen=True)
class Endpoint:
    """Where a rank runs and how to reach it."""

    rank: int
    host: str
    ip: str
    interface: str  # that has this address; empty if none can be told
    pid: int
    gpus: list[str]  # that Ray gave it, by their numbers on the host
    stderr: str  # the file that it goes to, on that host
    inbox: Address
    rendezvous_port: int  # rank 0's; 0 on the others

    def __str__(self) -> str:
        gpus = "".join(f", GPU {gpu}" for gpu in self.gpus)
        return f"rank {self.rank} on {self.host} ({self.ip}){gpus}, pid {self.pid}"


@dataclass(frozen=True)
class Loaded:
    """What a rank reports when its weights are in place and the largest step has been rehearsed."""

    memory: MemoryPlan
    loading_s: float
    device: str
    communication: str


class Worker:
    """One rank; `config` is resolved, `environment` is what the driver passes on of its own (NCCL_*, HF_*, ...)."""

    def __init__(self, rank: int, size: int, config: Config, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        self.rank, self.size, self.config = rank, size, config
        if config.device == "cpu":
            # Ray sets OMP_NUM_THREADS=1 in its workers: only the driver's own choice counts.
            cores = len(os.sched_getaffinity(0)) // size
            torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", max(1, cores))))

    def bind(self, ip: str | None) -> Endpoint:
        """Open this rank's ports on `ip`, by default the address by which the cluster knows this node."""
        self._ip = ip or ray.util.get_node_ip_address()
        interface = interface_of(self._ip)
        if ip is None and interface:
            # NCCL would choose by name among all interfaces, and take one that the other nodes cannot reach.
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
        self._inbox = Inbox(self._ip)
        self._store = None
        if self.rank == 0 and self.size > 1:
            self._store = open_rendezvous(self._ip, self.config.startup_timeout)
        port = self._store.port if self._store else 0
        gpus = [str(gpu) for gpu in ray.get_gpu_ids()]
        stderr = os.readlink("/proc/self/fd/2")
        return Endpoint(
            self.rank, socket.gethostname(), self._ip, interface, os.getpid(), gpus, stderr, self._inbox.address, port
        )

    def load(self, endpoints: list[Endpoint], output: Address) -> Loaded:
        """Load this rank's share of the weights, and meet the others."""
        self._phases = Phases()
        folder = checkpoint_folder(self.config.model, self.config.revision)
        model = ModelConfig.from_folder(folder)
        with self._phases("connecting"):
            comm = self._connect(endpoints[0])
        self._runner = load_rank(self.config, model, Path(folder), comm, self._phases)
        if self.rank == 0:
            self._outputs = Outbox(output)
            self._followers = [Outbox(e.inbox) for e in endpoints[1:]]
        memory, seconds = self._runner.plan_memory(), self._phases.seconds["weights"]
        return Loaded(memory, seconds, str(self._runner.device), comm.description)

    def _connect(self, leader: Endpoint) -> Communicator:
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
            timeout_s=self.config.step_timeout,
        )

    def allocate(self, limits: Limits) -> dict[str, float]:
        """Take the memory for the KV cache, the same number of pages on all ranks; the seconds of each phase so far."""
        self._limits = limits
        self._runner.allocate(limits)
        return self._phases.seconds

    def run(self) -> None:
        """Work until told to stop; an exception here is the group's end, and Ray brings it to the driver."""
        if self.rank == 0:
            self._lead()
        else:
            self._follow()
        self._runner.close()

    def _lead(self) -> None:
        engine = Engine(Scheduler(self._limits), self._runner, self._publish, overlap=self._runner.overlaps)
        while True:
            for message in self._inbox.receive(0 if engine.has_work else None):
                command = decode_command(message)
                if isinstance(command, Admit):
                    engine.add(command.requests)
                elif isinstance(command, Cancel):
                    engine.cancel(command.uids)
                elif isinstance(command, Trace):
                    engine.start_profile(command.num_steps)
                else:
                    self._tell_followers(encode(Stop()))
                    return
            if engine.has_work:
                output = engine.step()
                self._outputs.send(encode(Report(output, engine.stats, engine.take_profile())))

    def _follow(self) -> None:
        while not isinstance(plan := decode_plan(self._inbox.receive_one()), Stop):
            self._runner.launch(plan)

    def _publish(self, plan: StepPlan) -> None:
        if self._followers:
            self._tell_followers(encode(plan))

    def _tell_followers(self, message: bytes) -> None:
        for follower in self._followers:
            follower.send(message)
