"""Memory that the ranks of one host share by CUDA IPC, and the launches of allreduce.cu over it.

Grids depend on sizes and the group alone: a block reads only what the same block of every peer has published.
"""

from __future__ import annotations

from dataclasses import dataclass

import cupy
import numpy as np
import torch
from cuda.bindings import driver
from torch import Tensor

from .cuda.kernel_launch import VECTOR_BYTES, c_name, kernel, num_multiprocessors, vector_width

KINDS = ("barrier", "all_reduce", "all_gather", "all_reduce_add_rms_norm")  # as reported by late kernels
MAX_RANKS = 8
TIMEOUT_FIELD = MAX_RANKS + 2  # its index in a table
HEADER_BYTES, UNIT = 4096, 16  # as in allreduce.cu
THREADS = 512
MAX_BLOCKS = 36  # saturate NVLink, and leave multiprocessors to kernels beside them
NORM_VECTORS = (1, 2, 4)  # of a row, in the registers of a thread: at most 16,384 elements in bfloat16


@dataclass(frozen=True)
class Group:
    """The ranks as the kernels see them."""

    table: Tensor  # int64: struct Group of allreduce.cu
    size: int
    blocks: int  # at most, of each launch


def table(buffers: list[int], words: Tensor, *, timeout_ns: int, slot_bytes: int, rank: int, alone: bool) -> list[int]:
    """Return the fields of struct Group.

    words  host_words(MAX_RANKS + 1): for each rank the wait for it that timed out, then `stop`
    """
    missing, stop = words.data_ptr(), words[MAX_RANKS:].data_ptr()
    return [*buffers, *[0] * (MAX_RANKS - len(buffers)), missing, stop, timeout_ns, slot_bytes, rank, int(alone)]


def allocate(nbytes: int, device: int) -> tuple[int, Tensor]:
    """Return zeroed memory of the GPU, outside of any pool so that it can be exported, as address and bytes."""
    with cupy.cuda.Device(device):
        pointer = cupy.cuda.runtime.malloc(nbytes)
        whole = view(pointer, nbytes, device).zero_()
        torch.cuda.synchronize(device)
    return int(pointer), whole


def view(pointer: int, nbytes: int, device: int) -> Tensor:
    """Return memory of the GPU as bytes; the tensor does not own it."""
    memory = cupy.cuda.UnownedMemory(pointer, nbytes, None, device)
    array = cupy.ndarray(nbytes, cupy.uint8, cupy.cuda.MemoryPointer(memory, 0))
    return torch.utils.dlpack.from_dlpack(array)


def free(pointer: int) -> None:
    """Free memory from `allocate`, once no peer has it mapped."""
    cupy.cuda.runtime.free(pointer)


def export(pointer: int) -> bytes:
    """Return the handle by which another process maps this memory."""
    return bytes(cupy.cuda.runtime.ipcGetMemHandle(pointer))


def map_memory(handle: bytes, device: int) -> int:
    """Return the address in this process of exported memory; raise RuntimeError with CUDA's message."""
    with cupy.cuda.Device(device):
        return int(cupy.cuda.runtime.ipcOpenMemHandle(handle))


def unmap(pointer: int) -> None:
    cupy.cuda.runtime.ipcCloseMemHandle(pointer)


def host_words(count: int) -> Tensor:
    """Return zeroed int64 of the host that kernels read and write at the same address."""
    return torch.zeros(count, dtype=torch.int64, pin_memory=True)


def max_blocks(device: int, ranks: int) -> int:
    """Return the blocks of a launch such that those of all ranks fit on the GPU at once: they wait for each other.

    ranks  on this GPU; several leave half of it to kernels before and beside them
    """
    share = num_multiprocessors(device) // (2 * ranks if ranks > 1 else 1)
    return max(1, min(MAX_BLOCKS, share))


