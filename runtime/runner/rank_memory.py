"""All memory that one rank's steps read and write; its tables turn a plan into the inputs of the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch
from torch import Tensor

from ...comm.base import Communicator
from ...kernels import ops
from ...kernels.arguments import StateRows
from ..model.attention.backend import AttentionBackend
from ..model.batch import Batch, HostBatch, copy_to_device, to_device
from ..model.decoder import Decoder
from ..model.kv_pool import KVPool
from ..model.state_pool import StatePool
from ..plan import StepPlan
from ..sampling.grammar_state import GrammarStates
from ..sampling.sampler import Sampler

NUM_BUFFERS = 3  # more buffers than steps can be in flight


class SlotTables:
    """The tokens of a rank's slots, on the device, and their page tables, on the host and on the device.

    There is a page table for each group of layers. Those of the device follow the steps: the entries of a step's rows
    are written before its layers run.
    """

    def __init__(
        self,
        num_slots: int,
        max_length: int,
        page_size: int,
        device: torch.device,
        *,
        num_tables: int = 1,
        has_states: bool = False,
    ) -> None:
        self.page_size, self.num_tables, self._has_states = page_size, num_tables, has_states
        self.spare_slot = num_slots  # receives the writes of padding rows
        self.tokens = torch.zeros(num_slots + 1, max_length, dtype=torch.int32, device=device)
        pages_per_slot = -(-max_length // page_size)
        tables = num_tables, num_slots, pages_per_slot
        self.host_page_table = np.zeros(tables, np.int32)
        self._host_pages = self.host_page_table.reshape(num_tables, -1)
        self.device_page_table = torch.zeros(
            num_tables, num_slots + 1, pages_per_slot, dtype=torch.int32, device=device
        )
        self._device_tables = self.device_page_table.unbind(0)
        self._num_cached = np.zeros(num_slots, np.int32)
        self._row_starts = torch.arange(
            num_slots + 2, dtype=torch.int32, device=device
        )  # the first token of each row, for rows of one token

    def update(self, plan: StepPlan) -> None:
        """Store the tokens of admitted requests, and the plan's page writes."""
        for admission in plan.admitted:
            copy_to_device(admission.tokens, self.tokens[admission.slot, : len(admission.tokens)])
            self._num_cached[admission.slot] = admission.num_cached
        slot, index, *pages = plan.page_writes.reshape(-1, 2 + self.num_tables).T
        self.host_page_table[:, slot, index] = pages

    def host_batch(self, plan: StepPlan) -> HostBatch:
        """Return the plan's rows, token by token."""
        ends = np.cumsum(plan.counts, dtype=np.int32)
        if plan.is_decode_only:  # one token each
            slots, positions = plan.slots, plan.starts
        else:
            slots = np.repeat(plan.slots, plan.counts)
            before = ends - plan.counts - plan.starts
            positions = np.arange(ends[-1], dtype=np.int32) - np.repeat(before, plan.counts)
        page, offset = np.divmod(positions, self.page_size)
        places = slots * self.host_page_table.shape[2] + page
        kv_slots = self._host_pages.take(places, axis=1) * self.page_size + offset
        if self._has_states and not plan.is_decode_only:
            # A part of a cached prefix may be computed again for its recurrent state; its keys are stored already.
            kv_slots[:, positions < self._num_cached[slots]] = -1
        kv_lengths = plan.starts + plan.counts
        return HostBatch(
            slots=slots,
            positions=positions,
            kv_slots=kv_slots,
            page_table=self.host_page_table[:, plan.slots, : -(-int(kv_lengths.max()) // self.page_size)],
            query_starts=np.append(np.int32(0), ends),
            kv_lengths=kv_lengths,
            num_decoding=plan.num_decoding,
        )

    def batch(self, plan: StepPlan, host: HostBatch) -> Batch:
        """Return the step on the device, and write its rows' page tables there."""
        device = self.tokens.device
        packed = to_device(np.stack((host.slots, host.positions, *host.kv_slots)), device)
        rows = to_device(plan.slots, device)
        for table, pages in zip(self._device_tables, to_device(host.page_table, device), strict=True):
            table[rows.long(), : pages.shape[1]] = pages
        slots, positions, *kv_slots = packed.unbind(0)
        ids = self.tokens[slots.long(), positions.long()]
        return self._batch(ids, slots, positions, kv_slots, host, self._state_rows(rows, plan, host))

    def decode_batch(self, slots: Tensor, positions: Tensor, kv_slots: Tensor, host: HostBatch) -> Batch:
        """Return a step of one token per row from device memory alone; can be captured in a graph.

        slots, positions  [B] int32
        kv_slots          [G, B] int32
        """
        for table, table_slots in zip(self._device_tables, kv_slots, strict=True):
            ids = ops.begin_decode_(self.tokens, table, slots, positions, table_slots, self.page_size)
        return self._batch(
            ids, slots, positions, kv_slots.unbind(0), host, StateRows(slots, self._row_starts[: len(slots) + 1])
        )

    def append(self, slots: Tensor, positions: Tensor, tokens: Tensor) -> None:
        """Write sampled tokens after `positions` of `slots`, all [S] int32: inputs of the next step."""
        ops.append_tokens_(self.tokens, slots, positions, tokens)

    def _state_rows(self, rows: Tensor, plan: StepPlan, host: HostBatch) -> StateRows | None:
        if not self._has_states:
            return None
        device, saves = self.tokens.device, plan.state_saves
        on_device = to_device(saves.reshape(-1, 2, 2), device) if len(saves) else None
        return StateRows(rows, to_device(host.query_starts, device), on_device, host.num_decoding)

    def _batch(
        self,
        ids: Tensor,
        slots: Tensor,
        positions: Tensor,
        kv_slots: Sequence[Tensor],
        host: HostBatch,
        rows: StateRows | None,
    ) -> Batch:
        return Batch(
            token_ids=ids,
            positions=positions,
            kv_slots=kv_slots,
            page_table_rows=slots,
            device_page_table=self._device_tables,
            host=host,
            state_rows=rows,
        )


@dataclass
class TokenCopy:
    """A copy of sampled tokens to the host."""

    tokens: Tensor  # [S] int32, on the host
    comm: Communicator
    done: torch.cuda.Event | None  # None: the tokens are on the host

    def wait(self) -> np.ndarray:
        """Return the tokens [S] int32; raises CommError if a collective before them does not end in time."""
        if self.done is None:
            return self.tokens.numpy()
        self.comm.wait(self.done)
        return np.array(self.tokens.numpy())


class PinnedReadback:
    """Copies of sampled tokens to the host, through a few pinned buffers in rotation."""

    def __init__(self, max_rows: int, comm: Communicator, device: torch.device) -> None:
        self._comm = comm
        self._cuda = device.type == "cuda"
        if self._cuda:
            buffers = torch.empty(NUM_BUFFERS, max_rows, dtype=torch.int32, pin_memory=True)
            self._rotation = cycle([(buffer, torch.cuda.Event()) for buffer in buffers])

    def start(self, tokens: Tensor) -> TokenCopy:
        """Start copying tokens [S] int32 to the host."""
        if not self._cuda:
            return TokenCopy(tokens, self._comm, None)
        buffer, done = next(self._rotation)
        copy = buffer[: len(tokens)].copy_(tokens, non_blocking=True)
        done.record()
        return TokenCopy(copy, self._comm, done)


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Weights, KV cache and the state of every slot. CUDA graphs know these tensors by address."""

    decoder: Decoder
    attention: AttentionBackend
    pool: KVPool
    states: StatePool | None  # None for a model without recurrent layers
    tables: SlotTables
    sampler: Sampler
    grammars: GrammarStates
    readback: PinnedReadback

    @property
    def device(self) -> torch.device:
        return self.tables.tokens.device
