"""Collectives between GPUs: one rank of an NCCL group, without torch's process groups.

All collectives go to torch's current stream and return once they are queued there; none of them synchronizes, so they
can be captured in a CUDA graph. A GPU that waits for a dead peer tells nobody: who waits for the results does so by
`wait`, which keeps the deadline and ends the group. `abort` ends it from any thread.

The group is non-blocking in NCCL's sense: each call returns at once, perhaps with "in progress", and `_settle` polls
until it is over. Only such a group can be given up while NCCL still connects to a peer (NCCL's guide, "Fault
Tolerance").
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NoReturn, Protocol

import torch
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]  # exported, but not in its stubs

from .base import Communicator
from .nccl_library import IN_PROGRESS, SUCCESS, SUM, UINT8, WINDOW_SYMMETRIC, CommConfig, Nccl, NcclError, UniqueId
from .rendezvous import exchange

log = logging.getLogger(__name__)
ABORT_S = 2.0  # for NCCL to abort, then it is left behind
CLOSE_S = 3.0  # for NCCL to finish what is queued when the group is closed
SPIN_S = 0.01  # waits are this short as a rule, and then a sleep costs more than a core
PAUSE_S = 0.0005
CHECK_S = 0.1  # between two looks for an error while the device works


class Done(Protocol):
    """What torch.cuda.Event is to `wait`."""

    def query(self) -> bool: ...


@dataclass(frozen=True)
class Window:
    """Memory from ncclMemAlloc, registered; `handle` is 0 where NCCL has none of it and uses its ordinary kernels."""

    address: int
    nbytes: int
    handle: int


class NcclCommunicator(Communicator):
    """One rank; all tensors are contiguous and on `device`. Empty tensors are no communication at all.

    A result goes to `out` where that is given. all_gather is in place if x is out[rank], reduce_scatter if out is
    x[rank], which it is by default; all_reduce's default is x itself.
    Raises NcclError for failures and after timeout_s, ValueError for a tensor that does not fit.
    Its kernels have max_blocks blocks at most, as many as NCCL likes if None.
    """

    capturable = True

    def __init__(
        self,
        rank: int,
        size: int,
        *,
        store: Store,
        nccl: Nccl,
        device: torch.device,
        timeout_s: float,
        max_blocks: int | None = None,
    ) -> None:
        self.rank, self.size = rank, size
        self.description = f"{nccl}, {size} ranks, {nccl.path}"
        self._nccl, self._timeout_s, self._max_blocks = nccl, timeout_s, max_blocks
        self._inside = threading.Lock()  # nobody may be inside NCCL during an abort, and nobody after it
        self._comm: int | None = None
        self._latest, self._captured = "joining", ""
        self._token = torch.zeros(1, device=device)  # makes the context, too
        self._device = self._token.device
        self._join(store)
        self.barrier()

    def all_reduce(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        out = x if out is None else out
        self._require("all_reduce", "x", x, x.shape, x)
        self._require("all_reduce", "out", out, x.shape, x)
        add, kind, stream = self._nccl.lib.ncclAllReduce, self._nccl.reduction_type(x.dtype), _stream(self._device)
        if x.numel() > 0:
            self._run("all_reduce", lambda c: add(x.data_ptr(), out.data_ptr(), x.numel(), kind, SUM, c, stream))
        return out

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        shape = (self.size, *x.shape)
        out = x.new_empty(shape) if out is None else out
        self._require("all_gather", "x", x, x.shape, x)
        self._require("all_gather", "out", out, shape, x)
        gather, stream = self._nccl.lib.ncclAllGather, _stream(self._device)
        if x.numel() > 0:
            self._run("all_gather", lambda c: gather(x.data_ptr(), out.data_ptr(), x.nbytes, UINT8, c, stream))
        return out

    def reduce_scatter(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        self._require("reduce_scatter", "x", x, (self.size, *x.shape[1:]), x)
        out = x[self.rank] if out is None else out
        self._require("reduce_scatter", "out", out, x.shape[1:], x)
        add, kind, stream = self._nccl.lib.ncclReduceScatter, self._nccl.reduction_type(x.dtype), _stream(self._device)
        if x.numel() > 0:
            self._run("reduce_scatter", lambda c: add(x.data_ptr(), out.data_ptr(), out.numel(), kind, SUM, c, stream))
        return out

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        self._require("broadcast", "x", x, x.shape, x)
        send, stream = self._nccl.lib.ncclBroadcast, _stream(self._device)
        if x.numel() > 0:
            self._run("broadcast", lambda c: send(x.data_ptr(), x.data_ptr(), x.nbytes, UINT8, root, c, stream))
        return x

    def barrier(self) -> None:
        self.all_reduce(self._token)
        self._latest = "barrier"
        self.wait(_record(self._device))

    def window(self, nbytes: int) -> Window:
        """Zeroed memory that all ranks have registered, where NCCL's symmetric kernels read and write; collective.

        Raises NcclError where the library has no windows. Free it before the group is closed.
        """
        lib = self._nccl.lib
        self._nccl.require("ncclMemAlloc", "ncclCommWindowRegister", "ncclCommWindowDeregister")
        memory, handle = ctypes.c_void_p(), ctypes.c_void_p()
        self._nccl.check(lib.ncclMemAlloc(ctypes.byref(memory), nbytes), self._who("ncclMemAlloc"))
        assert memory.value is not None
        register, out = lib.ncclCommWindowRegister, ctypes.byref(handle)
        self._run("window", lambda c: register(c, memory.value, nbytes, out, WINDOW_SYMMETRIC))
        return Window(memory.value, nbytes, handle.value or 0)

    def free(self, window: Window) -> None:
        """Give back what `window` gave; collective, and nothing that uses it is queued."""
        free = self._nccl.lib.ncclCommWindowDeregister
        self._run("window", lambda c: free(c, window.handle))
        self._nccl.check(self._nccl.lib.ncclMemFree(window.address), self._who("ncclMemFree"))

    def wait(self, done: Done) -> None:
        """Returns once the device has reached `done`; ends the group after timeout_s, or when NCCL reports an error."""
        started = looked = time.monotonic()
        while not done.query():
            now = time.monotonic()
            if now - started > self._timeout_s:
                # A graph starts without a call of ours.
                graphs = f" or {self._captured} of a graph" if self._captured else ""
                self._give_up(self._latest + graphs, self._timeout_s)
            if now - looked > CHECK_S:
                looked = now
                self.check()
            time.sleep(PAUSE_S if now - started > SPIN_S else 0)
        self._enter(self._latest, lambda comm: SUCCESS)  # an abort ends the wait as well, with garbage

    def check(self) -> None:
        """Raises NcclError, and ends the group, if NCCL has met an error, its own or a peer's."""
        self._raise_if_failed(self._latest, self._async_error())

    def abort(self) -> None:
        """End whatever waits for a peer, also on the device; returns after at most 2 * ABORT_S.

        What is on the device ends at once; NCCL itself waits for graphs that hold its kernels to be dropped.
        """
        comm = self._take_comm()
        if comm is None:
            return
        thread = threading.Thread(target=self._nccl.lib.ncclCommAbort, args=(comm,), name="nccl-abort", daemon=True)
        thread.start()
        thread.join(ABORT_S)
        if thread.is_alive():
            log.warning("rank %d of %d: NCCL has not aborted within %.0f s", self.rank, self.size, ABORT_S)

    def close(self) -> None:
        """Finish what is queued, on all ranks, and free the group. Drop the graphs that hold its collectives before."""
        if self._comm is None:
            return
        try:
            finalized = self._enter("closing", self._nccl.lib.ncclCommFinalize)
            self._settle("closing", finalized, min(CLOSE_S, self._timeout_s))
            self._nccl.check(self._nccl.lib.ncclCommDestroy(self._take_comm()), self._who("closing"))
        except NcclError as error:
            log.warning("%s", error)  # the results are there: this is no reason to fail

    def _join(self, store: Store) -> None:
        name = self._nccl.unique_id().hex() if self.rank == 0 else ""
        name = exchange(store, "nccl", name, self.rank, self.size, self._timeout_s)[0]
        comm, config = ctypes.c_void_p(), CommConfig.nonblocking(self._max_blocks)
        with _using(self._device):
            code = self._nccl.lib.ncclCommInitRankConfig(
                ctypes.byref(comm), self.size, UniqueId.from_buffer_copy(bytes.fromhex(name)), self.rank, config
            )
        self._comm = comm.value
        self._settle("joining", code, self._timeout_s)

    def _run(self, operation: str, call: Callable[[int], int]) -> None:
        self._latest = operation
        if _is_capturing():
            self._captured = operation
        self._settle(operation, self._enter(operation, call), self._timeout_s)

    def _enter(self, operation: str, call: Callable[[int], int]) -> int:
        with self._inside:
            if self._comm is None:
                raise NcclError(f"{self._who(operation)} failed: the group has ended")
            return call(self._comm)

    def _take_comm(self) -> int | None:
        """The communicator, for its end; nobody enters it afterwards. Does not wait for ever for who is inside."""
        free = self._inside.acquire(timeout=ABORT_S)
        comm, self._comm = self._comm, None
        if free:
            self._inside.release()
        return comm

    def _async_error(self) -> int:
        ask, code = self._nccl.lib.ncclCommGetAsyncError, ctypes.c_int()
        asked = self._enter(self._latest, lambda comm: int(ask(comm, code)))
        return asked or code.value

    def _settle(self, operation: str, code: int, timeout_s: float) -> None:
        """Poll until NCCL has done, on the host, what returned `code`."""
        started = time.monotonic()
        while code == IN_PROGRESS:
            code = self._async_error()
            waited = time.monotonic() - started
            if code == IN_PROGRESS and waited > timeout_s:
                self._give_up(operation, timeout_s)
            time.sleep(PAUSE_S if waited > SPIN_S else 0)
        self._raise_if_failed(operation, code)

    def _raise_if_failed(self, operation: str, code: int) -> None:
        if code in (SUCCESS, IN_PROGRESS):
            return
        try:
            self._nccl.check(code, self._who(operation), self._comm)
        finally:
            self.abort()  # NCCL offers no other way on

    def _give_up(self, operation: str, timeout_s: float) -> NoReturn:
        self.abort()
        why = "a peer is gone or silent"
        if operation == "joining":
            why = "all ranks have come, but NCCL cannot connect them; NCCL_DEBUG=INFO says where it is stuck"
        raise NcclError(f"{self._who(operation)} took longer than {timeout_s:.0f} s: {why}")

    def _who(self, operation: str) -> str:
        return f"rank {self.rank} of {self.size}: {operation}"

    def _require(self, operation: str, name: str, x: Tensor, shape: Sequence[int], like: Tensor) -> None:
        """Raises ValueError unless NCCL can read or write x as it lies in memory, and it is what it should be."""
        if x.shape != torch.Size(shape) or x.dtype != like.dtype:
            raise ValueError(
                f"{operation}: {name} {list(x.shape)} {x.dtype} must be {list(shape)} {like.dtype}, as x asks for"
            )
        if x.device != self._device:
            raise ValueError(f"{operation}: {name} is on {x.device}; this group's tensors are on {self._device}")
        if not x.is_contiguous():
            raise ValueError(
                f"{operation}: {name} {list(x.shape)} with strides {list(x.stride())} must be contiguous: copy it"
            )


def _using(device: torch.device) -> AbstractContextManager[None]:
    """`device` as the one of this thread."""
    return torch.cuda.device(device)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _is_capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _record(device: torch.device) -> Done:
    """Reached when the device has done all that is queued now."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
