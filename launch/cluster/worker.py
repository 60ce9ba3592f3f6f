"""The Ray actor of one rank, leader (rank 0) or follower.

Ray starts it, assigns its GPU and reports its death, but is not involved in a step. The methods are called in this
order, on all ranks at once: bind, load, allocate, run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...runtime.engine import Engine
from ...runtime.memory.memory_plan import MemoryPlan
from ...runtime.model.checkpoint import checkpoint_folder
from ...runtime.model.model_config import ModelConfig
from ...runtime.plan import Admit, Cancel, Report, StartProfile, StepPlan, Stop, decode_command, decode_plan, encode
from ...runtime.request import Limits
from ...runtime.scheduler.scheduler import Scheduler
from ...runtime.startup import LoadedRank
from ...runtime.startup_timer import StartupTimer
from .rank_actor import Endpoint, RankActor
from .sockets import Address, PushSocket


@dataclass(frozen=True)
class Loaded:
    """A rank's report after its weights are loaded and its largest step has been rehearsed."""

    memory: MemoryPlan
    loading_s: float
    device: str
    communication: str


class Worker(RankActor):
    """One rank of a model."""

    def load(self, endpoints: list[Endpoint], output: Address) -> Loaded:
        """Connect to the other ranks and load this rank's share of the weights."""
        self._phases = StartupTimer()
        folder = checkpoint_folder(self.config.model, self.config.revision)
        model = ModelConfig.from_folder(folder)
        with self._phases("connecting"):
            comm = self.connect(endpoints[0])
        self._loaded = LoadedRank(self.config, model, Path(folder), comm, self._phases)
        if self.rank == 0:
            self._outputs = PushSocket(output)
            self._followers = [PushSocket(e.inbox) for e in endpoints[1:]]
        memory, seconds = self._loaded.plan_memory(), self._phases.seconds["weights"]
        return Loaded(memory, seconds, str(self._loaded.device), comm.description)

    def allocate(self, limits: Limits) -> dict[str, float]:
        """Allocate the KV cache, of the same size on all ranks; return the seconds of each start-up phase."""
        self._limits = limits
        self._runner = self._loaded.allocate(limits)
        del self._loaded  # it holds a graph, and NCCL waits for graphs when it ends
        return self._phases.seconds

    def run(self) -> None:
        """Run steps until the Stop command; Ray passes an exception to the driver, which ends the group."""
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
                elif isinstance(command, StartProfile):
                    engine.start_profile(command.num_steps)
                else:
                    self._send_to_followers(encode(Stop()))
                    return
            if engine.has_work:
                output = engine.step()
                self._outputs.send(encode(Report(output, engine.stats, engine.take_profile())))

    def _follow(self) -> None:
        while not isinstance(plan := decode_plan(self._inbox.receive_one()), Stop):
            self._runner.launch(plan)

    def _publish(self, plan: StepPlan) -> None:
        if self._followers:
            self._send_to_followers(encode(plan))

    def _send_to_followers(self, message: bytes) -> None:
        for follower in self._followers:
            follower.send(message)
