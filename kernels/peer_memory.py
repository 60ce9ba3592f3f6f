"""Memory that the ranks of one host share by CUDA IPC, and the launches of allreduce.cu over it.

Beside cuda.py the only module that imports CuPy. Grids depend on sizes and the group alone: a block reads what the same
block of every peer has offered.
"""

from __future__ import annotations

from dataclasses import dataclass

import cupy
import numpy as np
import torch
from cuda.bindings import driver
from torch import Tensor

from .cuda import VECTOR_BYTES, _c, _kernel, _multiprocessors, _vector

KINDS = ("barrier", "all_reduce", "all_gather", "reduce_scatter", "all_reduce_add_rms_norm")  # in reports
MAX_RANKS = 8
PATIENCE = MAX_RANKS + 2  # its place in a table
HEADER_BYTES, UNIT = 4096, 16  # as in allreduce.cu
THREADS = 512
MAX_BLOCKS = 36  # saturate NVLink, and leave multiprocessors to what runs beside them
NORM_VECTORS = (1, 2, 4)  # of a row, that a thread may hold: 16,384 elements in bfloat16


@dataclass(frozen=True)
class Group:
    """The ranks as the kernels see them."""

    table: Tensor  # int64: struct Group of allreduce.cu
    size: int
    blocks: int  # at most, of each launch


def table(arenas: list[int], words: Tensor, *, patience_ns: int, slot_bytes: int, rank: int, alone: bool) -> list[int]:
    """The fields of struct Group; `words` are host_words(MAX_RANKS + 1): for whom was waited in vain, and `stop`."""
    missing, stop = words.data_ptr(), words[MAX_RANKS:].data_ptr()
    return [*arenas, *[0] * (MAX_RANKS - len(arenas)), missing, stop, patience_ns, slot_bytes, rank, int(alone)]


def allocate(nbytes: int, device: int) -> tuple[int, Tensor]:
    """Zeroed memory of the GPU, outside of any pool so that it can be exported, and the same as bytes."""
    with cupy.cuda.Device(device):
        pointer = cupy.cuda.runtime.malloc(nbytes)
        whole = view(pointer, nbytes, device).zero_()
        torch.cuda.synchronize(device)
    return int(pointer), whole


def view(pointer: int, nbytes: int, device: int) -> Tensor:
    """Memory of the GPU that others own, as bytes."""
    memory = cupy.cuda.UnownedMemory(pointer, nbytes, None, device)
    array = cupy.ndarray(nbytes, cupy.uint8, cupy.cuda.MemoryPointer(memory, 0))
    return torch.utils.dlpack.from_dlpack(array)


def free(pointer: int) -> None:
    """Free what `allocate` gave, once no peer has it mapped."""
    cupy.cuda.runtime.free(pointer)


def export(pointer: int) -> bytes:
    """What a process needs to map memory of this one."""
    return bytes(cupy.cuda.runtime.ipcGetMemHandle(pointer))


def map_memory(handle: bytes, device: int) -> int:
    """The address in this process of the memory that another one exported; raises RuntimeError with CUDA's words."""
    with cupy.cuda.Device(device):
        return int(cupy.cuda.runtime.ipcOpenMemHandle(handle))


def unmap(pointer: int) -> None:
    cupy.cuda.runtime.ipcCloseMemHandle(pointer)


def host_words(count: int) -> Tensor:
    """Zeroed int64 of the host that kernels read and write at the same address."""
    return torch.zeros(count, dtype=torch.int64, pin_memory=True)


def most_blocks(device: int, ranks: int) -> int:
    """Blocks of a launch, so that those of so many ranks are on one GPU at the same time: they wait for each other.

    Where there are several, half of the GPU is left to what comes before and beside them.
    """
    share = _multiprocessors(device) // (2 * ranks if ranks > 1 else 1)
    return max(1, min(MAX_BLOCKS, share))


