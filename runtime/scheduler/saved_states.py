"""The recurrent states at the ends of cached prefixes, for models that have layers with such a state.

A prefix of these models can be continued only where its state was saved. A node of the prefix cache has a state if it
ends there. When none is free, the state of the least recently used node is given up; its keys and values stay.
"""

from __future__ import annotations

from .prefix_cache import Node


class SavedStates:
    """`count` states, numbered from `first` on."""

    def __init__(self, first: int, count: int) -> None:
        self._free = list(range(first + count - 1, first - 1, -1))
        self._nodes: dict[int, Node] = {}  # by state

    def save(self, node: Node, step: int) -> int | None:
        """Return the state for the end of `node`, written in `step`; None if the node has one, or none exist."""
        if node.state >= 0 or not (self._free or self._nodes):
            return None
        if not self._free:
            self.release(min(self._nodes.values(), key=lambda used: used.last_used))
        node.state, node.state_step = self._free.pop(), step
        self._nodes[node.state] = node
        return node.state

    def release(self, node: Node) -> None:
        """Give up the state of `node`, if it has one."""
        if node.state >= 0:
            del self._nodes[node.state]
            self._free.append(node.state)
            node.state = -1
