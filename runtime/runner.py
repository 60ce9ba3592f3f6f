"""One rank's model and memory: turns each plan into tensors, logits and next tokens.

A runner holds nothing that plans have not told it: the tokens and the pages of every slot, and how to sample. All ranks
execute the same plans and gather the same logits, so all of them hold the same next tokens without exchanging them.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..comm.base import Communicator
from .batch import HostBatch, SlotTables
from .cache.pool import KVPool, KVShape
from .config import Config
from .graphs import DecodeGraphs, GraphAttention, GraphParts
from .model.attention import AttentionBackend, TorchAttention
from .model.config import ModelConfig
from .model.decoder import Decoder
from .model.weights import fill_dummy, load_weights
from .plan import Admission, StepPlan, TokenLogprobs
from .request import SamplingParams
from .sampler import Sampler
from .scheduler import Limits

log = logging.getLogger(__name__)
GIB = 2**30
MAX_GRAPH_ROWS = 256  # larger decode steps run long enough to hide their launches
CPU_KV_CACHE_GIB = 1.0  # unless kv_cache_memory says otherwise: a host's memory is not ours to fill


@dataclass(frozen=True)
class Sampled:
    """What one step brought: a token for each sampled row, log-probabilities for those that ask (on rank 0 only)."""

    tokens: np.ndarray  # [S] int32
    logprobs: dict[int, TokenLogprobs]


class Runner:
    """`config` is resolved, `folder` holds the checkpoint; call `allocate` once before the first plan."""

    def __init__(
        self, config: Config, model: ModelConfig, folder: Path, comm: Communicator, device: torch.device
    ) -> None:
        self.config, self.model, self.comm, self.device = config, model, comm, device
        assert config.max_model_len is not None
        started = time.perf_counter()
        self.decoder = Decoder(model, comm, dtype=config.torch_dtype, device=device, max_positions=config.max_model_len)
        if config.load_format == "dummy":
            fill_dummy(self.decoder.weights())
        else:
            load_weights(self.decoder.weights(), folder)
        self.weight_bytes = sum(w.tensor.nbytes for w in self.decoder.weights())
        log.info("weights: %.2f GiB in %.1f s", self.weight_bytes / GIB, time.perf_counter() - started)

    def num_pages(self) -> int:
        """How many pages of KV cache this rank has memory for; the group uses the least of its ranks."""
        config, page_bytes = self.config, self._kv_shape().page_bytes
        if config.num_pages is not None:
            return config.num_pages
        if config.kv_cache_memory is not None:
            return int(config.kv_cache_memory * GIB) // page_bytes
        assert config.max_model_len is not None
        pages_per_seq = -(-config.max_model_len // config.page_size)
        if self.device.type == "cpu":
            wanted = config.max_num_seqs * pages_per_seq
            return min(wanted, max(int(CPU_KV_CACHE_GIB * GIB) // page_bytes, pages_per_seq))
        self._rehearse(config.max_model_len)
        free, total = torch.cuda.mem_get_info(self.device)
        if config.gpus_per_rank < 1:  # the others' memory comes and goes while this is measured: keep to a share
            share = config.gpu_memory_utilization * config.gpus_per_rank * total
            return int(share - torch.cuda.memory_reserved(self.device)) // page_bytes
        return int(free - (1 - config.gpu_memory_utilization) * total) // page_bytes

    def allocate(self, limits: Limits) -> None:
        """Take the memory that steps need: the KV cache, the tokens and pages of every slot, the graphs."""
        self._make(limits.num_pages, limits.max_length, announce=self.comm.rank == 0)
        gc.collect()
        gc.freeze()  # torch leaves so many objects behind that a full collection would stop a step for 50 ms

    @torch.inference_mode()
    def _make(self, num_pages: int, max_length: int, *, announce: bool) -> None:
        config = self.config
        self.tables = SlotTables(config.max_num_seqs, max_length, config.page_size, self.device)
        self.pool = KVPool(self._kv_shape(), num_pages, self.device, config.kv_layout)
        self.sampler = Sampler(config.max_num_seqs, self.device)
        fast = self._flashinfer(announce)
        self.attention: AttentionBackend = fast or TorchAttention(self.model.head_dim**-0.5)
        self.graphs: DecodeGraphs | None = None
        reason = self._why_eager()
        if fast is not None and reason is None:
            parts = GraphParts(self.decoder, self.tables, self.pool, fast)
            self.graphs = DecodeGraphs(parts, min(config.max_num_seqs, MAX_GRAPH_ROWS), show_progress=announce)
        elif fast is not None and announce:
            log.info("decode without CUDA graphs: %s", reason)

    def _why_eager(self) -> str | None:
        """The reason why decode steps cannot be captured, or None."""
        if self.config.enforce_eager:
            return "enforce_eager is set"
        if self.model.experts is not None:
            return "the experts of this model are dispatched by the host"
        return None if self.comm.capturable else f"{self.comm.description} cannot be captured"

    def _flashinfer(self, announce: bool) -> GraphAttention | None:
        """FlashInfer's attention, where this rank can use it."""
        if self.config.attention_backend == "torch" or self.device.type != "cuda":
            return None
        from .model import flashinfer  # costs 5 s and needs a GPU

        config, model = self.config, self.model
        shape = flashinfer.AttentionShape(
            num_heads=model.num_heads // self.comm.size,
            num_kv_heads=self._kv_shape().num_kv_heads,
            head_dim=model.head_dim,
            page_size=config.page_size,
            dtype=config.torch_dtype,
        )
        reason = flashinfer.why_not(shape)
        if reason is not None:
            if config.attention_backend == "flashinfer":
                raise ValueError(f"attention_backend='flashinfer' cannot be used: {reason}; use auto or torch")
            if announce:
                log.warning("attention through plain torch, slowly: %s", reason)
            return None
        windows = {model.window(layer) for layer in range(model.num_layers)}
        return flashinfer.FlashInferAttention(shape, model.head_dim**-0.5, windows, self.device)

    def _rehearse(self, max_length: int) -> None:
        """Take, and leave with torch's allocator, what the largest step and the graphs need besides the KV cache."""
        budget = self.config.max_num_batched_tokens
        self._make(1, max_length, announce=False)
        counts: list[int] = []
        while budget > 0 and len(counts) < self.config.max_num_seqs:
            counts.append(min(budget, max_length - 1))  # the sampled token needs a place, too
            budget -= counts[-1]
        rows = np.arange(len(counts), dtype=np.int32)
        params = SamplingParams(seed=0, max_tokens=1)
        nothing = np.zeros(0, np.int32)
        admitted = [Admission(int(slot), nothing, 0, params, []) for slot in rows]
        # All pages are page 0: this computes nonsense of the right size.
        self.launch(StepPlan(0, admitted, rows, np.zeros_like(rows), np.array(counts, np.int32), rows, nothing))()
        del self.tables, self.pool, self.graphs, self.attention
        torch.cuda.synchronize(self.device)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Callable[[], Sampled]:
        """Compute one step; every rank must launch the same plans in the same order.

        Returns a function that waits for the sampled tokens; on a GPU the step has only been queued by then.
        """
        self.tables.take_in(plan)
        for admission in plan.admitted:
            self.sampler.admit(admission)
        host = self.tables.describe(plan)
        if self.graphs is not None and len(host.slots) == len(plan.sampled_rows) <= self.graphs.max_rows:
            return self._replay(plan, self.graphs, host)
        batch = self.tables.batch(host)
        self.attention.plan(batch)
        hidden = self.decoder.forward(batch, self.pool, self.attention)
        if len(plan.sampled_rows) == 0:
            return lambda: Sampled(np.empty(0, np.int32), {})
        last = self._to_device(host.query_starts[1:][plan.sampled_rows] - 1).long()
        return self._sample(plan, self.decoder.logits(hidden[last]))

    def _replay(self, plan: StepPlan, graphs: DecodeGraphs, host: HostBatch) -> Callable[[], Sampled]:
        logits, chosen = graphs.run(host, *self.sampler.race_inputs(host.slots, host.positions + 1))
        if not self.sampler.is_plain(host.slots):
            return self._sample(plan, logits)
        tokens = _fetch(chosen.to(torch.int32))
        return lambda: Sampled(tokens(), {})

    @property
    def overlaps(self) -> bool:
        """Whether the next step may be launched before the tokens of this one are waited for."""
        return self.config.overlap_scheduling and self.device.type == "cuda"

    def close(self) -> None:
        """End the group's communication; the memory goes with the runner."""
        self.comm.close()

    def _sample(self, plan: StepPlan, logits: Tensor) -> Callable[[], Sampled]:
        slots = plan.slots[plan.sampled_rows]
        positions = (plan.starts + plan.counts)[plan.sampled_rows]
        wants_logprobs = self.comm.rank == 0 and bool((self.sampler.logprobs[slots] >= 0).any())
        raw = logits.clone() if wants_logprobs else logits  # sampling may edit its logits
        chosen = self.sampler.sample(logits, slots, positions, self.tables.tokens)
        self.tables.append(self._to_device(slots).long(), self._to_device(positions).long(), chosen)
        logprobs = self.sampler.top_logprobs(raw, chosen, slots) if wants_logprobs else dict
        tokens = _fetch(chosen.to(torch.int32))
        return lambda: Sampled(tokens(), logprobs())

    def _kv_shape(self) -> KVShape:
        return self.decoder.kv_shape(self.config.page_size, self.config.torch_dtype)

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)


def _fetch(tensor: Tensor) -> Callable[[], np.ndarray]:
    """Start copying to the host; the returned function waits for it."""
    if tensor.device.type == "cpu":
        return tensor.numpy
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> np.ndarray:
        done.synchronize()
        return copy.numpy()

    return wait
