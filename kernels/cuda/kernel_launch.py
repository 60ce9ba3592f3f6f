"""Compile CUDA kernels by NVRTC through CuPy on first use, and launch them on torch's current stream."""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import cupy
import numpy as np
import torch
from cuda.bindings import driver
from torch import Tensor

from ..native import CompileError, source_text
from .launch_parameters import Argument, LaunchParameters, TileMap

C_NAMES = {
    torch.float32: "float",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int32: "int",
    torch.int64: "long long",
    torch.float8_e4m3fn: "fp8",
}
MAX_THREADS = 256  # per block; the __launch_bounds__ of most kernels
VECTOR_BYTES = 16
DEFAULT_SHARED_BYTES = 48 * 1024  # a kernel that needs more must request it
NULL = np.int64(0)

BOX_BYTES = 128  # of a row of a box of a tile map; mirrors LINE of wgmma.cuh
Launch = Callable[..., None]  # takes grid, threads and Arguments
Instance = tuple[str, str, str]  # source, name and architecture of a kernel
_requests = threading.local()  # `instances`, in a block of requested_kernels in this thread
_kept: dict[tuple[str, torch.device], Tensor] = {}


def c_name(tensor: Tensor) -> str:
    """Return the C++ name of the tensor's element type, as common.cuh defines it."""
    return C_NAMES[tensor.dtype]


def optional(tensor: Tensor | None) -> Argument:
    """Return the tensor as a kernel argument, or a null pointer."""
    return NULL if tensor is None else tensor


