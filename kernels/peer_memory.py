"""Memory that the ranks of one host share by CUDA IPC, and the launches of peer_collectives.cu over it.

Grids depend only on sizes and the PeerTable: a block reads only what the same block of every peer has published.
All kernels compute the same bits, except that two-shot rounds a sum before it is added to the residual.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cupy
import numpy as np
import torch
from cuda.bindings import driver
from torch import Tensor

from .cuda.kernel_launch import C_NAMES, VECTOR_BYTES, c_name, kernel, num_multiprocessors, vector_width

OPERATIONS = ("barrier", "all_reduce", "all_gather", "all_reduce_add_rms_norm")  # timed-out kernels report an index
MAX_RANKS = 8
TIMEOUT_FIELD = MAX_RANKS + 2  # the index of timeout_ns in the fields of a PeerTable
HEADER_BYTES, PUSH_BYTES, UNIT, BLOCKS = 65536, 262144, 16, 1024  # mirror those of peer_protocol.cuh
THREADS = 512  # the most of a block
NUM_BUFFERS, NUM_INBOXES, EMPTY_BYTE = 3, 4, 0xFF  # EMPTY_BYTE: four make EMPTY of peer_protocol.cuh
NORM_VECTORS = (1, 2, 4)  # vectors of a row in a thread's registers


@dataclass(frozen=True)
class PeerTable:
    """The kernels' view of the ranks' peer buffers."""

    fields: Tensor  # int64 on the GPU: struct PeerTable of peer_protocol.cuh
    size: int  # the number of ranks
    max_blocks: int  # of THREADS threads per launch; twice as many of half as many threads, and so on
    inbox_bytes: int  # the most of a message in two pushes


def table_fields(
    buffers: list[int],
    words: Tensor,
    *,
    timeout_ns: int,
    buffer_bytes: int,
    inbox_bytes: int,
    rank: int,
    alone: bool,
) -> list[int]:
    """Return the fields of struct PeerTable.

    buffers  the addresses of all ranks' buffers in this process
    words    host_words(MAX_RANKS + 1): for each rank the wait for it that timed out, then `stop`
    alone    no other rank shares this GPU
    """
    missing, stop = words.data_ptr(), words[MAX_RANKS:].data_ptr()
    return [
        *buffers,
        *[0] * (MAX_RANKS - len(buffers)),
        missing,
        stop,
        timeout_ns,
        buffer_bytes,
        inbox_bytes,
        rank,
        int(alone),
    ]


def allocate(nbytes: int, device: int) -> tuple[int, Tensor]:
    """Return zeroed memory of the GPU, outside of any pool so that it can be exported, as address and bytes."""
    with cupy.cuda.Device(device):
        pointer = cupy.cuda.runtime.malloc(nbytes)
        memory = view(pointer, nbytes, device).zero_()
        torch.cuda.synchronize(device)
    return int(pointer), memory


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
    """Return zeroed, pinned int64 in host memory, which kernels read and write at the same address."""
    return torch.zeros(count, dtype=torch.int64, pin_memory=True)


def max_blocks(device: int, ranks: int) -> int:
    """Return the blocks of a launch such that those of all ranks fit on the GPU at once: they wait for each other.

    ranks  on this GPU; several leave half of it to kernels before and beside them
    """
    return max(1, num_multiprocessors(device) // (2 * ranks if ranks > 1 else 1))


def first_buffer(size: int) -> int:
    """Return where the first peer buffer of `size` ranks starts: after the header and two mailboxes for each rank."""
    return HEADER_BYTES + 4 * size * PUSH_BYTES


def first_inbox(size: int, buffer_bytes: int) -> int:
    """Return where the inboxes start, behind the peer buffers; all their bytes are EMPTY_BYTE at first."""
    return first_buffer(size) + NUM_BUFFERS * buffer_bytes


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
    kernel("peer_collectives.cu", f"all_gather<16, {size}>", early=True)


def compile_sums(columns: int, dtype: torch.dtype, peers: PeerTable) -> None:
    """Compile the kernels that sum rows of this shape, in threads: one after the other they take seconds."""
    layouts = {_norm_layout(rows, columns, dtype, peers)[0] for rows in (1, 2**30)}
    fused = [f"all_reduce_add_rms_norm<{layout}, {two}>" for layout in layouts for two in ("false", "true")]
    if fits_push(columns * dtype.itemsize):
        names = ("push_all_reduce_add_rms_norm", "receive_add_rms_norm")
        fused += [f"{name}<{layout}>" for name in names for layout in layouts]
    if fits_two_pushes(1, columns, dtype, peers):
        fused += [f"two_push_add_rms_norm<{layout}>" for layout in layouts]
    vectors = f"{C_NAMES[dtype]}, {VECTOR_BYTES // dtype.itemsize}, {peers.size}"
    plain = [f"{name}_all_reduce<{vectors}>" for name in ("push", "one_shot", "two_shot")]

    def compile_one(name: str) -> None:
        torch.cuda.set_device(peers.fields.device)  # a new thread has device 0
        kernel("peer_collectives.cu", name, early=True)

    with ThreadPoolExecutor() as threads:
        list(threads.map(compile_one, [*fused, *plain]))


def one_shot_all_reduce(out: Tensor, x: Tensor, peers: PeerTable, buffer_index: int) -> None:
    """Compute `out = sum of x over the ranks`: each rank reads all of every peer."""
    v = vector_width(x.numel(), out, x)
    launch = kernel("peer_collectives.cu", f"one_shot_all_reduce<{c_name(x)}, {v}, {peers.size}>", early=True)
    launch(
        _grid(x.nbytes, peers),
        THREADS,
        out,
        x,
        np.int64(x.numel()),
        *_peer_arguments(peers, buffer_index, "all_reduce"),
    )


def two_shot_all_reduce(out: Tensor, x: Tensor, peers: PeerTable, buffer_index: int) -> None:
    """Compute the same sum: each rank sums one chunk, then reads the peers' chunks."""
    chunk = -(-x.numel() // (UNIT * peers.size)) * UNIT
    v = vector_width(chunk, out, x, strides=[x.numel()])
    launch = kernel("peer_collectives.cu", f"two_shot_all_reduce<{c_name(x)}, {v}, {peers.size}>", early=True)
    grid, sizes = _grid(chunk * x.element_size(), peers), (np.int64(x.numel()), np.int64(chunk))
    launch(grid, THREADS, out, x, *sizes, *_peer_arguments(peers, buffer_index, "all_reduce"))


def push_all_reduce(out: Tensor, x: Tensor, peers: PeerTable) -> None:
    """Compute the same sum: each rank writes x to all. `fits_push(x)` holds, and x starts at a multiple of 16 bytes."""
    v = VECTOR_BYTES // x.element_size()
    launch = kernel("peer_collectives.cu", f"push_all_reduce<{c_name(x)}, {v}, {peers.size}>", early=True)
    launch(_grid(x.nbytes, peers), THREADS, out, x, np.int64(x.numel()), peers.fields, _operation("all_reduce"))


def all_gather(out: Tensor, x: Tensor, peers: PeerTable, buffer_index: int, operation: str) -> None:
    """Compute `out[rank] = x of every rank`; both are bytes."""
    at = out.data_ptr() | x.data_ptr() | x.numel()
    v = next(v for v in (16, 4, 2, 1) if at % v == 0)
    launch = kernel("peer_collectives.cu", f"all_gather<{v}, {peers.size}>", early=True)
    launch(
        _grid(x.numel(), peers), THREADS, out, x, np.int64(x.numel()), *_peer_arguments(peers, buffer_index, operation)
    )


def fits_push(nbytes: int) -> bool:
    """Return whether a message, or a row of one, has whole vectors."""
    return nbytes % VECTOR_BYTES == 0


def fits_norm(columns: int, dtype: torch.dtype) -> bool:
    """Return whether a block has registers for rows of this many elements: at most 16,384 in bfloat16."""
    return columns <= NORM_VECTORS[-1] * THREADS * _norm_vector(columns, dtype)


def all_reduce_add_rms_norm(
    out: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    peers: PeerTable,
    buffer_index: int,
    *,
    two_shot: bool,
) -> None:
    """Compute `residual += sum of x over the ranks; out = rms_norm(residual)`.

    All tensors are contiguous and start at multiples of 16 bytes.
    """
    shape, grid, threads = _norm_layout(len(x), x.shape[1], x.dtype, peers)
    name = f"all_reduce_add_rms_norm<{shape}, {str(two_shot).lower()}>"
    launch = kernel("peer_collectives.cu", name, early=True)
    rows, columns = map(np.int32, x.shape)
    peer_arguments = _peer_arguments(peers, buffer_index, "all_reduce_add_rms_norm")
    launch(grid, threads, out, x, residual, weight, np.float32(eps), rows, columns, *peer_arguments)


def push_all_reduce_add_rms_norm(
    out: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float, peers: PeerTable
) -> None:
    """Compute the same with the bits of one-shot: each rank writes x to all. `fits_push` holds for a row."""
    _push_add_rms_norm("push_all_reduce", out, x, residual, weight, eps, peers)


def fits_two_pushes(rows: int, columns: int, dtype: torch.dtype, peers: PeerTable) -> bool:
    """Return whether the rows fit into an inbox, and each rank has whole vectors of their columns."""
    row = columns * dtype.itemsize
    return rows * row <= peers.inbox_bytes and row % (VECTOR_BYTES * peers.size) == 0


def two_push_add_rms_norm(
    out: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float, peers: PeerTable
) -> None:
    """Compute the same with the bits of two-shot, by pushes of parts and of sums. `fits_two_pushes` holds."""
    _push_add_rms_norm("two_push", out, x, residual, weight, eps, peers)


def _push_add_rms_norm(
    name: str, out: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float, peers: PeerTable
) -> None:
    shape, grid, threads = _norm_layout(len(x), x.shape[1], x.dtype, peers)
    launch = kernel("peer_collectives.cu", f"{name}_add_rms_norm<{shape}>", early=True)
    rows, columns = map(np.int32, x.shape)
    operation = _operation("all_reduce_add_rms_norm")
    launch(grid, threads, out, x, residual, weight, np.float32(eps), rows, columns, peers.fields, operation)


def receive_add_rms_norm(out: Tensor, residual: Tensor, weight: Tensor, eps: float, peers: PeerTable) -> None:
    """Compute the same of an x that this rank's last GEMM has sent to all: `send_linear` of gemm.py.

    Other ranks may call `push_all_reduce_add_rms_norm` instead.
    """
    shape, grid, threads = _norm_layout(len(out), out.shape[1], out.dtype, peers)
    launch = kernel("peer_collectives.cu", f"receive_add_rms_norm<{shape}>", early=True)
    rows, columns = map(np.int32, out.shape)
    operation = _operation("all_reduce_add_rms_norm")
    launch(grid, threads, out, residual, weight, np.float32(eps), rows, columns, peers.fields, operation)


def _norm_layout(rows: int, columns: int, dtype: torch.dtype, peers: PeerTable) -> tuple[str, tuple[int, int], int]:
    """Return the kernel's template arguments, and its grid and threads: a row a block, at first.

    If there are more rows than multiprocessors, a thread has several vectors of a row. More rows are then under way.
    """
    v = _norm_vector(columns, dtype)  # by the shape, not by addresses: all ranks must round alike
    vectors = -(-columns // v)
    per_thread = next(n for n in NORM_VECTORS if n * THREADS >= vectors)
    if per_thread == 1 and rows > peers.max_blocks:
        per_thread = 2
    threads = -(-vectors // (32 * per_thread)) * 32
    grid = min(rows, peers.max_blocks * (THREADS // threads), BLOCKS)
    return f"{C_NAMES[dtype]}, {v}, {peers.size}, {per_thread}", (grid, 1), threads


def _norm_vector(columns: int, dtype: torch.dtype) -> int:
    v = VECTOR_BYTES // dtype.itemsize
    return v if columns % v == 0 else 1


def _grid(nbytes: int, peers: PeerTable) -> tuple[int, int]:
    return max(1, min(peers.max_blocks, -(-nbytes // (THREADS * VECTOR_BYTES)))), 1


def _peer_arguments(peers: PeerTable, buffer_index: int, operation: str) -> tuple[Tensor, np.int32, np.int32]:
    return peers.fields, np.int32(buffer_index), _operation(operation)


def _operation(name: str) -> np.int32:
    number: np.int32 = np.int32(OPERATIONS.index(name))
    return number
