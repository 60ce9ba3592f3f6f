"""State of the running requests, in NumPy arrays indexed by slot.

A decode step costs the same few array operations for one request as for hundreds. Only requests that begin, end or
fill a page are handled one at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..limits import Limits
from ..request import Request
from .prefix_cache import NO_PAGES, Node

NO_SLOTS = np.empty(0, dtype=np.int32)


class PromptChunk(NamedTuple):
    """The next tokens of a prompt that one step computes."""

    slot: int
    num_tokens: int


class Slots:
    """`limits.max_num_seqs` slots, each free or held by one request."""

    def __init__(self, limits: Limits, root: Node) -> None:
        n, self._page_size = limits.max_num_seqs, limits.page_size
        self.running = NO_SLOTS  # [R] int32: the slots in use, in order of arrival
        self.requests: list[Request | None] = [None] * n
        self.prefix_nodes: list[Node] = [root] * n  # locked end of the prefix that the slot shares with the tree
        self.tokens = np.zeros((n, limits.max_length), np.int32)
        self.page_table = np.zeros((n, limits.pages_for(limits.max_length)), np.int32)
        self.uid, self.client = np.zeros(n, np.int64), np.zeros(n, np.int64)
        self.num_by_client: dict[int, int] = {}  # slots of each client that has any
        self.last_step = np.zeros(n, np.int64)  # the last step that computed a token of the slot
        self.admission_id = np.full(n, -1, np.int64)  # unique per admission; -1 in a free slot
        # In tokens. num_computed: KV scheduled; num_known: ids on the host; length: num_known plus those being sampled.
        self.num_computed, self.num_known, self.length, self.max_length = (np.zeros(n, np.int32) for _ in range(4))
        self.min_length = np.zeros(n, np.int32)  # up to this length no stop id ends the request
        self.num_pages = np.zeros(n, np.int32)  # entries of the page table that are in use
        self.num_shared_pages = np.zeros(n, np.int32)  # leading entries that the tree owns, or that are freed
        self.num_freed_pages = np.zeros(n, np.int32)  # leading entries that no layer sees any more, and that are freed
        self.num_tables = limits.num_tables
        self.num_unseen_pages = np.zeros(n, np.int32)  # leading entries without pages of layers with a window
        self.stop_ids = np.full((n, 1), -1, np.int32)  # padded with -1
        self.free = list(range(n - 1, -1, -1))
        self._num_admissions = 0
        self._page_writes: list[np.ndarray] = []  # [n, 2 + G] int32 each: (slot, index, page of each table)

    def acquire(self, request: Request, node: Node, num_computed: int, max_length: int) -> int:
        """Return a slot that `request` now holds, without pages.

        node          end of the request's cached prefix, locked
        num_computed  tokens of the prefix that are not computed again
        max_length    longest prompt plus output, in tokens
        """
        slot, num_tokens = self.free.pop(), len(request.tokens)
        self.running = np.append(self.running, np.int32(slot))
        self.requests[slot] = request
        self.prefix_nodes[slot] = node
        self.uid[slot], self.client[slot] = request.uid, request.client
        self.num_by_client[request.client] = self.num_by_client.get(request.client, 0) + 1
        self.admission_id[slot] = self._num_admissions
        self._num_admissions += 1
        self.tokens[slot, :num_tokens] = request.tokens
        self.num_known[slot] = self.length[slot] = num_tokens
        self.num_computed[slot] = num_computed
        self.max_length[slot] = max_length
        # A grammar that has nothing to add ends before min_tokens; until then its mask excludes stop ids.
        min_tokens = 0 if request.params.structured_outputs is not None else request.params.min_tokens
        self.min_length[slot] = request.num_prompt_tokens + min_tokens
        self._set_stop_ids(slot, request.stop_ids)
        for numbers in (self.num_pages, self.num_shared_pages, self.num_freed_pages, self.num_unseen_pages):
            numbers[slot] = 0
        return slot

    def release(self, slot: int) -> None:
        """Free the slot; its pages are the caller's to release."""
        client = int(self.client[slot])
        self.num_by_client[client] -= 1
        if self.num_by_client[client] == 0:
            del self.num_by_client[client]
        self.requests[slot] = None
        self.admission_id[slot] = -1
        self.running = self.running[self.running != slot]
        self.free.append(slot)

    def newest_of(self, client: int) -> int:
        """Return the slot of the newest running request of a client."""
        return int(self.running[self.client[self.running] == client][-1])

    def pages_by_client(self) -> dict[int, int]:
        """Return the pages of each client with several slots; a page that slots share counts for each of them."""
        clients, slots = np.unique(self.client[self.running], return_inverse=True)
        kept = (self.num_pages - self.num_freed_pages)[self.running]
        if self.num_tables > 1:
            kept = kept + (self.num_tables - 1) * (self.num_pages - self.num_unseen_pages)[self.running]
        pages = np.bincount(slots, kept).astype(int)
        held = dict(zip(clients.tolist(), pages.tolist(), strict=True))
        return {client: num_pages for client, num_pages in held.items() if self.num_by_client[client] > 1}

    def append_pages(self, slot: int, pages: np.ndarray, others: np.ndarray | None = None) -> None:
        """Add `pages` [n] int32 to the end of one slot's page table; `others` [n, G - 1] to its other tables."""
        start = int(self.num_pages[slot])
        indices = np.arange(start, start + len(pages), dtype=np.int32)
        self.page_table[slot, indices] = pages
        self.num_pages[slot] += len(pages)
        self._record_writes(np.full(len(pages), slot, np.int32), indices, pages, others)

    def append_page_each(self, slots: np.ndarray, pages: np.ndarray, others: np.ndarray | None = None) -> None:
        """Add pages[i] to the page table of slots[i], and others[i] to its other ones; `slots` [n] are distinct."""
        indices = self.num_pages[slots]
        self.page_table[slots, indices] = pages
        self.num_pages[slots] += 1
        self._record_writes(slots, indices, pages, others)

    def take_page_writes(self) -> np.ndarray:
        """Return the changes of the page table since the last call, as StepPlan.page_writes."""
        writes, self._page_writes = self._page_writes, []
        return np.concatenate(writes).ravel() if writes else NO_PAGES

    def _record_writes(
        self, slots: np.ndarray, indices: np.ndarray, pages: np.ndarray, others: np.ndarray | None
    ) -> None:
        if len(pages):
            columns = (slots, indices, pages) if others is None else (slots, indices, pages, *others.T)
            self._page_writes.append(np.stack(columns, axis=1).astype(np.int32))

    def _set_stop_ids(self, slot: int, ids: list[int]) -> None:
        missing = len(ids) - self.stop_ids.shape[1]
        if missing > 0:
            self.stop_ids = np.pad(self.stop_ids, ((0, 0), (0, missing)), constant_values=-1)
        self.stop_ids[slot] = -1
        self.stop_ids[slot, : len(ids)] = ids
