"""Named tuples of op arguments. B rows or T tokens, H query heads, Hkv KV heads, E head size, F and D of a weight."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .mxfp4_order import ordered_mxfp4, ordered_scales, published_mxfp4, published_scales

MXFP4_BLOCK = 32  # columns with one scale
MXFP4_NUMBERS = 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0
MAX_CHUNKS = 8  # the most chunks of a row in a KeyPartition with kv_chunk
Scoring = Literal["softmax", "sigmoid"]  # how a router scores the experts
MAX_GROUP = 8  # the most query heads that a thread block of decode_attention processes


def num_groups(heads: int, kv_heads: int) -> int:
    """Return the number of groups of query heads that share a thread block; each KV head has as many of equal size."""
    shared = heads // kv_heads
    return kv_heads * next(n for n in range(1, shared + 1) if shared % n == 0 and shared // n <= MAX_GROUP)


@dataclass
class FP8Choice:
    """The GEMM for FP8 weights of one shape and activations in FP8: lockstep's up to `tiled_rows` rows, then cuBLAS."""

    tiled_rows: int = 64
    gated: bool = False  # the GEMM ends with `silu(gate) * up`


UNTUNED = FP8Choice()


class FP8Weight(NamedTuple):
    """A matrix of float8_e4m3fn with float32 scales.

    It stands for `data[r, c] * scales[r // rows, (first + c) // columns]`.
    `rows` and `columns` are powers of two. A leading dimension of both tensors is the expert.
    """

    data: Tensor  # [F, D] or [N, F, D]
    scales: Tensor  # [ceil(F / rows), ceil((first + D) / columns)], or with N before; contiguous
    rows: int  # rows of the matrix for one row of scales
    columns: int
    first: int = 0  # the place of column 0 in its block: a shard may begin inside a block
    choice: FP8Choice = UNTUNED

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix that the weight stands for, rounded once: [F, D], or [N, F, D]."""
        rows, columns = self.shape[-2:]
        row = torch.arange(rows, device=self.data.device) // self.rows
        column = torch.arange(self.first, self.first + columns, device=self.data.device) // self.columns
        return (self.data.float() * self.scales[..., row[:, None], column]).to(dtype)

    def expert(self, index: int | None) -> FP8Weight:
        """Return the matrix [F, D] of one expert; of None, this matrix as that of the only one, [1, F, D]."""
        return self._replace(data=self.data[index], scales=self.scales[index])


Matrix = Tensor | FP8Weight


@dataclass(frozen=True)
class FP8Rows:
    """Rows of activations [T, D] that a kernel has quantized for `linear` with an FP8 weight.

    They stand for `numbers[t, d] * scales[d // 128, t]`.
    """

    numbers: Tensor  # [T', D] float8_e4m3fn; T' is T rounded up to a multiple of 4, and rows beyond T are unspecified
    scales: Tensor  # [ceil(D / 128), T'] float32
    num_rows: int
    dtype: torch.dtype  # of the activations before, and of the result of `linear`

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.num_rows, self.numbers.shape[1]))

    @property
    def is_cuda(self) -> bool:
        return self.numbers.is_cuda

    def __len__(self) -> int:
        return self.num_rows

    def dequantized(self) -> Tensor:
        """Return the rows that these stand for, rounded once: [T, D]."""
        groups = torch.arange(self.numbers.shape[1], device=self.numbers.device) // 128
        return (self.numbers.float() * self.scales[groups].t())[: len(self)].to(self.dtype)


Rows = Tensor | FP8Rows


class MXFP4Weight(NamedTuple):
    """The matrices of all experts in the OCP format MXFP4: 4-bit numbers in blocks of 32 columns with one exponent.

    A number is a sign and an index of MXFP4_NUMBERS, times 2^(scale - 127). Each expert has the bytes of its matrix in
    the order of mxfp4_order.py, so that a row is not `data[n, f]`; `of_checkpoint` makes it.
    """

    data: Tensor  # [N, F, D / 2] uint8, contiguous; F a multiple of 8
    scales: Tensor  # [N, F, D / 32] uint8, contiguous

    @staticmethod
    def of_checkpoint(data: Tensor, scales: Tensor) -> MXFP4Weight:
        """Return the weight of such tensors row by row, two columns in a byte, the first in its low half."""
        return MXFP4Weight(ordered_mxfp4(data), ordered_scales(scales))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.data.shape[:2], 2 * self.data.shape[2]))

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the matrices that the weight stands for, [N, F, D]."""
        numbers = torch.tensor([*MXFP4_NUMBERS, *(-x for x in MXFP4_NUMBERS)], device=self.data.device)
        codes, scales = published_mxfp4(self.data), published_scales(self.scales)
        pairs = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
        blocks = numbers[pairs.int()].unflatten(-1, (-1, MXFP4_BLOCK))
        return torch.ldexp(blocks, scales.int().unsqueeze(-1) - 127).flatten(-2).to(dtype)

    def expert(self, index: int) -> Tensor:
        """Return the matrix [F, D] of one expert in float32."""
        return MXFP4Weight(self.data[index : index + 1], self.scales[index : index + 1]).dequantized(torch.float32)[0]


