"""The tile of a weight that a block of stream_gemm or stream_fp8 multiplies, with x as the left operand of wgmma."""

from __future__ import annotations

from dataclasses import dataclass

BARRIER_BYTES = 1024  # of shared memory
SHARED_BYTES = 227 * 1024


@dataclass(frozen=True)
class WeightTile:
    """A tile of the products of x and a weight.

    rows        rows of x
    group_rows  rows of the weight for each group of four warps
    groups      groups with other rows of the weight
    sharing     blocks that share the columns
    """

    rows: int
    group_rows: int
    groups: int = 1
    sharing: int = 1

    @property
    def weight_rows(self) -> int:
        return self.groups * self.group_rows

    def num_blocks(self, weight_rows: int) -> int:
        """Return the blocks for a weight with so many rows."""
        return -(-weight_rows // self.weight_rows) * self.sharing
