"""One step as tensors: the inputs of the decoder and the attention backend, made from a plan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...kernels import ops
from ..model.batch import Batch, to_device
from ..plan import StepPlan


@dataclass(frozen=True, kw_only=True)
class HostBatch:
    """The metadata of a step on the host, int32, per token [T] or per row [B]."""

    slots: np.ndarray  # [T]: the slot of each token
    positions: np.ndarray  # [T]
    kv_slots: np.ndarray  # [T]
    page_table: np.ndarray  # [B, P]
    query_starts: np.ndarray  # [B + 1]
    kv_lengths: np.ndarray  # [B]
    num_decoding: int


class SlotTables:
    """The tokens and pages of a rank's slots: tokens on the device, pages on the host and on the device.

    The pages on the device follow the steps: those of a step's rows are written before its layers run.
    """

    def __init__(self, num_slots: int, max_length: int, page_size: int, device: torch.device) -> None:
        self.page_size = page_size
        self.spare_slot = num_slots  # receives the writes of padding rows
        self.tokens = torch.zeros(num_slots + 1, max_length, dtype=torch.int32, device=device)
        self.pages = np.zeros((num_slots, -(-max_length // page_size)), np.int32)
        self.device_pages = torch.zeros(num_slots + 1, self.pages.shape[1], dtype=torch.int32, device=device)

    def update(self, plan: StepPlan) -> None:
        """Store the tokens of admitted requests, and the plan's page writes."""
        for admission in plan.admitted:
            tokens = torch.from_numpy(admission.tokens).to(self.tokens.device, non_blocking=True)
            self.tokens[admission.slot, : len(tokens)] = tokens
        slot, index, page = plan.page_writes.reshape(-1, 3).T
        self.pages[slot, index] = page

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
        kv_lengths = plan.starts + plan.counts
        return HostBatch(
            slots=slots,
            positions=positions,
            kv_slots=self.pages[slots, page] * self.page_size + offset,
            page_table=self.pages[plan.slots, : -(-int(kv_lengths.max()) // self.page_size)],
            query_starts=np.append(np.int32(0), ends),
            kv_lengths=kv_lengths,
            num_decoding=plan.num_decoding,
        )

    def batch(self, plan: StepPlan, host: HostBatch) -> Batch:
        """Return the step on the device, and write its rows' pages there."""
        packed = self._to_device(np.stack((host.slots, host.positions, host.kv_slots)))
        rows = self._to_device(plan.slots).long()
        self.device_pages[rows, : host.page_table.shape[1]] = self._to_device(host.page_table)
        slots, positions, kv_slots = packed.unbind(0)
        return self._batch(self.tokens[slots.long(), positions.long()], slots, positions, kv_slots, host)

    def decode_batch(self, slots: Tensor, positions: Tensor, kv_slots: Tensor, host: HostBatch) -> Batch:
        """Return a step of one token per row from device memory alone, each [B] int32; can be captured in a graph."""
        tokens = ops.begin_decode_(self.tokens, self.device_pages, slots, positions, kv_slots, self.page_size)
        return self._batch(tokens, slots, positions, kv_slots, host)

    def append(self, slots: Tensor, positions: Tensor, tokens: Tensor) -> None:
        """Write sampled tokens after `positions` of `slots`, all [S] int32: inputs of the next step."""
        ops.append_tokens_(self.tokens, slots, positions, tokens)

    def _batch(self, token_ids: Tensor, slots: Tensor, positions: Tensor, kv_slots: Tensor, host: HostBatch) -> Batch:
        return Batch(
            token_ids=token_ids,
            positions=positions,
            kv_slots=kv_slots,
            owners=slots,
            pages=self.device_pages,
            page_table=host.page_table,
            query_starts=host.query_starts,
            kv_lengths=host.kv_lengths,
            num_decoding=host.num_decoding,
        )

    def _to_device(self, array: np.ndarray) -> Tensor:
        return to_device(array, self.tokens.device)
