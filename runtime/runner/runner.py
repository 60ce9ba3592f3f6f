"""One rank's steps: turn each plan into tensors, logits and next tokens.

A runner's state follows from the plans alone: the tokens and pages of every slot, and how to sample. All ranks execute
the same plans and sample from the same candidates, so they hold the same next tokens without exchanging them. In a
step with a grammar they take the tokens of rank 0, which alone computes masks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..model.batch import HostBatch, to_device, to_device_together
from ..model.embedding import Logits
from ..plan import PromptLogprobs, StepPlan, TokenLogprobs
from ..sampling.logprobs import PendingLogprobs, prompt_logprobs, sampled_logprobs
from ..sampling.sampler import Method
from .graphs import DecodeGraphs
from .piecewise_graphs import PiecewiseGraphs
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


class SampledRows(NamedTuple):
    """The rows of a step that get a token, [S] each."""

    slots: np.ndarray
    positions: np.ndarray  # of the new tokens

    def take(self, rows: np.ndarray) -> SampledRows:
        return SampledRows(self.slots[rows], self.positions[rows])


class Runner:
    """One rank's model and memory.

    graphs     captured decode steps, or None to launch every kernel from Python
    piecewise  captured parts of steps with prompts, or None
    overlaps   the next step may be launched before the tokens of this one are waited for
    """

    def __init__(
        self,
        memory: RankMemory,
        graphs: DecodeGraphs | None = None,
        piecewise: PiecewiseGraphs | None = None,
        *,
        overlaps: bool = False,
    ) -> None:
        self.memory = memory
        self.graphs = graphs
        self.piecewise = piecewise
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
        self.graphs = self.piecewise = None  # NCCL waits for graphs that hold its kernels
        self.comm.close()

    def _run(self, plan: StepPlan, host: HostBatch) -> PendingStep:
        """Launch a step kernel by kernel, or as piecewise graphs."""
        memory, decoder = self.memory, self.memory.decoder
        batch = memory.tables.batch(plan, host)
        memory.attention.plan(batch)
        if self.piecewise is not None and len(batch.token_ids) <= self.piecewise.max_tokens:
            residual = self.piecewise.forward(batch, memory)
        else:
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
        needs_full_logits = params["needs_full_logits"]
        with_candidates = bool(((params["method"] == Method.CANDIDATES.value) & ~needs_full_logits).any())
        logits, tokens = graphs.run(host, params, with_candidates=with_candidates)
        self.memory.grammars.advance()
        if needs_full_logits.any():
            return self._sample(plan, logits, tokens.clone())
        return PendingStep(plan, self.memory.readback.start(tokens))

    def _sample(self, plan: StepPlan, logits: Logits, sampled: Tensor | None = None) -> PendingStep:
        """Sample the next tokens from the logits of the plan's sampled rows, and store them in the slots.

        sampled  [S] int32: the tokens of a graph, which are right for rows that do not need the full logits
        """
        memory, step = self.memory, PendingStep(plan)
        rows = SampledRows(plan.slots[plan.sampled_rows], (plan.starts + plan.counts)[plan.sampled_rows])
        needs_full_logits = memory.sampler.params.take(rows.slots)["needs_full_logits"]
        if sampled is None:
            sampled = self._sample_candidates(logits, rows, np.flatnonzero(~needs_full_logits))
        if needs_full_logits.any():
            self._sample_full(step, logits, rows, np.flatnonzero(needs_full_logits), sampled)
        device_slots, last_positions = to_device_together((rows.slots, rows.positions - 1), memory.device)
        memory.tables.append(device_slots, last_positions, sampled)
        step.tokens = memory.readback.start(sampled)
        if memory.grammars.active[rows.slots].any():
            memory.grammars.advance_later(rows.slots, step.tokens.wait)
        return step

    def _sample_candidates(self, logits: Logits, rows: SampledRows, chosen: np.ndarray) -> Tensor:
        """Return tokens [S] int32, of which those of `chosen` are sampled: the ranks exchange candidates."""
        memory = self.memory
        if len(chosen) == len(rows.slots):
            return memory.sampler.sample(logits, *rows, memory.tables.tokens)
        sampled = torch.zeros(len(rows.slots), dtype=torch.int32, device=memory.device)
        if len(chosen):
            index = to_device(chosen, memory.device)
            sampled[index] = memory.sampler.sample(logits[index], *rows.take(chosen), memory.tables.tokens)
        return sampled

    def _sample_full(
        self, step: PendingStep, logits: Logits, rows: SampledRows, chosen: np.ndarray, sampled: Tensor
    ) -> None:
        """Sample `chosen` into `sampled` [S] from gathered logits; note failures and log-probabilities in `step`."""
        memory, index, num_rows = self.memory, to_device(chosen, self.memory.device), len(rows.slots)
        logits, rows = (logits if len(chosen) == num_rows else logits[index]).replicated(), rows.take(chosen)
        params = memory.sampler.params.take(rows.slots)
        wants_logprobs = self.comm.rank == 0 and bool((params["logprobs"] >= 0).any())
        raw = logits.shard.clone() if wants_logprobs else logits.shard  # sampling may change its logits
        constrained = bool(memory.grammars.active[rows.slots].any())
        if constrained:
            failed = memory.grammars.mask(logits.shard, *rows, num_rows)
            step.failed = {int(chosen[row]): reason for row, reason in failed.items()}
        tokens = memory.sampler.sample(logits, *rows, memory.tables.tokens)
        if constrained and self.comm.size > 1:  # rank 0 alone has the masks
            tokens = self.comm.all_gather(tokens.long())[0].int()
        if wants_logprobs:
            reported = memory.sampler.reported_ids(rows.slots)
            logprobs = sampled_logprobs(raw, tokens, params["logprobs"], reported)
            step.logprobs = replace(logprobs, rows=chosen[logprobs.rows])
        sampled[index] = tokens