def num_threads(items: int) -> int:
    """Return the threads of a block for this many items: whole warps, at most MAX_THREADS."""
    return min(MAX_THREADS, -(-items // 32) * 32)


def vector_width(size: int, *tensors: Tensor, strides: Sequence[int] = ()) -> int:
    """Return how many elements one load can move: 16 bytes of the widest dtype, or 1 if something is not aligned.

    size     elements of a row, which vectors must divide
    tensors  must start at a multiple of the vector
    strides  further numbers of elements that vectors must divide
    """
    width = VECTOR_BYTES // max([t.element_size() for t in tensors])
    starts = [t.data_ptr() // t.element_size() for t in tensors]
    return width if math.gcd(width, size, *strides, *starts) == width else 1


@functools.cache
def num_multiprocessors(device: int) -> int:
    """Return the number of multiprocessors (SMs) of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def max_shared_bytes(device: int) -> int:
    """Return the most shared memory that a block of a GPU can have."""
    return int(cupy.cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"])


@functools.cache
def compute_capability(device: int) -> tuple[int, int]:
    """Return the compute capability of a GPU, such as (9, 0)."""
    return torch.cuda.get_device_capability(device)


@functools.cache
def kernel(
    source: str, name: str, *, shared_bytes: int = 0, early: bool = False, cluster: int = 1, architecture: str = ""
) -> Launch:
    """Compile one instance of a kernel template; call the result with grid, threads and arguments.

    Arguments are tensors, NumPy scalars or tile maps. Raises CompileError with NVRTC's log.
    early         launch while the previous kernel still runs (programmatic dependent launch); the kernel calls
                  wait_for_previous() of common.cuh before it reads what the previous kernel writes
    cluster       adjacent blocks that run together and read each other's shared memory
    architecture  such as sm_90a, for instructions that sm_90 lacks; NVRTC prefers it to the GPU's that CuPy names
    """
    if (requested := _requested_here()) is not None:
        requested.add((source, name, architecture))
        options: dict[str, Any] = {"shared_bytes": shared_bytes, "early": early, "cluster": cluster}
        compiled = functools.partial(kernel.__wrapped__, source, name, architecture=architecture, **options)
        return functools.partial(_launch_in_other_threads, threading.get_ident(), compiled)
    function, static_bytes = _compile(source, name, architecture)
    if static_bytes + shared_bytes > DEFAULT_SHARED_BYTES:
        # The device's maximum, not shared_bytes: instances of other sizes share the function.
        function.max_dynamic_shared_size_bytes = max_shared_bytes(torch.cuda.current_device()) - static_bytes

    attributes = [_early_attribute()] * early + [_cluster_attribute(cluster)] * (cluster > 1)
    parameters = LaunchParameters()

    def launch(grid: tuple[int, int], threads: int, *arguments: Argument) -> None:
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = *grid, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared_bytes
        config.hStream = _current_stream()
        if attributes:
            config.attrs, config.numAttrs = attributes, len(attributes)
        (status,) = driver.cuLaunchKernelEx(config, function.kernel.ptr, parameters.address_of(arguments), 0)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"cannot launch {name} on {grid} x {threads} threads: {status.name}")

    return launch


@functools.cache
def _compile(source: str, name: str, architecture: str) -> tuple[Any, int]:
    """Return a function of CuPy, and the bytes of its static shared memory."""
    templates = (name,) if "<" in name else None
    options = ("-std=c++17", f"-arch={architecture}") if architecture else ("-std=c++17",)
    try:
        module = cupy.RawModule(code=source_text(source), options=options, name_expressions=templates)
        function = module.get_function(name)
        return function, function.shared_size_bytes
    except cupy.cuda.compiler.CompileException as error:
        raise CompileError(f"NVRTC failed on {source}, {name}:\n{error}") from error


@contextmanager
def requested_kernels() -> Iterator[set[Instance]]:
    """Yield the set of kernels that the block requests for the first time; they are neither compiled nor launched.

    Other threads launch theirs. The results of the ops in the block are undefined. Capture them in a graph that is
    not replayed, or use them for nothing.
    """
    _requests.instances = requested = set[Instance]()
    try:
        yield requested
    finally:
        del _requests.instances
        kernel.cache_clear()  # it holds launches of nothing


def compile_kernels(instances: Iterable[Instance], device: torch.device, rank: int = 0, ranks: int = 1) -> None:
    """Compile kernels in threads, so that `kernel` has them at once: one after the other they take seconds.

    The ranks of a host need the same kernels and have one cache. Each compiles its share first, on its share of the
    cores, and then finds most of the others in the cache.
    """

    def compile_one(instance: Instance) -> None:
        torch.cuda.set_device(device)  # a new thread has device 0
        _compile(*instance)

    ordered = sorted(instances)
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // ranks)) as threads:
        for share in (ordered[rank::ranks], ordered):
            list(threads.map(compile_one, share))


def kept_zeros(user: str, count: int, device: torch.device) -> Tensor:
    """Return int32 zeros that a kernel uses at each launch, and leaves as zeros.

    They are not kept in a block of requested_kernels: its graph is never replayed, so nothing fills them.
    """
    zeros = _kept.get((user, device))
    if zeros is None:
        zeros = torch.zeros(count, dtype=torch.int32, device=device)
        if _requested_here() is None:
            _kept[user, device] = zeros
    return zeros


def _requested_here() -> set[Instance] | None:
    """Return the kernels that a block of requested_kernels in this thread has requested; None outside of one."""
    return getattr(_requests, "instances", None)


def _launch_in_other_threads(
    requester: int, compiled: Callable[[], Launch], grid: tuple[int, int], threads: int, *arguments: Argument
) -> None:
    """Launch nothing in the thread that only requests kernels; all threads have one cache of launches."""
    if threading.get_ident() != requester:
        compiled()(grid, threads, *arguments)


def _current_stream() -> int:
    """Return the handle of torch's current stream. torch.cuda.current_stream takes twenty times as long."""
    handle: int = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
    return handle


def tile_map(matrix: Tensor, box_rows: int) -> TileMap:
    """Return the TileMap argument of wgmma.cuh for boxes of a matrix [R, C]: box_rows by BOX_BYTES."""
    rows, columns = matrix.shape
    row_bytes = columns * matrix.element_size()
    return _tile_map(matrix.data_ptr(), (row_bytes, rows), (row_bytes,), (BOX_BYTES, box_rows))


def part_map(matrix: Tensor, box_rows: int, halves: int, parts: int) -> TileMap:
    """Return the TileMap argument of copy_parts in wgmma.cuh for boxes of a matrix [R, C]: box_rows by several parts.

    A part is BOX_BYTES of the columns. A box has one part after the other; C elements must be whole parts.
    halves  1, or 2 for boxes that have the same rows of both halves of the matrix
    """
    rows, columns = matrix.shape
    row_bytes = columns * matrix.element_size()
    assert row_bytes % BOX_BYTES == 0
    sizes = BOX_BYTES, rows // halves, halves, row_bytes // BOX_BYTES
    strides = row_bytes, rows // halves * row_bytes, BOX_BYTES
    return _tile_map(matrix.data_ptr(), sizes, strides, (BOX_BYTES, box_rows // halves, halves, parts))


@functools.lru_cache(maxsize=4096)
def _tile_map(address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> TileMap:
    """Return a map of bytes; the strides are those of all dimensions but the first."""
    status, encoded = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        len(sizes),
        address,
        list(map(driver.cuuint64_t, sizes)),
        list(map(driver.cuuint64_t, strides)),
        list(map(driver.cuuint32_t, box)),
        [driver.cuuint32_t(1)] * len(box),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"cannot describe a matrix of {sizes} bytes to TMA: {status.name}")
    return encoded


@functools.cache
def _early_attribute() -> Any:
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute


@functools.cache
def _cluster_attribute(blocks: int) -> Any:
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = blocks, 1, 1
    return attribute
