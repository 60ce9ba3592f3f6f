"""The C interface of libnccl through ctypes: functions, configuration, dtypes and error messages.

A process uses one libnccl: by default the one that torch has mapped, so that no second copy of its 250 MB is loaded.
A library that the user names by path is loaded beside torch's. Torch always maps its copy at import, but calls it only
for process groups, which lockstep does not make. The two copies never call into each other (RTLD_DEEPBIND).

Signatures, numbers and layouts are from nccl.h 2.32.3, compared with 2.28.9; NCCL only ever appends to them.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from ctypes import POINTER, c_char, c_char_p, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path
from typing import Any

import torch

from .base import CommError

SUCCESS, IN_PROGRESS = 0, 7  # ncclResult_t
SUM = 0  # ncclRedOp_t
UINT8 = 1  # ncclDataType_t
WINDOW_SYMMETRIC = 1  # NCCL_WIN_COLL_SYMMETRIC
FP8_SINCE = 22400
SHARED_GPU_SINCE = 23000  # several ranks on one GPU, with NCCL_MULTI_RANK_GPU_ENABLE=1
UNDEFINED = -(2**31)  # NCCL_CONFIG_UNDEF_INT

# ncclDataType_t of each dtype, which counts from 0 in this order
REDUCTION_TYPES = {
    dtype: code
    for code, dtype in enumerate((
        torch.int8, torch.uint8, torch.int32, torch.uint32, torch.int64, torch.uint64, torch.float16, torch.float32,
        torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    ))
}  # fmt: skip


class NcclError(CommError):
    """NCCL failed, timed out or cannot be used; the message has NCCL's text, the operation, the rank and the size."""


class UniqueId(ctypes.Structure):
    """ncclUniqueId, the identity of a group; NCCL takes it by value."""

    _fields_ = [("internal", c_char * 128)]


class CommConfig(ctypes.Structure):
    """ncclConfig_t of 2.28. Newer libraries fill in the fields appended since, older ones ignore those they lack."""

    _fields_ = [
        ("size", c_size_t), ("magic", c_uint), ("version", c_uint), ("blocking", c_int), ("cga_cluster_size", c_int),
        ("min_ctas", c_int), ("max_ctas", c_int), ("net_name", c_char_p), ("split_share", c_int),
        ("traffic_class", c_int), ("comm_name", c_char_p), ("collnet_enable", c_int), ("cta_policy", c_int),
        ("shrink_share", c_int), ("nvls_ctas", c_int), ("channels_per_net_peer", c_int),
        ("nvlink_centric_sched", c_int),
    ]  # fmt: skip

    @classmethod
    def nonblocking(cls, max_ctas: int | None = None) -> CommConfig:
        """Return a configuration with calls that return at once, so that a deadline can abort the group.

        max_ctas  maximum blocks of a kernel; NCCL's own choice if None
        """
        unset = {field[0]: UNDEFINED for field in cls._fields_ if field[1] is c_int}
        header = {"size": ctypes.sizeof(cls), "magic": 0xCAFEBEEF, "version": 22800}
        return cls(**{**unset, **header, "blocking": 0, **({} if max_ctas is None else {"max_ctas": max_ctas})})


_OUT = POINTER(c_void_p)
_COMM = _STREAM = c_void_p

# The functions that a communicator calls, with the types of their arguments; any libnccl since 2.18 has them.
REQUIRED: dict[str, list[Any]] = {
    "ncclGetVersion": [POINTER(c_int)],
    "ncclGetUniqueId": [POINTER(UniqueId)],
    "ncclGetErrorString": [c_int],
    "ncclGetLastError": [_COMM],
    "ncclCommInitRankConfig": [_OUT, c_int, UniqueId, c_int, POINTER(CommConfig)],
    "ncclCommGetAsyncError": [_COMM, POINTER(c_int)],
    "ncclCommFinalize": [_COMM],
    "ncclCommDestroy": [_COMM],
    "ncclCommAbort": [_COMM],
    "ncclAllReduce": [c_void_p, c_void_p, c_size_t, c_int, c_int, _COMM, _STREAM],
    "ncclAllGather": [c_void_p, c_void_p, c_size_t, c_int, _COMM, _STREAM],
}
# The rest of the API. A library may lack these functions: call `require` before the first use.
OPTIONAL: dict[str, list[Any]] = {
    "ncclCommInitRank": [_OUT, c_int, UniqueId, c_int],
    "ncclCommSplit": [_COMM, c_int, c_int, _OUT, POINTER(CommConfig)],
    "ncclReduceScatter": [c_void_p, c_void_p, c_size_t, c_int, c_int, _COMM, _STREAM],
    "ncclBroadcast": [c_void_p, c_void_p, c_size_t, c_int, c_int, _COMM, _STREAM],
    "ncclReduce": [c_void_p, c_void_p, c_size_t, c_int, c_int, c_int, _COMM, _STREAM],
    "ncclSend": [c_void_p, c_size_t, c_int, c_int, _COMM, _STREAM],
    "ncclRecv": [c_void_p, c_size_t, c_int, c_int, _COMM, _STREAM],
    "ncclGroupStart": [],
    "ncclGroupEnd": [],
    "ncclMemAlloc": [_OUT, c_size_t],
    "ncclMemFree": [c_void_p],
    "ncclCommRegister": [_COMM, c_void_p, c_size_t, _OUT],
    "ncclCommDeregister": [_COMM, c_void_p],
    "ncclCommWindowRegister": [_COMM, c_void_p, c_size_t, _OUT, c_int],
    "ncclCommWindowDeregister": [_COMM, c_void_p],
}
OLDEST = 21800  # the version that has all functions without an entry here
SINCE = {
    "ncclMemAlloc": 21900, "ncclMemFree": 21900, "ncclCommRegister": 21900, "ncclCommDeregister": 21900,
    "ncclCommWindowRegister": 22700, "ncclCommWindowDeregister": 22700,
}  # fmt: skip


