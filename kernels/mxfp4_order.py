"""The order of MXFP4 weights in memory, which the GEMMs of experts read at the memory's speed and widen quickly.

A checkpoint has a matrix row by row. A block is 16 bytes; byte 4 c + t has columns 8 c + 2 t and 8 c + 2 t + 1, in its
low and its high half: a sign and an index of MXFP4_NUMBERS. Here the same bits are in another order:

- Eight rows follow each other in chunks of four blocks: 512 bytes, which a warp loads at once, with the blocks of a row
  side by side. The last chunk has the rest, if four do not divide the blocks of a row. Scales are in the same order.
- A block is four words of 32 bits, and word t has the pairs (t, c), c = 0 .. 3. A pair as bfloat16, apart from a power
  of two, has signs in bits 15 and 31, and indices in bits 6 .. 8 and 22 .. 24. ROTATIONS says where these bits are in a
  word; `small_pair` of mxfp4.cuh moves them into place.

Any bytes are valid in both orders.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

ROWS, CHUNK, BLOCK_BYTES = 8, 4, 16  # rows that are stored together; blocks of a row in a chunk
WORDS = 4  # of a block, and the pairs of a word
# For each pair of a word: the bits of the bfloat16s, and by how many a rotation to the left moves them into place.
NUMBERS = 0x81C081C0
ROTATIONS = (
    ((NUMBERS, 0),),
    ((NUMBERS, 10),),
    ((NUMBERS, 13),),
    ((0x00400040, 2), (0x01800180, 7), (0x80008000, 12)),
)


def ordered_mxfp4(data: Tensor) -> Tensor:
    """Return numbers [..., F, D / 2] uint8 of a checkpoint in the order of this module, F a multiple of 8."""
    return _in_chunks(_in_words(data), BLOCK_BYTES)


def published_mxfp4(data: Tensor) -> Tensor:
    """Return the numbers of `ordered_mxfp4` in the order of checkpoints."""
    return _from_words(_from_chunks(data, BLOCK_BYTES))


def ordered_scales(scales: Tensor) -> Tensor:
    """Return scales [..., F, D / 32] uint8 of a checkpoint in the order of this module, F a multiple of 8."""
    return _in_chunks(scales, 1)


def published_scales(scales: Tensor) -> Tensor:
    """Return the scales of `ordered_scales` in the order of checkpoints."""
    return _from_chunks(scales, 1)


def _in_chunks(matrix: Tensor, block_bytes: int) -> Tensor:
    eights = matrix.unflatten(-2, (-1, ROWS))  # [..., F / 8, 8, bytes of a row]
    chunks = [chunk.flatten(-2) for chunk in eights.split(CHUNK * block_bytes, dim=-1)]
    return torch.cat(chunks, dim=-1).view(matrix.shape)


def _from_chunks(matrix: Tensor, block_bytes: int) -> Tensor:
    size = matrix.shape[-1]
    eights = matrix.unflatten(-2, (-1, ROWS)).flatten(-2)
    chunks = eights.split(ROWS * CHUNK * block_bytes, dim=-1)
    return torch.cat([chunk.unflatten(-1, (ROWS, -1)) for chunk in chunks], dim=-1).view(*matrix.shape[:-1], size)


def _in_words(data: Tensor) -> Tensor:
    pairs = data.unflatten(-1, (-1, WORDS, WORDS)).int()  # [..., c, t]
    words = torch.zeros_like(pairs[..., 0, :])
    for c, table in enumerate(_bits_of_pairs(data.device)):
        words |= table[pairs[..., c, :]]
    return words.view(torch.uint8).flatten(-2)


def _from_words(data: Tensor) -> Tensor:
    words = data.contiguous().view(torch.int32).unflatten(-1, (-1, WORDS)).long()
    pairs = []
    for parts in ROTATIONS:
        bits = torch.zeros_like(words)
        for mask, rotation in parts:
            bits |= _rotated_right(words & 0xFFFFFFFF, 32 - rotation) & mask
        low, high = ((bits >> shift + 12 & 8) | (bits >> shift + 6 & 7) for shift in (0, 16))
        pairs.append(low | high << 4)
    return torch.stack(pairs, dim=-2).to(torch.uint8).flatten(-3)


@functools.cache
def _bits_of_pairs(device: torch.device) -> Tensor:
    """Return the bits of a word for each place of a pair and each byte of a checkpoint, [4, 256] int32."""
    codes = torch.arange(256)
    low, high = ((code & 8) << 12 | (code & 7) << 6 for code in (codes & 15, codes >> 4))
    pairs = low | high << 16
    tables = [
        functools.reduce(torch.bitwise_or, (_rotated_right(pairs & mask, rotation) for mask, rotation in parts))
        for parts in ROTATIONS
    ]
    return torch.stack(tables).to(torch.int32).to(device)  # words of 2^31 and more become negative


def _rotated_right(words: Tensor, bits: int) -> Tensor:
    """Return words of 32 bits, as int64, rotated to the right."""
    return (words >> bits | words << (32 - bits)) & 0xFFFFFFFF