def capture() -> int:
    """Return the number of the graph that is being captured on the current stream, or 0."""
    if not torch.cuda.is_current_stream_capturing():
        return 0
    status, _, number, *_ = driver.cuStreamGetCaptureInfo(torch.cuda.current_stream().cuda_stream)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"cannot ask for the capture in progress: {status.name}")
    return int(number)


def prepare(size: int) -> None:
    """Compile the kernel of the first collective, which has a short deadline."""
    kernel("allreduce.cu", f"all_gather<16, {size}>", early=True)


def one_shot_all_reduce(out: Tensor, x: Tensor, group: Group, slot: int) -> None:
    """Compute `out = sum of x over the ranks`: each rank reads all of every peer."""
    v = vector_width(x.numel(), out, x)
    launch = kernel("allreduce.cu", f"one_shot_all_reduce<{c_name(x)}, {v}, {group.size}>", early=True)
    launch(_grid(x.nbytes, group), THREADS, out, x, np.int64(x.numel()), *_group_arguments(group, slot, "all_reduce"))


def two_shot_all_reduce(out: Tensor, x: Tensor, group: Group, slot: int) -> None:
    """Compute the same sum: each rank sums one chunk, then reads the peers' chunks."""
    chunk = -(-x.numel() // (UNIT * group.size)) * UNIT
    v = vector_width(chunk, out, x, strides=[x.numel()])
    launch = kernel("allreduce.cu", f"two_shot_all_reduce<{c_name(x)}, {v}, {group.size}>", early=True)
    grid, sizes = _grid(chunk * x.element_size(), group), (np.int64(x.numel()), np.int64(chunk))
    launch(grid, THREADS, out, x, *sizes, *_group_arguments(group, slot, "all_reduce"))


def all_gather(out: Tensor, x: Tensor, group: Group, slot: int, kind: str) -> None:
    """Compute `out[rank] = x of every rank`; both are bytes."""
    at = out.data_ptr() | x.data_ptr() | x.numel()
    v = next(v for v in (16, 4, 2, 1) if at % v == 0)
    launch = kernel("allreduce.cu", f"all_gather<{v}, {group.size}>", early=True)
    launch(_grid(x.numel(), group), THREADS, out, x, np.int64(x.numel()), *_group_arguments(group, slot, kind))


def fits_norm(columns: int, dtype: torch.dtype) -> bool:
    """Return whether rows of this many elements are short enough for all_reduce_add_rms_norm."""
    return columns <= NORM_VECTORS[-1] * THREADS * _norm_vector(columns, dtype)


def all_reduce_add_rms_norm(
    out: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: Group, slot: int, *, two_shot: bool
) -> None:
    """Compute `residual += sum of x over the ranks; out = rms_norm(residual)`.

    All tensors are contiguous and start at multiples of 16 bytes.
    """
    rows, columns = x.shape
    v = _norm_vector(columns, x.dtype)  # by the shape, not by addresses: all ranks must round alike
    threads = min(THREADS, -(-columns // (32 * v)) * 32)
    vectors = next(n for n in NORM_VECTORS if n * threads * v >= columns)
    name = f"all_reduce_add_rms_norm<{c_name(x)}, {v}, {group.size}, {vectors}, {str(two_shot).lower()}>"
    sizes = np.float32(eps), np.int32(rows), np.int32(columns)
    grid = min(rows, group.blocks), 1
    launch = kernel("allreduce.cu", name, early=True)
    group_arguments = _group_arguments(group, slot, "all_reduce_add_rms_norm")
    launch(grid, threads, out, x, residual, weight, *sizes, *group_arguments)


def _norm_vector(columns: int, dtype: torch.dtype) -> int:
    v = VECTOR_BYTES // dtype.itemsize
    return v if columns % v == 0 else 1


def _grid(nbytes: int, group: Group) -> tuple[int, int]:
    return max(1, min(group.blocks, -(-nbytes // (THREADS * VECTOR_BYTES)))), 1


def _group_arguments(group: Group, slot: int, kind: str) -> tuple[Tensor, np.int32, np.int32]:
    return group.table, np.int32(slot), np.int32(KINDS.index(kind))
