"""One rank's recurrent states: what layers of the gated delta rule keep of a request instead of keys and values.

A state has a fixed size, whatever the length of its request. States 0 to `max_num_seqs` - 1 are those of the slots, the
next one receives the writes of padding rows, and the others hold states at the ends of cached prefixes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels import state_ops
from ...kernels.arguments import StateRows


@dataclass(frozen=True, kw_only=True)
class StateShape:
    """The layers of one rank that have states, and the size of these."""

    num_layers: int
    taps: int  # width of the convolution, which needs the last taps - 1 inputs
    channels: int  # channels of the convolution
    heads: int  # value heads
    key_size: int
    value_size: int
    dtype: torch.dtype  # dtype of the inputs; the sums are float32

    @property
    def state_bytes(self) -> int:
        """Bytes of one state over all layers."""
        inputs = (self.taps - 1) * self.channels * self.dtype.itemsize
        return self.num_layers * (inputs + 4 * self.heads * self.key_size * self.value_size)


class LayerStates(NamedTuple):
    """The states of one layer, updated in place, and those that each row of a batch uses."""

    inputs: Tensor  # [N, K - 1, C]: the last inputs of the convolution
    sums: Tensor  # [N, H, E, Ev] float32
    rows: StateRows
    delta_net: Callable[..., Tensor] = state_ops.delta_net_  # a capture of CUDA graphs has another function


class StatePool:
    """`num_states` states for every layer of the gated delta rule, allocated once; all are zero."""

    def __init__(self, shape: StateShape, num_states: int, device: torch.device) -> None:
        outer = shape.num_layers, num_states
        self._inputs = torch.zeros(*outer, shape.taps - 1, shape.channels, dtype=shape.dtype, device=device)
        self._sums = torch.zeros(*outer, shape.heads, shape.key_size, shape.value_size, device=device)

    def layers(self, rows: StateRows | None) -> Iterator[LayerStates]:
        """Yield the states of each layer for a batch of these rows."""
        assert rows is not None, "a batch of a model with recurrent layers has state_rows"
        for inputs, sums in zip(self._inputs, self._sums, strict=True):
            yield LayerStates(inputs, sums, rows)

    def start(self, slot: int, source: int) -> None:
        """Set a slot's state to a copy of state `source`, or to zero if that is negative."""
        for states in (self._inputs, self._sums):
            if source < 0:
                states[:, slot] = 0
            else:
                states[:, slot] = states[:, source]
