"""The compilation of a model's kernels in threads at start: one after the other, at their first launch, takes seconds.

The instances of kernels depend on the model, the dtypes and the GPU. Decode steps that are captured with launches left
out name theirs; these graphs are never replayed.
"""

from __future__ import annotations

import torch

from ...comm.base import SingleRank
from ...kernels import ops
from ...kernels.graph_capture import capture
from ..model.embedding import Logits
from ..model.weights import Weights
from ..sampling.sampler import METHODS
from .graphs import decode_step, graph_sizes, padding_inputs, resample_candidates
from .rank_memory import RankMemory

FEW_ROWS = 8  # more rows may go through cuBLAS, whose first call must not be captured
TENS_OF_ROWS = 16, 32, 64  # of the instances of stream_gemm


@torch.inference_mode()
def compile_decode_kernels(memory: RankMemory, max_rows: int) -> None:
    """Compile the kernels of decode steps of few rows, of GEMMs of tens of rows, and of sampling.

    Call it before any step runs.

    Raises RuntimeError if the steps cannot be captured.
    """
    from ...kernels.cuda.kernel_launch import compile_kernels, requested_kernels  # imports CuPy

    with requested_kernels() as instances:
        for size in [size for size in graph_sizes(max_rows) if size <= FEW_ROWS]:
            inputs = padding_inputs(memory, size)
            with capture(torch.cuda.CUDAGraph()):
                resample_candidates(memory, inputs, *decode_step(memory, inputs))
        _multiply_tens_of_rows(memory.decoder.weights)
        _sample_in_all_ways(memory)
    comm = memory.decoder.comm
    compile_kernels(instances, memory.device, comm.rank, comm.size)


def _multiply_tens_of_rows(weights: Weights) -> None:
    """Do a linear layer of each shape for each number of rows that has a kernel; without capture, because of cuBLAS."""
    for (_, gated), weight in weights.linear.items():
        for rows in TENS_OF_ROWS:
            x = weight.new_zeros(rows, weight.shape[1])
            ops.linear(x, weight, gated=gated, batch_invariant=weights.batch_invariant)


def _sample_in_all_ways(memory: RankMemory) -> None:
    """Sample from logits of the whole vocabulary, as `Runner` does outside of graphs."""
    vocab_size, params = memory.decoder.head.vocab_size, padding_inputs(memory, 1).params
    logits = Logits(SingleRank(), torch.zeros(1, vocab_size, device=memory.device), vocab_size)
    for sample in METHODS.values():
        sample(logits, params)
