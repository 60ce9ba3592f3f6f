"""Collectives over peer buffers for small messages; NCCL serves the others.

An all-reduce of a decode step lasts a few microseconds, most of which NCCL spends on its protocol. Here the partial
sums already lie where the peers read them, and one kernel also adds the residual stream and applies its norm. Imports
CuPy, so only code that runs on GPUs imports this module.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import ops, peer_memory
from ..kernels.arguments import Matrix, Rows
from ..kernels.cuda import gemm
from .all_reduce_names import AllReduceAlgorithm
from .all_reduce_policy import SUMMED_DTYPES, AllReducePolicy
from .base import CommError, Communicator
from .nccl import DeviceEvent, NcclCommunicator, record_event
from .peer_buffers import PeerBuffers


class PushedSum(NamedTuple):
    """A partial sum of `linear` that all ranks push: their GEMMs have sent it, or it is stored and still to be sent."""

    partial: Tensor  # [T, D]; on the meta device, without elements, if it has been sent
    is_sent: bool


class SymmetricCommunicator(Communicator):
    """Small messages over peer buffers, others over NCCL.

    Sums of floats are bitwise identical on all ranks and in all runs.
    """

    capturable = True
    uses_rendezvous = True

    def __init__(
        self, nccl: NcclCommunicator, buffers: PeerBuffers, policy: AllReducePolicy, device: torch.device
    ) -> None:
        self.rank, self.size = nccl.rank, nccl.size
        self.description = f"{nccl.description}; peer memory: {policy}"
        self.policy = policy
        self._nccl, self._buffers, self._device = nccl, buffers, device
        self._step = 1  # counts the waits for results; error messages name it
        self._ended = False
        self._pushed: PushedSum | None = None  # until its all_reduce_add_rms_norm
        self._token = torch.zeros(16, dtype=torch.uint8, device=device)

    def with_policy(self, policy: AllReducePolicy) -> SymmetricCommunicator:
        """Return a communicator with another policy over the same buffers; close only one of them.

        GEMMs of ranks that share a GPU push nothing: a kernel that waits for a peer may keep its GEMM from the GPU.
        """
        if self._buffers.shares_device:
            policy = replace(policy, gemm_bytes=0)
        return SymmetricCommunicator(self._nccl, self._buffers, policy, self._device)

    def set_timeout(self, seconds: float) -> None:
        """Set how long kernels that are queued from now on wait for a peer."""
        self._buffers.set_timeout(seconds)

    def compile_sums(self, columns: int, dtype: torch.dtype) -> None:
        """Compile the kernels for rows of this shape; without it each is compiled at its first call."""
        if dtype in SUMMED_DTYPES and peer_memory.fits_norm(columns, dtype):
            peer_memory.compile_sums(columns, dtype, self._buffers.peers)

    def uses_peer_memory(self, nbytes: int, dtype: torch.dtype) -> bool:
        """Return whether a sum of this size goes through peer memory instead of NCCL."""
        return self.policy.algorithm(nbytes, dtype) != "nccl"

    def gemms_push(self, rows: int, columns: int, dtype: torch.dtype) -> bool:
        if not self.policy.lets_gemms_push(rows, columns, dtype):
            return False
        return peer_memory.fits_push(columns * dtype.itemsize) and peer_memory.fits_norm(columns, dtype)

    def buffer(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor | None:
        if self._algorithm(columns * dtype.itemsize, dtype, rows) in ("nccl", "push"):
            return None
        return self._buffers.input((rows, columns), dtype)

    def linear(self, x: Rows, weight: Matrix, bias: Tensor | None, *, batch_invariant: bool = False) -> Tensor:
        columns = weight.shape[0]
        if batch_invariant or not self.gemms_push(len(x), columns, x.dtype):
            return super().linear(x, weight, bias, batch_invariant=batch_invariant)
        self._begin()
        # Whether the sum is pushed depends only on what is equal on all ranks. Whether the GEMM sends it may depend on
        # the rank's columns, scales and addresses: the kernel of all_reduce_add_rms_norm else sends the same words in
        # the same round, and the peers cannot tell the two apart.
        if gemm.can_send(x, weight):
            gemm.send_linear(x, weight, bias, self._buffers.peers.fields, self.size)
            self._pushed = PushedSum(x.new_empty(len(x), columns, device="meta"), is_sent=True)
        else:
            self._pushed = PushedSum(ops.linear(x, weight, bias), is_sent=False)
        return self._pushed.partial

    def all_reduce(self, x: Tensor) -> Tensor:
        slices = self.policy.sliced(x)
        if len(slices) > 1:
            return torch.cat([self.all_reduce(rows) for rows in slices])
        self._begin()
        algorithm = self._algorithm(x.nbytes, x.dtype)
        if algorithm == "nccl":
            return self._nccl.all_reduce(x)
        x, peers = x.contiguous(), self._buffers.peers
        out = torch.empty_like(x)
        if algorithm == "push":
            peer_memory.push_all_reduce(out, _aligned(x), peers)
        elif algorithm == "one-shot":
            peer_memory.one_shot_all_reduce(out, x, peers, self._buffers.take_buffer_index())
        else:
            peer_memory.two_shot_all_reduce(out, x, peers, self._buffers.take_buffer_index())
        return out

    def all_gather(self, x: Tensor) -> Tensor:
        self._begin()
        if 0 < x.nbytes <= self.policy.gather_bytes:
            return self._gather(x.contiguous(), "all_gather")
        return self._nccl.all_gather(x)

    def barrier(self) -> None:
        self._begin()
        self._gather(self._token, "barrier")
        self._wait(record_event(self._device))

    def all_reduce_add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        if self._pushed is not None and self._pushed.partial is x:
            pushed, self._pushed = self._pushed, None
            return self._add_rms_norm_of_pushed(pushed, residual, weight, eps)
        slices = self.policy.sliced(x)
        if len(slices) > 1:
            pairs = zip(slices, self.policy.sliced(residual), strict=True)
            return torch.cat([self.all_reduce_add_rms_norm(rows, sums, weight, eps) for rows, sums in pairs])
        algorithm = self._algorithm(x.shape[-1] * x.element_size(), x.dtype, rows=len(x))
        if algorithm == "nccl" or not peer_memory.fits_norm(x.shape[-1], x.dtype):
            return ops.add_rms_norm(self.all_reduce(x), residual, weight, eps)
        self._begin()
        out, total = torch.empty_like(x), _aligned(residual)
        x, weight, peers = _aligned(x), _aligned(weight), self._buffers.peers
        rows, columns = x.shape
        if algorithm == "push":
            peer_memory.push_all_reduce_add_rms_norm(out, x, total, weight, eps, peers)
        elif algorithm == "two-shot" and peer_memory.fits_two_pushes(rows, columns, x.dtype, peers):
            peer_memory.two_push_add_rms_norm(out, x, total, weight, eps, peers)
        else:
            buffer_index, two_shot = self._buffers.take_buffer_index(), algorithm == "two-shot"
            peer_memory.all_reduce_add_rms_norm(out, x, total, weight, eps, peers, buffer_index, two_shot=two_shot)
        if total is not residual:
            residual.copy_(total)
        return out

    def _add_rms_norm_of_pushed(self, pushed: PushedSum, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        self._begin()
        out, total = residual.new_empty(residual.shape), _aligned(residual)
        weight, peers = _aligned(weight), self._buffers.peers
        if pushed.is_sent:
            peer_memory.receive_add_rms_norm(out, total, weight, eps, peers)
        else:
            peer_memory.push_all_reduce_add_rms_norm(out, pushed.partial, total, weight, eps, peers)
        if total is not residual:
            residual.copy_(total)
        return out

    def wait(self, done: DeviceEvent) -> None:
        self._wait(done)
        self._step += 1

    def abort(self) -> None:
        self._ended = True
        self._buffers.stop()
        self._nccl.abort()

    def close(self) -> None:
        """Close NCCL, then the buffers: no kernel uses them any more, as none waits longer than its timeout."""
        self._nccl.close()
        torch.cuda.synchronize(self._device)
        self._buffers.close()

    def _algorithm(self, nbytes: int, dtype: torch.dtype, rows: int = 1) -> AllReduceAlgorithm:
        """Return the algorithm for so many rows of `nbytes`, which depends on no address: all ranks choose alike."""
        algorithm = self.policy.algorithm(rows * nbytes, dtype)
        return "one-shot" if algorithm == "push" and not peer_memory.fits_push(nbytes) else algorithm

    def _gather(self, x: Tensor, operation: str) -> Tensor:
        out = x.new_empty(self.size, *x.shape)
        parts, part = out.view(-1).view(torch.uint8), x.view(-1).view(torch.uint8)
        peer_memory.all_gather(parts, part, self._buffers.peers, self._buffers.take_buffer_index(), operation)
        return out

    def _wait(self, done: DeviceEvent) -> None:
        self._nccl.wait(_CheckedEvent(done, self))
        self._check()  # kernels that timed out end as well, with invalid results

    def _begin(self) -> None:
        """Raise CommError if the group has failed, RuntimeError if a pushed sum must be completed first."""
        if self._pushed is not None:
            raise RuntimeError("the sum of `linear` must be that of the next collective, an all_reduce_add_rms_norm")
        self._check()

    def _check(self) -> None:
        """Raise CommError, and end the group, if a wait of the device for a peer has timed out."""
        timeout = self._buffers.timeout()
        if timeout is not None:
            self.abort()
            raise CommError(
                f"rank {self.rank} of {self.size}: {timeout.operation} in step {self._step} has waited"
                f" {self._buffers.timeout_s:.1f} s for rank {', '.join(map(str, timeout.ranks))}, which is gone or"
                f" silent (round {timeout.round})"
            )
        if self._ended:
            raise CommError(f"rank {self.rank} of {self.size}: the group has ended")


@dataclass(frozen=True)
class _CheckedEvent:
    """An event; each query raises CommError if a wait of the device has timed out."""

    done: DeviceEvent
    comm: SymmetricCommunicator

    def query(self) -> bool:
        self.comm._check()
        return self.done.query()


def _aligned(x: Tensor) -> Tensor:
    """Return x, or a copy if it is not contiguous or not at a multiple of 16 bytes."""
    return x if x.data_ptr() % 16 == 0 and x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)
