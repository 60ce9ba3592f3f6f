"""Whether what one GPU sends to another arrives there, tried in a process of its own.

A copy between GPUs can hang, and a process can be ended where a thread cannot. It imports torch while its parent does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Literal

from ...runtime.config import Config

DEADLINE_S = 20.0
WORDS = 1 << 20  # of a copy
GPU_FILES = "nvidia[0-9]*"  # in /dev
PROGRAM = "from lockstep.launch.doctor.p2p import try_all; try_all()"

Way = Literal["direct", "staged", "wrong"]  # staged: through the host's memory; wrong: other bits arrive
Ways = dict[str, Way]  # of each pair, as in "0 to 1"


class P2PCheck:
    """A process that tries all pairs among the first `gpus` GPUs; call `close` in any case."""

    def __init__(self, gpus: int) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(gpus)], stdout=pipe, stderr=pipe, text=True
        )

    def result(self) -> Ways:
        """What was found; raises ValueError if the process fails or is silent for DEADLINE_S."""
        try:
            out, err = self._process.communicate(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired as error:
            raise ValueError(
                f"copies between the GPUs hang, nothing after {DEADLINE_S:.0f} s; see dmesg for Xid errors, and try"
                " NCCL_P2P_DISABLE=1"
            ) from error
        if self._process.returncode:
            reason = (err.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"the GPUs cannot be used: {reason}; see nvidia-smi and dmesg")
        found: Ways = json.loads(out)
        return found

    def close(self) -> None:
        """End the process; one that is stuck in the driver is not waited for."""
        self._process.kill()


def peer_test(config: Config) -> closing[P2PCheck] | nullcontext[None]:
    """Started where there are two GPUs that the ranks would use."""
    several = config.device != "cpu" and config.tensor_parallel_size * config.gpus_per_rank > 1
    if several and len(list(Path("/dev").glob(GPU_FILES))) > 1:
        return closing(P2PCheck(config.tensor_parallel_size))
    return nullcontext()


def try_all() -> None:
    """The process: print what was found as JSON."""
    import torch

    gpus = range(min(int(sys.argv[1]), torch.cuda.device_count()))
    print(json.dumps({f"{i} to {j}": _try(i, j) for i in gpus for j in gpus if i != j}))


def _try(source: int, target: int) -> Way:
    import torch

    pattern = torch.randint(-(2**31), 2**31, (WORDS,), generator=torch.Generator().manual_seed(source))
    there = pattern.to(f"cuda:{source}").to(f"cuda:{target}")
    back = there.to(f"cuda:{source}")
    if not (torch.equal(there.cpu(), pattern) and torch.equal(back.cpu(), pattern)):
        return "wrong"
    return "direct" if torch.cuda.can_device_access_peer(source, target) else "staged"