def capture() -> int:
    """A number for the graph that is being captured on the current stream, 0 if none is."""
    if not torch.cuda.is_current_stream_capturing():
        return 0
    status, _, number, *_ = driver.cuStreamGetCaptureInfo(torch.cuda.current_stream().cuda_stream)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"cannot ask for the capture in progress: {status.name}")
    return int(number)


def prepare(size: int) -> None:
    """Compile what the first meeting needs: its deadline is short."""
    _kernel("allreduce.cu", f"gather<16, {size}>", early=True)


def reduce(out: Tensor, x: Tensor, group: Group, slot: int, kind: str, *, chunks: int = 1) -> None:
    """`out = sum of x over the ranks`, or chunk `rank` of it if x has as many chunks as there are ranks."""
    each = x.numel() // chunks
    _launch("reduce", out, x, each, group, slot, kind)


def reduce_and_gather(out: Tensor, x: Tensor, group: Group, slot: int, kind: str) -> None:
    """The same sum, of which each rank computes a part."""
    unit = UNIT * group.size
    _launch("reduce_and_gather", out, x, -(-x.numel() // unit) * UNIT, group, slot, kind)


def gather(out: Tensor, x: Tensor, group: Group, slot: int, kind: str) -> None:
    """`out[rank] = x of every rank`; both are bytes."""
    at = out.data_ptr() | x.data_ptr() | x.numel()
    v = next(v for v in (16, 4, 2, 1) if at % v == 0)
    kernel = _kernel("allreduce.cu", f"gather<{v}, {group.size}>", early=True)
    kernel(_grid(x.numel(), group), THREADS, out, x, np.int64(x.numel()), *_where(group, slot, kind))


def fits_norm(columns: int, dtype: torch.dtype) -> bool:
    """Whether rows of so many elements are short enough for reduce_add_rms_norm."""
    return columns <= NORM_VECTORS[-1] * THREADS * _norm_vector(columns, dtype)


def reduce_add_rms_norm(
    out: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    group: Group,
    slot: int,
    kind: str,
    *,
    two_steps: bool,
) -> None:
    """`residual += sum of x over the ranks; out = rms_norm(residual)`; all contiguous and at multiples of 16 bytes."""
    rows, columns = x.shape
    v = _norm_vector(columns, x.dtype)  # not by the addresses: the same bits on all ranks
    threads = min(THREADS, -(-columns // (32 * v)) * 32)
    held = next(n for n in NORM_VECTORS if n * threads * v >= columns)
    name = f"reduce_add_rms_norm<{_c(x)}, {v}, {group.size}, {held}, {str(two_steps).lower()}>"
    kernel = _kernel("allreduce.cu", name, early=True)
    sizes = np.float32(eps), np.int32(rows), np.int32(columns)
    kernel((min(rows, group.blocks), 1), threads, out, x, residual, weight, *sizes, *_where(group, slot, kind))


def _norm_vector(columns: int, dtype: torch.dtype) -> int:
    v = VECTOR_BYTES // dtype.itemsize
    return v if columns % v == 0 else 1


def _launch(name: str, out: Tensor, x: Tensor, each: int, group: Group, slot: int, kind: str) -> None:
    v = _vector(each, out, x, strides=[x.numel()])
    kernel = _kernel("allreduce.cu", f"{name}<{_c(x)}, {v}, {group.size}>", early=True)
    grid, sizes = _grid(each * x.element_size(), group), (np.int64(x.numel()), np.int64(each))
    kernel(grid, THREADS, out, x, *sizes, *_where(group, slot, kind))


def _grid(nbytes: int, group: Group) -> tuple[int, int]:
    return max(1, min(group.blocks, -(-nbytes // (THREADS * VECTOR_BYTES)))), 1


def _where(group: Group, slot: int, kind: str) -> tuple[Tensor, np.int32, np.int32]:
    return group.table, np.int32(slot), np.int32(KINDS.index(kind))
