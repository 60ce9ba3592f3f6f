"""The groups of layers that share a page table, so that layers with a window need pages for their window only.

A page of the KV cache has the keys and values of `page_size` tokens in as many layers as the largest group has. So a
page may belong to any group, as in vLLM's hybrid KV cache manager. If some layers have a window and others see all
keys, the latter are the first group, and the others are divided into groups of about the same size:

    Gemma 3 12B: 8 layers see all keys, 40 have a window      6 groups of 8
    gpt-oss-20b: 12 and 12                                    2 groups of 12

Otherwise there is one group. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_WINDOW_GROUPS = 8  # each has a page table, whose entries every step writes


@dataclass(frozen=True)
class LayerGroups:
    """The group of each layer with keys and values, and its place among the layers of that group."""

    groups: tuple[int, ...]
    places: tuple[int, ...]
    window: int = 0  # keys that a query sees in a layer of any group but the first

    @classmethod
    def of_windows(cls, windows: Sequence[int | None]) -> LayerGroups:
        """Return the groups of layers with these windows; None sees all keys."""
        limited = [n for n, window in enumerate(windows) if window is not None]
        num_full = len(windows) - len(limited)
        if not 0 < num_full <= len(limited):  # with more full layers, short contexts would need more memory
            return cls((0,) * len(windows), tuple(range(len(windows))))
        num_groups = min(MAX_WINDOW_GROUPS, round(len(limited) / num_full))
        size = max(num_full, -(-len(limited) // num_groups))
        groups, places, counts = [], [], [0] * (1 + num_groups)
        for window in windows:
            group = 0 if window is None else 1 + sum(counts[1:]) // size
            groups.append(group)
            places.append(counts[group])
            counts[group] += 1
        return cls(tuple(groups), tuple(places), max(window for window in windows if window is not None))

    @property
    def num_window_groups(self) -> int:
        return max(self.groups, default=0)

    @property
    def layers_per_page(self) -> int:
        """The layers whose keys and values a page has; a group with fewer leaves the rest of its pages unused."""
        return max(self.places, default=-1) + 1
