"""One rank's model and memory: turns each plan into tensors, logits and next tokens.

A runner holds nothing that plans have not told it: the tokens and the pages of every slot, and how to sample. All ranks
execute the same plans and gather the same logits, so all of them hold the same next tokens without exchanging them.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...comm.base import Communicator
from ..config import Config
from ..limits import Limits
from ..memory.gpu import Phase, Reading, named_out_of_memory, neighbours, plan_on_gpu, read_gpu
from ..memory.memory_plan import MemoryPlan, check_weights, loading_speed, plan_weights
from ..model.attention.attention import AttentionBackend, AttentionShape, TorchAttention, why_not
from ..model.attention.batch_invariant import BatchInvariantAttention
from ..model.batch import to_device, to_device_together
from ..model.decoder import Decoder
from ..model.kv_pool import KVPool, KVShape
from ..model.logits import Logits
from ..model.model_config import ModelConfig
from ..model.weights import fill_dummy, load_weights
from ..plan import Admission, PromptLogprobs, StepPlan, TokenLogprobs
from ..request import SamplingParams
from ..sampling.grammar import Vocabulary
from ..sampling.grammar_state import GrammarStates
from ..sampling.logprobs import prompt_logprobs
from ..sampling.sampler import Sampler
from ..startup_timer import StartupTimer
from .graphs import DecodeGraphs, GraphParts
from .slot_tables import HostBatch, SlotTables

log = logging.getLogger(__name__)
MAX_GRAPH_ROWS = 256  # larger decode steps run long enough to hide their launches


@dataclass(frozen=True)
class Sampled:
    """What one step brought: a token for each sampled row, log-probabilities for those that ask (on rank 0 only)."""

    tokens: np.ndarray  # [S] int32
    logprobs: dict[int, TokenLogprobs]
    failed: dict[int, str] = field(default_factory=dict)  # rows whose grammar cannot go on, and why
    prompts: dict[int, PromptLogprobs] = field(default_factory=dict)  # by row of the plan


class Runner:
    """`config` is resolved, `folder` holds the checkpoint; call `allocate` once before the first plan."""

    def __init__(
        self,
        config: Config,
        model: ModelConfig,
        folder: Path,
        comm: Communicator,
        device: torch.device,
        phases: StartupTimer | None = None,
    ) -> None:
        self.config, self.model, self.comm, self.device = config, model, comm, device
        self.phases = phases or StartupTimer()
        plan = plan_weights(config, model)
        self._memory = plan_on_gpu(plan, config, device) if device.type == "cuda" else plan
        check_weights(self._memory)
        self._graph_memory: torch.cuda.CUDAGraph | None = None
        assert config.max_model_len is not None
        with self._phase("weights"):
            decoder = Decoder(
                model,
                comm,
                dtype=config.torch_dtype,
                device=device,
                max_positions=config.max_model_len,
                batch_invariant=config.deterministic,
            )
            if config.load_format == "dummy":
                fill_dummy(decoder.weights())
            else:
                load_weights(decoder.weights(), folder)
        self.decoder = decoder
        self._vocabulary = Vocabulary(folder, model.vocab_size, model.eos_token_ids)
        log.info("weights: %s", loading_speed(self._memory.weights, self.phases.seconds["weights"]))

    def plan_memory(self) -> MemoryPlan:
        """What this rank needs, and the pages that there is room for; a group uses the least of its ranks' numbers.

        Where pages were asked for, these; `plan_limits` refuses what does not fit.
        """
        if self.device.type == "cuda":
            with self._phase("rehearsal"):
                self._memory = self._rehearse()
        self._memory = self._memory.with_pages(self.config)
        return self._memory

    def allocate(self, limits: Limits) -> None:
        """Take the memory that steps need: the KV cache, the tokens and pages of every slot, the graphs."""
        announce = self.comm.rank == 0
        with self._phase("KV cache"):
            self._make(limits.num_pages, limits.max_length, announce=announce)
        with self._phase("graphs"):
            self._capture(announce=announce)
        gc.collect()
        gc.freeze()  # torch leaves so many objects behind that a full collection would stop a step for 50 ms

    @torch.inference_mode()
    def _make(self, num_pages: int, max_length: int, *, announce: bool) -> None:
        config = self.config
        self.tables = SlotTables(config.max_num_seqs, max_length, config.page_size, self.device)
        self.pool = KVPool(self._kv_shape(), num_pages, self.device, config.kv_layout)
        self.sampler = Sampler(config.max_num_seqs, self.device)
        self.guides = GrammarStates(self._vocabulary, config.max_num_seqs)
        self._landing = PinnedReadback(config.max_num_seqs, self.comm, self.device)
        self._fast = self._attention_on_gpu(announce)
        self.attention: AttentionBackend = self._fast or TorchAttention(self.model.head_dim**-0.5)
        self.graphs: DecodeGraphs | None = None

    @torch.inference_mode()
    def _capture(self, *, announce: bool) -> None:
        """Capture the decode steps, where that can be done."""
        if self._fast is None:
            return
        reason = self._why_eager()
        if reason is None:
            parts = GraphParts(self.decoder, self.tables, self.pool, self._fast)
            rows = min(self.config.max_num_seqs, MAX_GRAPH_ROWS)
            self.graphs = DecodeGraphs(parts, rows, memory=self._graph_memory, show_progress=announce)
            self._graph_memory = self.graphs.memory
        elif announce:
            log.info("decode without CUDA graphs: %s", reason)

    def _why_eager(self) -> str | None:
        """The reason why decode steps cannot be captured, or None."""
        if self.config.enforce_eager:
            return "enforce_eager is set"
        return None if self.comm.capturable else f"{self.comm.description} cannot be captured"

    def _attention_on_gpu(self, announce: bool) -> AttentionBackend | None:
        """What can be captured in a graph: FlashInfer's and our own, where this rank can use them."""
        if self.config.attention_backend == "torch" or self.device.type != "cuda":
            return None
        config, model = self.config, self.model
        shape = AttentionShape(
            num_heads=model.num_heads // self.comm.size,
            num_kv_heads=self._kv_shape().num_kv_heads,
            head_dim=model.head_dim,
            page_size=config.page_size,
            dtype=config.torch_dtype,
        )
        reason = why_not(shape)
        if reason is not None:
            if config.deterministic:
                raise ValueError(f"deterministic=True cannot be honoured: {reason}; leave it out")
            if config.attention_backend == "flashinfer":
                raise ValueError(f"attention_backend='flashinfer' cannot be used: {reason}; use auto or torch")
            if announce:
                log.warning("attention through plain torch, slowly: %s", reason)
            return None
        windows = {model.window(layer) for layer in range(model.num_layers)}
        if config.deterministic:
            assert config.max_model_len is not None
            return BatchInvariantAttention(shape, model.head_dim**-0.5, windows, config.max_model_len)
        with self.phases("imports"):
            from ..model.attention import flashinfer_backend  # costs 5 s and needs a GPU

        return flashinfer_backend.FlashInferAttention(shape, model.head_dim**-0.5, windows, self.device)

    def _rehearse(self) -> MemoryPlan:
        """Take, and leave with torch's allocator, what the largest step and the graphs need besides the KV cache.

        Graphs know the KV cache by its address: those captured here show what they take, and are then captured again.
        """
        assert self.config.max_model_len is not None
        self._make(1, self.config.max_model_len, announce=False)
        self.launch(self._largest_step(self.config.max_model_len))()
        workspaces = self._read().used - self._memory.at_start - self._memory.weights
        gc.collect()  # as each capture does, too: what the largest step left would hide what the graphs take
        torch.cuda.empty_cache()
        before = self._read()
        self._capture(announce=False)
        torch.cuda.synchronize(self.device)
        plan = replace(
            self._memory,
            workspaces=max(0, workspaces),
            graphs=max(0, self._read().used - before.used),
            num_graphs=self.graphs.num_graphs if self.graphs else 0,
            graph_rows=self.graphs.max_rows if self.graphs else 0,
            neighbours=neighbours(self.device),
        )
        del self.tables, self.pool, self.graphs, self.attention, self._fast
        gc.collect()  # what a cycle keeps would be taken twice
        return plan

    def _largest_step(self, max_length: int) -> StepPlan:
        """As many tokens as one step may have, of as few requests as possible."""
        budget = self.config.max_num_batched_tokens
        counts: list[int] = []
        while budget > 0 and len(counts) < self.config.max_num_seqs:
            counts.append(min(budget, max_length - 1))  # the sampled token needs a place, too
            budget -= counts[-1]
        rows = np.arange(len(counts), dtype=np.int32)
        params = SamplingParams(seed=0, max_tokens=1)
        nothing = np.zeros(0, np.int32)
        admitted = [Admission(int(slot), nothing, 0, params, []) for slot in rows]
        # All pages are page 0: this computes nonsense of the right size.
        return StepPlan(0, admitted, rows, np.zeros_like(rows), np.array(counts, np.int32), rows, nothing)

    @contextmanager
    def _phase(self, name: Phase) -> Iterator[None]:
        """A part of the start: timed, and named by the error if the GPU runs out of memory in it."""
        with self.phases(name), named_out_of_memory(name, self._memory, self.device):
            yield

    def _read(self) -> Reading:
        return read_gpu(self.device, self.config.gpus_per_rank)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Callable[[], Sampled]:
        """Compute one step; every rank must launch the same plans in the same order.

        Returns a function that waits for the sampled tokens; on a GPU the step has only been queued by then.
        """
        self.tables.take_in(plan)
        for admission in plan.admitted:
            self.sampler.admit(admission)
            self.guides.admit(admission)
        host = self.tables.describe(plan)
        all_sample = len(plan.sampled_rows) == len(plan.counts)  # not so the first token of a longer chunk
        if self.graphs is not None and plan.is_decode_only and all_sample and len(plan.counts) <= self.graphs.max_rows:
            return self._replay(plan, self.graphs, host)
        batch = self.tables.batch(plan, host)
        self.attention.plan(batch)
        residual = self.decoder.forward(batch, self.pool, self.attention)
        self.guides.catch_up()
        sampled: Callable[[], Sampled] = lambda: Sampled(np.empty(0, np.int32), {})  # noqa: E731
        if len(plan.sampled_rows):
            last = self._to_device(host.query_starts[1:][plan.sampled_rows] - 1).long()
            sampled = self._sample(plan, self.decoder.logits(residual, last))
        widths, ends = self.sampler.prompt_logprobs[plan.slots], self.sampler.num_prompt_tokens[plan.slots]
        if not ((widths >= 0) & (plan.starts < ends - 1)).any():
            return sampled
        prompts = prompt_logprobs(self.decoder, residual, self.tables.tokens, plan, host, widths, ends)
        return lambda: replace(sampled(), prompts=prompts())

    def _replay(self, plan: StepPlan, graphs: DecodeGraphs, host: HostBatch) -> Callable[[], Sampled]:
        bounds, needs_all = self.sampler.bounds(host.slots, host.positions + 1), self.sampler.needs_all(host.slots)
        few = not needs_all and self.sampler.draws_among_few(host.slots)
        logits, chosen = graphs.run(host, bounds, draws_among_few=few)
        self.guides.catch_up()
        if needs_all:
            return self._sample(plan, logits)
        tokens = self._landing.fetch(chosen)
        return lambda: Sampled(tokens(), {})

    @property
    def overlaps(self) -> bool:
        """Whether the next step may be launched before the tokens of this one are waited for."""
        return self.config.overlap_scheduling and self.device.type == "cuda"

    def close(self) -> None:
        """End the group's communication; the memory goes with the runner."""
        self.graphs = None  # NCCL waits for graphs that hold its kernels
        self.comm.close()

    def _sample(self, plan: StepPlan, logits: Logits) -> Callable[[], Sampled]:
        slots = plan.slots[plan.sampled_rows]
        positions = (plan.starts + plan.counts)[plan.sampled_rows]
        wants_logprobs = self.comm.rank == 0 and bool((self.sampler.logprobs[slots] >= 0).any())
        if self.sampler.needs_all(slots):
            logits = logits.replicated()
        raw = logits.shard.clone() if wants_logprobs else logits.shard  # sampling may edit its logits
        guided = bool(self.guides.active[slots].any())
        failed = self.guides.mask(logits.shard, slots, positions) if guided else {}
        chosen = self.sampler.sample(logits, slots, positions, self.tables.tokens)
        owners, places = to_device_together((slots, positions - 1), self.device)
        self.tables.append(owners, places, chosen)
        logprobs = self.sampler.top_logprobs(raw, chosen, slots) if wants_logprobs else dict
        tokens = self._landing.fetch(chosen)
        if guided:
            self.guides.sent(slots, tokens)
        return lambda: Sampled(tokens(), logprobs(), failed)

    def _kv_shape(self) -> KVShape:
        return self.decoder.kv_shape(self.config.page_size, self.config.torch_dtype)

    def _to_device(self, array: np.ndarray) -> Tensor:
        return to_device(array, self.device)


class PinnedReadback:
    """Where sampled tokens arrive on the host: a few pinned buffers in turn, more than steps may be in flight."""

    def __init__(self, max_rows: int, comm: Communicator, device: torch.device) -> None:
        self._comm = comm
        self._cuda = device.type == "cuda"
        if self._cuda:
            buffers = torch.empty(3, max_rows, dtype=torch.int32, pin_memory=True)
            self._turns = cycle([(buffer, torch.cuda.Event()) for buffer in buffers])

    def fetch(self, tokens: Tensor) -> Callable[[], np.ndarray]:
        """Start copying tokens [S] int32 to the host; the returned function waits for them."""
        if not self._cuda:
            return tokens.numpy
        buffer, done = next(self._turns)
        landed = buffer[: len(tokens)].copy_(tokens, non_blocking=True)
        done.record()

        def wait() -> np.ndarray:
            self._comm.wait(done)
            return np.array(landed.numpy())

        return wait