ExpertMatrix = Matrix | MXFP4Weight


class ClampedSwiGLU(NamedTuple):
    """gpt-oss's gated activation, `g * sigmoid(alpha * g) * (u + 1)`: g = min(gate, limit), u = up within +-limit."""

    alpha: float
    limit: float


class KVCache(NamedTuple):
    """One layer's pages of keys and values: [pages, page_size, Hkv, E] each, any strides; ops update them in place."""

    k: Tensor
    v: Tensor


class QKNorm(NamedTuple):
    """RMSNorm over each head of q and k: weights [E], or None for no norm."""

    q: Tensor | None
    k: Tensor | None
    eps: float


class Rope(NamedTuple):
    """Rotary embedding: positions [T] int32, and a table [P, R] float32 of cosines, then sines, by position.

    The first R elements of a head are rotated, their two halves as pairs (GPT-NeoX order). An empty table, P = 0,
    rotates nothing.
    """

    positions: Tensor
    cos_sin: Tensor


class Pages(NamedTuple):
    """A table of pages [R, P] int32, and for each row of a batch its row of that table, [B] int32.

    The page of position p is `table[table_rows[b], p // page_size]`.
    """

    table: Tensor
    table_rows: Tensor


class KeyPartition(NamedTuple):
    """The division of `decode_attention`'s keys among thread blocks, from `partition_keys`, once per step.

    table     int32, empty on a CPU; the layout is PartitionLayout of cuda/paged_attention.py
    window    a query at position p sees the keys p - window < j <= p; None: all j <= p
    kv_chunk  keys per chunk, so that a row is bitwise identical in any batch; a row may have MAX_CHUNKS chunks.
              None: chunks that use the GPU best; rounding then depends on the other rows
    """

    table: Tensor
    window: int | None
    kv_chunk: int | None


class DeltaLayer(NamedTuple):
    """The weights of a layer of the gated delta rule between its projections."""

    taps: Tensor  # [C, K] of the convolution of q, k and v
    decay: Tensor  # [2, Hv]: A, then bias
    norm: Tensor  # [Ev]
    eps: float


@dataclass(frozen=True)
class StateRows:
    """The rows of a batch for layers with a recurrent state: B rows, each a run of tokens of one request.

    slots   [B] int32         the state of each row, which its tokens update
    starts  [B + 1] int32     row b has the tokens starts[b]:starts[b + 1]
    saves   [B, 2, 2] int32   pairs (count, state): after `count` of its tokens a row's state is also written to that
                              state; a pair of count 0 has no effect. None: no row saves
    num_decoding              so many of the first rows have one token each
    """

    slots: Tensor
    starts: Tensor
    saves: Tensor | None = None
    num_decoding: int = 0

    @cached_property
    def decoding(self) -> StateRows:
        """The first `num_decoding` rows."""
        n = self.num_decoding
        return StateRows(self.slots[:n], self.starts[: n + 1], None if self.saves is None else self.saves[:n], n)

    @cached_property
    def others(self) -> StateRows:
        """The rows after the first `num_decoding`, with their places in the same batch."""
        n = self.num_decoding
        return StateRows(self.slots[n:], self.starts[n:], None if self.saves is None else self.saves[n:])
