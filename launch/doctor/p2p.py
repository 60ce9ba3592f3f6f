"""The peer-to-peer check: copies between each pair of GPUs, made in a child process because a copy can hang.

The child process imports torch while its parent does.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Literal

from ...runtime.config import Config
from ..child_process import ChildFailed, ChildProcess, calling

DEADLINE_S = 20.0
NUM_ELEMENTS = 1 << 20  # each copy has this many int64
GPU_FILES = "nvidia[0-9]*"  # the device files in /dev

PairResult = Literal["direct", "staged", "wrong"]  # staged: copied through host memory; wrong: bits changed
PairResults = dict[str, PairResult]  # keys like "0 to 1"


class P2PCheck(ChildProcess):
    """A process that copies between all pairs of the first `gpus` GPUs; always call `close`."""

    def __init__(self, gpus: int) -> None:
        super().__init__([*calling(copy_between_all), str(gpus)])

    def result(self) -> PairResults:
        """Return the result of each pair; raises ValueError if the process fails or is silent for DEADLINE_S."""
        try:
            results: PairResults = self.answer(DEADLINE_S)
        except TimeoutError as error:
            raise ValueError(
                f"copies between the GPUs hang, nothing after {DEADLINE_S:.0f} s; see dmesg for Xid errors, and try"
                " NCCL_P2P_DISABLE=1"
            ) from error
        except ChildFailed as error:
            raise ValueError(f"the GPUs cannot be used: {error}; see nvidia-smi and dmesg") from error
        return results


def start_p2p_check(config: Config) -> closing[P2PCheck] | nullcontext[None]:
    """Start the check if this machine has two GPUs that the ranks would use."""
    uses_several_gpus = config.device != "cpu" and config.tensor_parallel_size * config.gpus_per_rank > 1
    if uses_several_gpus and len(list(Path("/dev").glob(GPU_FILES))) > 1:
        return closing(P2PCheck(config.tensor_parallel_size))
    return nullcontext()


def copy_between_all() -> None:
    """Run in the child process: print the result of each pair as JSON."""
    import torch

    gpus = range(min(int(sys.argv[1]), torch.cuda.device_count()))
    print(json.dumps({f"{i} to {j}": _copy(i, j) for i in gpus for j in gpus if i != j}))


def _copy(source: int, target: int) -> PairResult:
    import torch

    pattern = torch.randint(-(2**31), 2**31, (NUM_ELEMENTS,), generator=torch.Generator().manual_seed(source))
    received = pattern.to(f"cuda:{source}").to(f"cuda:{target}")
    returned = received.to(f"cuda:{source}")
    if not (torch.equal(received.cpu(), pattern) and torch.equal(returned.cpu(), pattern)):
        return "wrong"
    return "direct" if torch.cuda.can_device_access_peer(source, target) else "staged"
