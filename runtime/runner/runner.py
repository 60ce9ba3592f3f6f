"""One rank's steps: turn each plan into tensors, logits and next tokens.

A runner's state follows from the plans alone: the tokens and pages of every slot, and how to sample. All ranks execute
the same plans and sample from the same candidates, so they hold the same next tokens without exchanging them. In a
step with a grammar they take the tokens of rank 0, which alone computes masks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from ..model.batch import HostBatch, to_device, to_device_together
from ..model.embedding import Logits
from ..plan import PromptLogprobs, StepPlan, TokenLogprobs
from ..sampling.logprobs import PendingLogprobs, prompt_logprobs, sampled_logprobs
from ..sampling.sampler import Method
from .graphs import DecodeGraphs
from .rank_memory import RankMemory, TokenCopy


@dataclass(frozen=True)
class StepSamples:
    """One step's results; only rank 0 has log-probabilities."""

    tokens: np.ndarray  # [S] int32, by sampled row
    logprobs: dict[int, TokenLogprobs]  # by index into `tokens`
    prompt_logprobs: dict[int, PromptLogprobs]  # by row of the plan
    failed: dict[int, str]  # by index into `tokens`: why the request's grammar cannot continue


@dataclass
class PendingStep:
    """A launched step, which the device may still be computing."""

    plan: StepPlan
    tokens: TokenCopy | None = None
    logprobs: PendingLogprobs | None = None
    prompt_logprobs: PendingLogprobs | None = None
    failed: dict[int, str] = field(default_factory=dict)

    def wait(self) -> StepSamples:
        """Wait for the device and return the step's results; raises CommError after a collective's deadline."""
        tokens = self.tokens.wait() if self.tokens is not None else np.empty(0, np.int32)
        logprobs = dict(self.logprobs.wait()) if self.logprobs is not None else {}
        prompts: dict[int, PromptLogprobs] = {}
        for row, entry in self.prompt_logprobs.wait() if self.prompt_logprobs is not None else ():
            chunk = prompts.setdefault(row, PromptLogprobs(int(self.plan.starts[row]) + 1, []))
            chunk.logprobs.append(entry)
        return StepSamples(tokens, logprobs, prompts, self.failed)


class Runner:
    """One rank's model and memory.

    graphs    captured decode steps, or None to launch every kernel from Python
    overlaps  the next step may be launched before the tokens of this one are waited for
    """

    def __init__(self, memory: RankMemory, graphs: DecodeGraphs | None = None, *, overlaps: bool = False) -> None:
        self.memory = memory
        self.graphs = graphs
        self.overlaps = overlaps
        self.comm = memory.decoder.comm

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Launch one step, on a GPU without waiting; every rank must launch the same plans in the same order."""
        memory = self.memory
        memory.tables.update(plan)
        for admission in plan.admitted:
            memory.sampler.admit(admission)
            memory.grammars.admit(admission)
            if memory.states is not None:
                memory.states.start(admission.slot, admission.state)
        host = memory.tables.host_batch(plan)
        if self.graphs is not None and plan.is_decode_only and len(plan.slots) <= self.graphs.max_rows:
            return self._replay(plan, self.graphs, host)
        return self._run(plan, host)

    def close(self) -> None:
        """End the group's communication; the memory is freed with the runner."""
        self.graphs = None  # NCCL waits for graphs that hold its kernels
        self.comm.close()

    def _run(self, plan: StepPlan, host: HostBatch) -> PendingStep:
        """Launch a step kernel by kernel."""
        memory, decoder = self.memory, self.memory.decoder
        batch = memory.tables.batch(plan, host)
        memory.attention.plan(batch)
        residual = decoder.forward(batch, memory.pool, memory.attention, memory.states)
        memory.grammars.advance()
        step = PendingStep(plan)
        if len(plan.sampled_rows):
            last = to_device(host.query_starts[1:][plan.sampled_rows] - 1, memory.device).long()
            step = self._sample(plan, decoder.logits(residual, last))
        params = memory.sampler.params.take(plan.slots)
        tokens = memory.tables.tokens
        step.prompt_logprobs = prompt_logprobs(decoder, residual, tokens, plan, host.query_starts, params)
        return step

    def _replay(self, plan: StepPlan, graphs: DecodeGraphs, host: HostBatch) -> PendingStep:
        """Launch a step of decoding rows as CUDA graphs."""
        params = self.memory.sampler.rows(host.slots, host.positions + 1)
        needs_full_logits = bool(params["needs_full_logits"].any())
        with_candidates = not needs_full_logits and bool((params["method"] == Method.CANDIDATES.value).any())
        logits, tokens = graphs.run(host, params, with_candidates=with_candidates)
        self.memory.grammars.advance()
        if needs_full_logits:
            return self._sample(plan, logits)
        return PendingStep(plan, self.memory.readback.start(tokens))

    def _sample(self, plan: StepPlan, logits: Logits) -> PendingStep:
        """Sample the next tokens from the logits of the plan's sampled rows, and store them in the slots."""
        memory = self.memory
        slots = plan.slots[plan.sampled_rows]
        positions = (plan.starts + plan.counts)[plan.sampled_rows]
        params = memory.sampler.params.take(slots)
        wants_logprobs = self.comm.rank == 0 and bool((params["logprobs"] >= 0).any())
        if params["needs_full_logits"].any():
            logits = logits.replicated()
        raw = logits.shard.clone() if wants_logprobs else logits.shard  # sampling may change its logits
        constrained = bool(memory.grammars.active[slots].any())
        failed = memory.grammars.mask(logits.shard, slots, positions) if constrained else {}
        sampled = memory.sampler.sample(logits, slots, positions, memory.tables.tokens)
        if constrained and self.comm.size > 1:  # rank 0 alone has the masks
            sampled = self.comm.all_gather(sampled.long())[0].int()
        device_slots, last_positions = to_device_together((slots, positions - 1), memory.device)
        memory.tables.append(device_slots, last_positions, sampled)
        logprobs = None
        if wants_logprobs:
            logprobs = sampled_logprobs(raw, sampled, params["logprobs"], memory.sampler.reported_ids(slots))
        tokens = memory.readback.start(sampled)
        if constrained:
            memory.grammars.advance_later(slots, tokens.wait)
        return PendingStep(plan, tokens, logprobs, failed=failed)