class Nccl:
    """One loaded libnccl; `lib` has its functions. Raises NcclError if it cannot be loaded or is too old."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            # DEEPBIND: NCCL calls some of its exported functions by name and would find those of the copy that torch
            # brought into the global scope.
            self.lib = ctypes.CDLL(path, mode=os.RTLD_NOW | os.RTLD_DEEPBIND)
        except OSError as error:
            raise NcclError(f"libnccl cannot be loaded: {error}; nccl_library is the path of one") from error
        missing = self._missing(REQUIRED)
        if missing:
            raise NcclError(f"{path} lacks {', '.join(missing)}; use a libnccl of 2.18 or newer")
        for name, types in {**REQUIRED, **OPTIONAL}.items():
            function = getattr(self.lib, name, None)
            if function is not None:
                function.argtypes = types
                function.restype = c_char_p if name in ("ncclGetErrorString", "ncclGetLastError") else c_int
        version = c_int()
        self.check(self.lib.ncclGetVersion(ctypes.byref(version)), "ncclGetVersion")
        self.version = version.value

    def __str__(self) -> str:
        return f"NCCL {version_text(self.version)}"

    def require(self, *functions: str) -> None:
        """Raise NcclError that names the functions that this library lacks, if any."""
        missing = self._missing(functions)
        if missing:
            since = version_text(max(SINCE.get(name, OLDEST) for name in missing))
            raise NcclError(f"{self} at {self.path} lacks {', '.join(missing)}; use {since} or newer")

    def reduction_type(self, dtype: torch.dtype) -> int:
        """Return the ncclDataType_t for sums of `dtype`; raises ValueError if this library cannot add it.

        Collectives that only move data send bytes of any dtype.
        """
        if dtype not in REDUCTION_TYPES or (dtype.itemsize == 1 and dtype.is_floating_point and self._lacks_fp8):
            since = f" and fp8 since {version_text(FP8_SINCE)}" if self._lacks_fp8 else ""
            raise ValueError(f"{self} cannot add {dtype}; it adds 1-, 4- and 8-byte integers and floats{since}")
        return REDUCTION_TYPES[dtype]

    def unique_id(self) -> bytes:
        """Return a new group's identity, which rank 0 makes and all ranks need to join."""
        identity = UniqueId()
        self.check(self.lib.ncclGetUniqueId(ctypes.byref(identity)), "ncclGetUniqueId")
        return bytes(identity)

    def check(self, code: int, operation: str, comm: int | None = None) -> None:
        """Raise NcclError with NCCL's messages unless `code` is ncclSuccess."""
        if code == SUCCESS:
            return
        message = self.lib.ncclGetErrorString(code).decode()
        details = (self.lib.ncclGetLastError(comm) or b"").decode(errors="replace").strip()
        raise NcclError(f"{operation} failed: {message}" + (f" ({' '.join(details.split())})" if details else ""))

    @property
    def _lacks_fp8(self) -> bool:
        return self.version < FP8_SINCE

    def _missing(self, functions: Iterable[str]) -> list[str]:
        return [name for name in functions if not hasattr(self.lib, name)]


_opened: dict[str, Nccl] = {}


def open_library(path: str | None) -> Nccl:
    """Return this process's libnccl: the one at `path`, or torch's. Raises NcclError if another one is in use."""
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast only if the user asks for it; read once, at load
    if path is None and _opened:
        return next(iter(_opened.values()))
    real = os.path.realpath(path or _torch_library())
    if _opened and real not in _opened:
        raise NcclError(f"this process uses {next(iter(_opened))} already; {real} needs another process")
    if real not in _opened:
        _opened[real] = Nccl(real)
    return _opened[real]


def mapped_libraries() -> list[str]:
    """Return the paths of the libnccl that this process has mapped, in the order of their addresses."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = [line.split(maxsplit=5)[5] for line in lines if "/libnccl.so" in line]
    return list(dict.fromkeys(paths))


def version_text(version: int) -> str:
    """Return a human-readable version: 23203 -> "2.32.3"."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _torch_library() -> str:
    """Return the path of torch's libnccl: the one mapped when torch was imported, or the wheel installed beside it."""
    wheels = (Path(folder, "nvidia/nccl/lib/libnccl.so.2") for folder in sys.path)
    candidates = [*mapped_libraries(), *(str(path) for path in wheels if path.is_file())]
    if not candidates:
        raise NcclError("torch has brought no libnccl and no nvidia-nccl wheel is installed; nccl_library is its path")
    return candidates[0]
