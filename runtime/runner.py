"""One rank's model and memory: turns each plan into tensors, logits and next tokens.

A runner holds nothing that plans have not told it: the tokens and the pages of every slot, and how to sample. All ranks
execute the same plans and gather the same logits, so all of them hold the same next tokens without exchanging them.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..comm.base import Communicator
from .batch import Batch
from .cache.pool import KVPool, KVShape
from .config import Config
from .model.attention import TorchAttention
from .model.config import ModelConfig
from .model.decoder import Decoder
from .model.weights import fill_dummy, load_weights
from .plan import StepPlan, TokenLogprobs
from .sampler import Sampler
from .scheduler import Limits

log = logging.getLogger(__name__)
GIB = 2**30
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
        free, total = torch.cuda.mem_get_info(self.device)
        if config.gpus_per_rank < 1:  # the others' memory comes and goes while this is measured: keep to a share
            share = config.gpu_memory_utilization * config.gpus_per_rank * total
            return int(share - torch.cuda.memory_reserved(self.device)) // page_bytes
        return int(free - (1 - config.gpu_memory_utilization) * total) // page_bytes

    @torch.inference_mode()
    def allocate(self, limits: Limits) -> None:
        """Take the memory that steps need: the KV cache, and the tokens and pages of every slot."""
        n, pages_per_seq = limits.max_num_seqs, -(-limits.max_length // limits.page_size)
        self.limits = limits
        self.pool = KVPool(self._kv_shape(), limits.num_pages, self.device, self.config.kv_layout)
        self.attention = TorchAttention(self.model.head_dim**-0.5)
        self.sampler = Sampler(n, self.device)
        self.tokens = torch.zeros(n, limits.max_length, dtype=torch.int32, device=self.device)
        self.page_table = np.zeros((n, pages_per_seq), np.int32)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> Sampled:
        """Compute one step; every rank must execute the same plans in the same order."""
        self._take_in(plan)
        batch = self.make_batch(plan)
        self.attention.plan(batch)
        hidden = self.decoder.forward(batch, self.pool, self.attention)
        if len(plan.sampled_rows) == 0:
            return Sampled(np.empty(0, np.int32), {})
        return self._sample(plan, self.decoder.logits(hidden[batch.sampled_tokens]))

    def make_batch(self, plan: StepPlan) -> Batch:
        """The plan's rows as tensors on the device; metadata is computed on the host, once for all layers."""
        ends = np.cumsum(plan.counts, dtype=np.int32)
        starts = ends - plan.counts
        within = np.arange(ends[-1], dtype=np.int32) - np.repeat(starts, plan.counts)
        positions = np.repeat(plan.starts, plan.counts) + within
        slots = np.repeat(plan.slots, plan.counts)
        size = self.limits.page_size
        kv_slots = self.page_table[slots, positions // size] * size + positions % size
        kv_lengths = plan.starts + plan.counts
        pages = self.page_table[plan.slots, : -(-int(kv_lengths.max()) // size)]
        where = self._to_device(slots), self._to_device(positions)
        return Batch(
            token_ids=self.tokens[where[0].long(), where[1].long()],
            positions=where[1],
            kv_slots=self._to_device(kv_slots),
            page_table=self._to_device(pages),
            query_starts=np.append(np.int32(0), ends),
            kv_lengths=kv_lengths,
            sampled_tokens=self._to_device(ends[plan.sampled_rows] - 1).long(),
        )

    def close(self) -> None:
        """End the group's communication; the memory goes with the runner."""
        self.comm.close()

    def _take_in(self, plan: StepPlan) -> None:
        """Bring the slots up to date: new requests and new pages."""
        for admission in plan.admitted:
            self.tokens[admission.slot, : len(admission.tokens)] = self._to_device(admission.tokens)
            self.sampler.admit(admission)
        slot, index, page = plan.page_writes.reshape(-1, 3).T
        self.page_table[slot, index] = page

    def _sample(self, plan: StepPlan, logits: Tensor) -> Sampled:
        slots = plan.slots[plan.sampled_rows]
        positions = (plan.starts + plan.counts)[plan.sampled_rows]
        wants_logprobs = self.comm.rank == 0 and bool((self.sampler.logprobs[slots] >= 0).any())
        raw = logits.clone() if wants_logprobs else logits  # sampling may edit its logits
        chosen = self.sampler.sample(logits, slots, positions, self.tokens)
        self.tokens[self._to_device(slots).long(), self._to_device(positions).long()] = chosen.to(torch.int32)
        logprobs = self.sampler.top_logprobs(raw, chosen, slots) if wants_logprobs else {}
        return Sampled(chosen.cpu().numpy().astype(np.int32), logprobs)

    def _kv_shape(self) -> KVShape:
        return self.decoder.kv_shape(self.config.page_size, self.config.torch_dtype)

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)
