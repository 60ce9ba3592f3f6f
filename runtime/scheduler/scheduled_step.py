"""The records of a step: the rows that running requests compute, and the plan with the requests of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..plan import StepPlan
from .slots import PromptChunk
from .step_division import StepTokens


class RunningRows(NamedTuple):
    """The part of a step that requests admitted earlier compute, and the pages that they lack for it."""

    decoding: np.ndarray  # [D] int32: slots that compute one token and sample the next
    full: np.ndarray  # [F] int32: those of `decoding` that need a page
    chunks: list[PromptChunk]  # next tokens of the prompts in progress: one, or one of each client
    tokens: StepTokens  # those left for requests that this step admits
    num_missing_pages: int  # pages that all of these need


@dataclass(frozen=True, kw_only=True)
class ScheduledStep:
    """A plan, and the requests that its sampled rows belonged to when it was made."""

    plan: StepPlan
    slots: np.ndarray  # [S] int32: the slot of each sampled row
    admission_ids: np.ndarray  # [S] int64: admissions of these slots; a slot's id changes with its next request
    prompt_logprobs: dict[int, int]  # row of the plan -> uid, for requests with SamplingParams.prompt_logprobs
    is_limited: bool  # tokens of clients beyond their share were left out
