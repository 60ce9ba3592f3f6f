"""The recurrent states at the ends of cached prefixes, for models that have layers with such a state.

A prefix of these models can be continued only where its state was saved. A node of the prefix cache has a state if it
ends there. When none is free, the state of the least recently used node is given up; its keys and values stay.

    prompt      |-- cached prefix with a state --|-- rest of the cached prefix --|-- not cached --|-|
    state       loaded                           computed again            saved          saved
    keys        from the cache                   from the cache            stored
"""

from __future__ import annotations

import numpy as np

from ..limits import Limits
from .prefix_cache import NO_PAGES, Node, PrefixCache


class SavedStates:
    """States 0 to max_num_seqs - 1 belong to the slots, the next one is spare; those behind it can be saved here."""

    def __init__(self, limits: Limits) -> None:
        first = limits.max_num_seqs + 1
        self._limits = limits
        self._free = list(range(first + limits.saved_states - 1, first - 1, -1))
        self._nodes: dict[int, Node] = {}  # by state
        self._written: dict[int, int] = {}  # state -> the last step that writes it
        self._points: dict[int, list[int]] = {}  # slot -> lengths at which its state is saved
        self._planned: list[tuple[int, int, int]] = []  # (slot, tokens, state) of the step in the making

    def start_of(self, node: Node, num_pages: int, step: int) -> tuple[int, int]:
        """Return the tokens of a cached prefix that need not be computed, and the state after them; negative: none.

        A state is usable after the step that writes it.
        """
        if self._limits.has_states:
            while node.parent is not None and not (node.state >= 0 and self._written[node.state] < step):
                num_pages -= len(node.pages)
                node = node.parent
        return num_pages * self._limits.page_size, node.state

    def admit(self, slot: int, num_tokens: int, num_cached: int, num_computed: int) -> None:
        """Choose where the state of a request is saved: at the end of its cached prefix, and of its last whole page."""
        if self._limits.saved_states:
            size = self._limits.page_size
            points = {num_cached, (num_tokens - 1) // size * size}
            self._points[slot] = sorted(point for point in points if point > num_computed)

    def plan(
        self, slot: int, tokens: np.ndarray, start: int, count: int, tree: PrefixCache, prefix: Node, step: int
    ) -> None:
        """Plan the saves of a slot in a step that computes `count` of its tokens from `start` on.

        prefix  a node of the slot's tokens, in the tree of its salt
        """
        while prefix.parent is not None:
            prefix = prefix.parent
        for length in self._points.get(slot, ()):
            if start < length <= start + count:
                node, pages = tree.match(tokens[:length], prefix)
                state = self.save(node, step) if len(pages) * self._limits.page_size == length else None
                if state is not None:
                    self._planned.append((slot, length - start, state))

    def take(self, slots: np.ndarray) -> np.ndarray:
        """Return the saves planned for a step of these slots, as StepPlan.state_saves."""
        if not self._planned:
            return NO_PAGES
        pairs: dict[int, list[int]] = {slot: [] for slot in slots.tolist()}
        for slot, count, state in self._planned:
            pairs[slot] += count, state
        self._planned = []
        return np.array([(numbers + [0] * 4)[:4] for numbers in pairs.values()], np.int32).ravel()

    def save(self, node: Node, step: int) -> int | None:
        """Return the state for the end of `node`, written in `step`; None if the node has one, or none can be given up.

        Two rows of a step must not write to one state: the order of their writes is not defined.
        """
        if node.state >= 0:
            return None
        earlier = [used for state, used in self._nodes.items() if self._written[state] < step]
        if not self._free and earlier:
            self.give_up(min(earlier, key=lambda used: used.last_used))
        state = next((free for free in reversed(self._free) if self._written.get(free, -1) < step), None)
        if state is not None:
            self._free.remove(state)
            node.state, self._written[state], self._nodes[state] = state, step, node
        return state

    def give_up(self, node: Node) -> None:
        """Free the state of `node`, if it has one."""
        if node.state >= 0:
            del self._nodes[node.state]
            self._free.append(node.state)
            node.state = -1

    def release(self, slot: int) -> None:
        """Forget the save points of a slot."""
        self._points.pop(slot, None)
