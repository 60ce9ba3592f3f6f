"""Collectives between GPUs: one rank of an NCCL group, without torch's process groups.

Collectives are queued on torch's current stream and never synchronize, so a CUDA graph can capture them. A GPU that
waits for a dead peer reports nothing. `wait` therefore waits for the results with a deadline, and ends the group after
it. `abort` ends the group from any thread.

The group is non-blocking in NCCL's sense: each call returns at once, perhaps with ncclInProgress, and `_finish` polls
until it is done. Only such a group can be aborted while NCCL still connects to a peer (NCCL's guide, "Fault
Tolerance").
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from .base import Communicator
from .nccl_library import IN_PROGRESS, SUCCESS, SUM, UINT8, CommConfig, Nccl, NcclError, UniqueId
from .rendezvous import Rendezvous

log = logging.getLogger(__name__)
ABORT_S = 2.0  # NCCL may take this long to abort; a thread that takes longer is left behind
CLOSE_S = 3.0  # when the group is closed, NCCL may take this long to finish the queued work
SPIN_S = 0.01  # most waits are this short, and a sleep would then cost more than a busy core
PAUSE_S = 0.0005
CHECK_S = 0.1  # interval of the checks for an error while the device is busy


class DeviceEvent(Protocol):
    """The part of torch.cuda.Event that `wait` uses."""

    def query(self) -> bool: ...


class NcclCommunicator(Communicator):
    """One rank of an NCCL group; all tensors are contiguous and on `device`. Empty tensors are not communicated.

    Results are written to `out` if it is given. all_gather is in place if x is out[rank]; all_reduce writes to x by
    default. A kernel has max_blocks blocks at most, or as many as NCCL chooses if None.
    Raises NcclError for failures and after the deadline, ValueError for a tensor that does not fit.
    """

    capturable = True

    def __init__(
        self, rendezvous: Rendezvous, *, nccl: Nccl, device: torch.device, max_blocks: int | None = None
    ) -> None:
        self.rank, self.size, self._timeout_s = rendezvous.rank, rendezvous.size, rendezvous.timeout_s
        self.description = f"{nccl}, {self.size} ranks, {nccl.path}"
        self._nccl, self._max_blocks = nccl, max_blocks
        self._lock = threading.Lock()  # no thread may be inside NCCL during an abort, or enter it afterwards
        self._comm: int | None = None
        self._operation, self._captured_operation = "joining", ""  # the latest ones; error messages name them
        self._token = torch.zeros(1, device=device)  # this also creates the CUDA context
        self._device = self._token.device
        self._join(rendezvous)
        self.barrier()

    def all_reduce(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        out = x if out is None else out
        count = x.numel(), self._nccl.reduction_type(x.dtype), SUM
        return self._collective("all_reduce", self._nccl.lib.ncclAllReduce, x, out, x.shape, *count)

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        shape = (self.size, *x.shape)
        out = x.new_empty(shape) if out is None else out
        return self._collective("all_gather", self._nccl.lib.ncclAllGather, x, out, shape, x.nbytes, UINT8)

    def barrier(self) -> None:
        self.all_reduce(self._token)
        self._operation = "barrier"
        self.wait(record_event(self._device))

    def wait(self, done: DeviceEvent) -> None:
        """Return once the device has reached `done`; ends the group at the deadline, or when NCCL reports an error."""
        started = checked = time.monotonic()
        while not done.query():
            now = time.monotonic()
            if now - started > self._timeout_s:
                # A graph starts collectives without a call of this class.
                graph = f" or {self._captured_operation} of a graph" if self._captured_operation else ""
                self._time_out(self._operation + graph, self._timeout_s)
            if now - checked > CHECK_S:
                checked = now
                self.check()
            time.sleep(PAUSE_S if now - started > SPIN_S else 0)
        self._call(self._operation, lambda comm: SUCCESS)  # an abort also ends the wait, with invalid results

    def check(self) -> None:
        """Raise NcclError, and end the group, if NCCL has met an error, here or at a peer."""
        self._raise_if_failed(self._operation, self._async_error())

    def abort(self) -> None:
        """End every wait for a peer, also on the device; returns after at most 2 * ABORT_S.

        Work on the device ends at once. NCCL itself waits until the graphs that hold its kernels are dropped.
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
        """Finish the queued work of all ranks and free the group. Drop the graphs with its collectives before."""
        if self._comm is None:
            return
        try:
            code = self._call("closing", self._nccl.lib.ncclCommFinalize)
            self._finish("closing", code, min(CLOSE_S, self._timeout_s))
            self._nccl.check(self._nccl.lib.ncclCommDestroy(self._take_comm()), self._label("closing"))
        except NcclError as error:
            log.warning("%s", error)  # the results are complete: this is no reason to fail

    def _join(self, rendezvous: Rendezvous) -> None:
        identity = rendezvous.exchange("nccl", self._nccl.unique_id().hex() if self.rank == 0 else "")[0]
        comm, config = ctypes.c_void_p(), CommConfig.nonblocking(self._max_blocks)
        with torch.cuda.device(self._device):
            code = self._nccl.lib.ncclCommInitRankConfig(
                ctypes.byref(comm), self.size, UniqueId.from_buffer_copy(bytes.fromhex(identity)), self.rank, config
            )
        self._comm = comm.value
        self._finish("joining", code, self._timeout_s)

    def _collective(
        self, operation: str, function: Any, x: Tensor, out: Tensor, shape: Sequence[int], *arguments: int
    ) -> Tensor:
        """Queue `function(x, out, *arguments)` on the current stream, unless x is empty, and return out [*shape]."""
        self._require(operation, "x", x, x.shape, x)
        self._require(operation, "out", out, shape, x)
        stream = torch.cuda.current_stream(self._device).cuda_stream
        if x.numel() > 0:
            self._run(operation, lambda comm: function(x.data_ptr(), out.data_ptr(), *arguments, comm, stream))
        return out

    def _run(self, operation: str, call: Callable[[int], int]) -> None:
        self._operation = operation
        if torch.cuda.is_current_stream_capturing():
            self._captured_operation = operation
        self._finish(operation, self._call(operation, call), self._timeout_s)

    def _call(self, operation: str, call: Callable[[int], int]) -> int:
        with self._lock:
            if self._comm is None:
                raise NcclError(f"{self._label(operation)} failed: the group has ended")
            return call(self._comm)

    def _take_comm(self) -> int | None:
        """Return the communicator, to end it, and let no thread use it again; wait ABORT_S for a thread inside NCCL."""
        acquired = self._lock.acquire(timeout=ABORT_S)
        comm, self._comm = self._comm, None
        if acquired:
            self._lock.release()
        return comm

    def _async_error(self) -> int:
        function, code = self._nccl.lib.ncclCommGetAsyncError, ctypes.c_int()
        return self._call(self._operation, lambda comm: int(function(comm, code))) or code.value

    def _finish(self, operation: str, code: int, timeout_s: float) -> None:
        """Poll until NCCL has finished, on the host, the call that returned `code`."""
        started = time.monotonic()
        while code == IN_PROGRESS:
            code = self._async_error()
            waited = time.monotonic() - started
            if code == IN_PROGRESS and waited > timeout_s:
                self._time_out(operation, timeout_s)
            time.sleep(PAUSE_S if waited > SPIN_S else 0)
        self._raise_if_failed(operation, code)

    def _raise_if_failed(self, operation: str, code: int) -> None:
        if code in (SUCCESS, IN_PROGRESS):
            return
        try:
            self._nccl.check(code, self._label(operation), self._comm)
        finally:
            self.abort()  # NCCL cannot continue after an error

    def _time_out(self, operation: str, timeout_s: float) -> NoReturn:
        self.abort()
        reason = "a peer is gone or silent"
        if operation == "joining":
            reason = "all ranks have come, but NCCL cannot connect them; NCCL_DEBUG=INFO says where it is stuck"
        raise NcclError(f"{self._label(operation)} took longer than {timeout_s:.0f} s: {reason}")

    def _label(self, operation: str) -> str:
        return f"rank {self.rank} of {self.size}: {operation}"

    def _require(self, operation: str, name: str, x: Tensor, shape: Sequence[int], like: Tensor) -> None:
        """Raise ValueError unless x has this shape, the dtype of `like` and memory that NCCL can read or write."""
        if x.shape != torch.Size(shape) or x.dtype != like.dtype:
            needed = f"{list(shape)} {like.dtype}"
            raise ValueError(f"{operation}: {name} {list(x.shape)} {x.dtype} must be {needed}, to match x")
        if x.device != self._device:
            raise ValueError(f"{operation}: {name} is on {x.device}; this group's tensors are on {self._device}")
        if not x.is_contiguous():
            strides = f"{list(x.shape)} with strides {list(x.stride())}"
            raise ValueError(f"{operation}: {name} {strides} must be contiguous: copy it")


def record_event(device: torch.device) -> DeviceEvent:
    """Return an event that the device reaches after the work that is queued now."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
