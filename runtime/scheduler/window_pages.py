"""The pages of layers with a window, for models in which other layers see all keys.

The layers with a window are in k groups. A block is k pages: the keys and values of one page of tokens in these layers.
A slot holds the blocks that its next token sees, and those behind it. A block also belongs to a page of the prefix
cache, if that has the same tokens. It is idle if no slot holds it, and then given up when others need pages, the least
recently used first. A cached prefix can be continued where all blocks are left that its next token sees.

    tokens       |----------- cached prefix ------------|-- not cached --|
    full layers  all pages are in the tree               pages of the slot
    with window                      |-- blocks seen  --|-- blocks       |

Blocks are known by their first page. Ideas: vLLM's hybrid KV cache manager, with a page of the tree as the key.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from ..limits import Limits
from .prefix_cache import PagePool
from .slots import Slots

NONE = -1


class BlockPool(PagePool):
    """A PagePool that also has blocks, and gives up idle ones or cached pages, whichever were used less recently."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits.num_pages, limits.page_size)
        self.block_size = limits.num_window_groups  # pages
        n = limits.num_pages
        self._pages = np.zeros((n, self.block_size), np.int32)  # of each block
        self._block_of = np.full(n, NONE, np.int32)  # the block of each page of the tree
        self._page_of = np.full(n, NONE, np.int32)  # the page of the tree that each block belongs to
        self._num_users = np.zeros(n, np.int32)  # slots that hold each block
        self.num_idle = 0  # blocks
        self._idle: deque[tuple[int, int, np.ndarray]] = deque()  # (time, number, blocks), oldest first; may be stale
        self._idle_number = np.zeros(n, np.int64)  # the entry of _idle that each block is in
        self._num_entries = 0
        self._num_queued = 0  # blocks in _idle, also stale ones

    @property
    def num_available(self) -> int:
        return super().num_available + self.block_size * self.num_idle

    def allocate_blocks(self, n: int) -> np.ndarray:
        """Return n blocks [n] int32, each held once; n * block_size pages must be available."""
        pages = self.allocate(n * self.block_size).reshape(n, self.block_size)
        blocks: np.ndarray = pages[:, 0].copy()
        self._pages[blocks] = pages
        self._num_users[blocks] = 1
        return blocks

    def pages_of(self, blocks: np.ndarray) -> np.ndarray:
        """Return the pages [n, k] int32 of blocks [n]; any pages for NONE."""
        pages: np.ndarray = self._pages[np.maximum(blocks, 0)]
        return pages

    def blocks_of(self, pages: np.ndarray) -> np.ndarray:
        """Return the blocks [n] int32 that belong to pages of the tree; NONE for none."""
        blocks: np.ndarray = self._block_of[pages]
        return blocks

    def count_idle(self, blocks: np.ndarray) -> int:
        """Return how many of these blocks no slot holds."""
        return int((self._num_users[blocks] == 0).sum())

    def hold(self, blocks: np.ndarray) -> None:
        """Add a user to blocks of the prefix cache."""
        self.num_idle -= self.count_idle(blocks)
        self._num_users[blocks] += 1

    def assign(self, blocks: np.ndarray, pages: np.ndarray) -> None:
        """Let held blocks belong to pages of the tree with the same tokens, unless these have blocks."""
        lacking = self._block_of[pages] == NONE
        self._block_of[pages[lacking]] = blocks[lacking]
        self._page_of[blocks[lacking]] = pages[lacking]

    def drop(self, blocks: np.ndarray) -> None:
        """Remove a user for each occurrence of a block; those without a user are idle or free."""
        np.subtract.at(self._num_users, blocks, 1)
        unused = np.unique(blocks[self._num_users[blocks] == 0])
        cached = self._page_of[unused] != NONE
        self.release(self._pages[unused[~cached]].ravel())
        self._queue(unused[cached])

    def _make_free(self, n: int) -> None:
        enough = self.num_free + n
        while self.num_free < enough:
            missing, node = enough - self.num_free, self.tree.oldest()
            if node is None or (self.num_idle and self._oldest_idle() <= node.last_used):
                self._give_up_idle(-(-missing // self.block_size))
            else:
                pages = self.tree.evict_end(node, missing)
                self._give_up(self._block_of[pages])
                self.release(pages)

    def _queue(self, blocks: np.ndarray) -> None:
        if len(blocks) == 0:
            return
        self._num_entries += 1
        self._idle_number[blocks] = self._num_entries
        self._idle.append((self.tree.now, self._num_entries, blocks))
        self.num_idle += len(blocks)
        self._num_queued += len(blocks)
        if self._num_queued > 2 * self.num_idle + 1024:
            current = ((time, number, self._still_idle(number, old)) for time, number, old in self._idle)
            self._idle = deque(entry for entry in current if len(entry[2]))
            self._num_queued = self.num_idle

    def _still_idle(self, number: int, blocks: np.ndarray) -> np.ndarray:
        is_idle = (self._idle_number[blocks] == number) & (self._num_users[blocks] == 0)
        idle: np.ndarray = blocks[is_idle & (self._page_of[blocks] != NONE)]
        return idle

    def _oldest_idle(self) -> int:
        """Return the time since which the first blocks of the queue are idle; there are idle blocks."""
        while True:
            time, number, blocks = self._idle.popleft()
            self._num_queued -= len(blocks)
            if len(blocks := self._still_idle(number, blocks)):
                self._idle.appendleft((time, number, blocks))
                self._num_queued += len(blocks)
                return time

    def _give_up_idle(self, n: int) -> None:
        """Free up to n of the blocks that have been idle for the longest time."""
        self._oldest_idle()
        time, number, blocks = self._idle.popleft()
        self._num_queued -= len(blocks)
        if len(blocks) > n:
            self._idle.appendleft((time, number, blocks[n:]))
            self._num_queued += len(blocks) - n
        self._give_up(blocks[:n])

    def _give_up(self, blocks: np.ndarray) -> None:
        """Let blocks belong to no page of the tree; free the idle ones. Some may be NONE."""
        blocks = blocks[blocks != NONE]
        self._block_of[self._page_of[blocks]] = NONE
        self._page_of[blocks] = NONE
        idle = blocks[self._num_users[blocks] == 0]
        self.num_idle -= len(idle)
        self.release(self._pages[idle].ravel())


class WindowPages:
    """The blocks of the slots."""

    def __init__(self, limits: Limits, slots: Slots, pool: BlockPool) -> None:
        self._limits, self._slots, self._pool = limits, slots, pool
        self._table = np.full_like(slots.page_table, NONE)  # the blocks of each slot

    def usable(self, pages: np.ndarray) -> int:
        """Return how many of the pages of a cached prefix can be used: as many as have the blocks that are seen."""
        has_block = self._pool.blocks_of(pages) != NONE
        index = np.arange(len(pages))
        last_missing = np.maximum.accumulate(np.where(has_block, NONE, index))
        usable = np.flatnonzero(last_missing < self._first_seen(index + 1))
        return int(usable[-1]) + 1 if len(usable) else 0

    def seen_of(self, pages: np.ndarray) -> np.ndarray:
        """Return the blocks [n] that the next token after a usable prefix sees; the last belongs to the last page."""
        return self._pool.blocks_of(pages[int(self._first_seen(np.array(len(pages)))) :])

    def num_needed(self, count: int, prefix: np.ndarray) -> int:
        """Return the pages that a request needs for `count` blocks after a usable prefix, and for those it sees."""
        most, seen = self._limits.most_of_window, self.seen_of(prefix)
        assert most is not None
        return self._pool.block_size * (min(count, most - len(seen)) + self._pool.count_idle(seen))

    def begin(self, slot: int, pages: np.ndarray) -> np.ndarray:
        """Let a slot hold the blocks that its token after a prefix sees; return the pages of all blocks, [n, k]."""
        seen = self.seen_of(pages)
        start = len(pages) - len(seen)
        self._pool.hold(seen)
        self._slots.num_unseen_pages[slot] = start
        self._table[slot, :start], self._table[slot, start : len(pages)] = NONE, seen
        return self._pool.pages_of(self._table[slot, : len(pages)])

    def extend(self, slots: np.ndarray, count: int) -> np.ndarray:
        """Give each of these slots `count` blocks behind its last page; return their pages [len(slots) * count, k]."""
        blocks = self._pool.allocate_blocks(len(slots) * count)
        indices = self._slots.num_pages[slots, None] + np.arange(count)
        self._table[slots[:, None], indices] = blocks.reshape(len(slots), count)
        return self._pool.pages_of(blocks)

    def share(self, slot: int, first: int, pages: np.ndarray) -> None:
        """Let the slot's blocks from index `first` on belong to pages [n] of the tree with the same tokens."""
        skipped = max(0, int(self._slots.num_unseen_pages[slot]) - first)
        if skipped < len(pages):
            self._pool.assign(self._table[slot, first + skipped : first + len(pages)], pages[skipped:])

    def drop_unseen(self) -> bool:
        """Drop the blocks of running requests that their next tokens do not see; return whether there were any."""
        s = self._slots
        first_seen = (s.num_computed[s.running] + 1 - self._limits.group_window) // self._limits.page_size
        counts = first_seen - s.num_unseen_pages[s.running]
        passing = counts > 0
        if passing.any():
            slots, counts = s.running[passing], counts[passing]
            offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            self._pool.drop(
                self._table[np.repeat(slots, counts), np.repeat(s.num_unseen_pages[slots], counts) + offsets]
            )
            s.num_unseen_pages[slots] += counts
        return bool(passing.any())

    def release(self, slot: int) -> None:
        """Drop all blocks of a slot."""
        s = self._slots
        self._pool.drop(self._table[slot, s.num_unseen_pages[slot] : s.num_pages[slot]])

    def _first_seen(self, num_pages: np.ndarray) -> np.ndarray:
        """Return the first page that a token after so many pages sees."""
        size = self._limits.page_size
        first: np.ndarray = np.maximum(num_pages * size + 1 - self._limits.group_window, 0) // size
        return first
