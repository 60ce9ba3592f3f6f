"""Results of launched steps on their way from the device to the host."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import cycle

import numpy as np
import torch
from torch import Tensor

from ...comm.base import Communicator
from ..plan import PromptLogprobs, StepPlan, TokenLogprobs
from ..sampling.logprobs import PendingLogprobs

NUM_BUFFERS = 3  # more than steps can be in flight


@dataclass
class TokenCopy:
    """A copy of sampled tokens to the host."""

    tokens: Tensor  # [S] int32, on the host
    comm: Communicator
    done: torch.cuda.Event | None  # None: the tokens are there

    def wait(self) -> np.ndarray:
        """Return the tokens [S] int32; raises CommError if a collective before them does not end in time."""
        if self.done is None:
            return self.tokens.numpy()
        self.comm.wait(self.done)
        return np.array(self.tokens.numpy())


class PinnedReadback:
    """Copies of sampled tokens to the host, through a few pinned buffers in rotation."""

    def __init__(self, max_rows: int, comm: Communicator, device: torch.device) -> None:
        self._comm = comm
        self._cuda = device.type == "cuda"
        if self._cuda:
            buffers = torch.empty(NUM_BUFFERS, max_rows, dtype=torch.int32, pin_memory=True)
            self._rotation = cycle([(buffer, torch.cuda.Event()) for buffer in buffers])

    def start(self, tokens: Tensor) -> TokenCopy:
        """Start copying tokens [S] int32 to the host."""
        if not self._cuda:
            return TokenCopy(tokens, self._comm, None)
        buffer, done = next(self._rotation)
        copy = buffer[: len(tokens)].copy_(tokens, non_blocking=True)
        done.record()
        return TokenCopy(copy, self._comm, done)


@dataclass(frozen=True)
class Sampled:
    """One step's results; log-probabilities are there on rank 0 only."""

    tokens: np.ndarray  # [S] int32, by sampled row
    logprobs: dict[int, TokenLogprobs]  # by index into `tokens`
    prompt_logprobs: dict[int, PromptLogprobs]  # by row of the plan
    failed: dict[int, str]  # by index into `tokens`: why the request's grammar cannot continue


@dataclass
class PendingStep:
    """A launched step, which the device may still be computing."""

    plan: StepPlan
    tokens: TokenCopy | None = None
    logprobs: PendingLogprobs | None = None
    prompt_logprobs: PendingLogprobs | None = None
    failed: dict[int, str] = field(default_factory=dict)

    def wait(self) -> Sampled:
        """Wait for the device and return the step's results; raises CommError after a collective's deadline."""
        tokens = self.tokens.wait() if self.tokens is not None else np.empty(0, np.int32)
        logprobs = dict(self.logprobs.wait()) if self.logprobs is not None else {}
        prompts: dict[int, PromptLogprobs] = {}
        for row, entry in self.prompt_logprobs.wait() if self.prompt_logprobs is not None else ():
            chunk = prompts.setdefault(row, PromptLogprobs(int(self.plan.starts[row]) + 1, []))
            chunk.logprobs.append(entry)
        return Sampled(tokens, logprobs, prompts, self.failed)
