"""A whole engine in one process: leader and followers as threads, plans through the wire format, no Ray."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lockstep.runtime.config import Config
from lockstep.runtime.engine import Engine
from lockstep.runtime.model.model_config import ModelConfig
from lockstep.runtime.plan import RequestEnd, StepOutput, StepPlan, Stop, TokenLogprobs, decode_plan, encode
from lockstep.runtime.request import Request
from lockstep.runtime.sampling_params import SamplingParams
from lockstep.runtime.scheduler.scheduler import Scheduler
from lockstep.runtime.startup import LoadedRank, plan_limits

from ranks import ThreadRank, run_ranks

OPTIONS = {"num_pages": 512, "page_size": 4, "max_num_seqs": 32, "max_num_batched_tokens": 256}


class Results:
    """The results of requests, by uid."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.finished: dict[int, RequestEnd] = {}
        self.logprobs: dict[int, list[TokenLogprobs]] = {}
        self.cached: dict[int, int] = {}
        self.prompts: dict[int, dict[int, TokenLogprobs]] = {}  # by uid and position
        self.preemptions = 0
        self.steps = 0

    def take(self, output: StepOutput) -> None:
        self.steps += 1
        for uid, token in zip(output.uids, output.tokens, strict=True):
            assert uid not in self.finished, "a token after the end"
            self.tokens.setdefault(uid, []).append(token)
        for uid, logprobs in output.logprobs.items():
            self.logprobs.setdefault(uid, []).append(logprobs)
        for uid, chunk in output.prompt_logprobs.items():
            found = dict(enumerate(chunk.logprobs, start=chunk.start))
            self.prompts[uid] = found | self.prompts.get(uid, {})  # the first word counts, as in the front end
        for finished in output.finished:
            assert finished.uid not in self.finished, "a request ended twice"
            self.finished[finished.uid] = finished
        for uid, cached in output.cached_tokens.items():
            self.cached.setdefault(uid, cached)


def request(uid: int, tokens: Sequence[int], stop_ids: Sequence[int] = (), **params: Any) -> Request:
    """A greedy request of 16 tokens, unless `params` say otherwise."""
    chosen = SamplingParams(**{"temperature": 0, "max_tokens": 16, "seed": uid, **params})
    return Request(uid, np.array(tokens, np.int32), len(tokens), chosen, list(stop_ids))


def run_engine(
    folder: Path,
    requests: Sequence[Request],
    *,
    tp: int = 1,
    between: Callable[[int, Engine], None] | None = None,
    overlap: bool = False,
    **options: Any,
) -> Results:
    """Run all requests to their end; `between(step, engine)` may add and cancel in the meantime.

    With `overlap`, also on a CPU, results are committed one step late, as on a GPU.
    """
    asked = Config(model=str(folder), tensor_parallel_size=tp, **{"device": "cpu", **OPTIONS, **options})
    model = ModelConfig.from_folder(folder).quantized_by(asked.quantization)
    model = model.with_expert_parallel(asked.enable_expert_parallel)
    config = asked.resolved(model, cuda=False)
    wires: list[queue.Queue[bytes]] = [queue.Queue() for _ in range(tp)]

    def next_plan(comm: ThreadRank) -> StepPlan | Stop:
        with comm.others_run():
            return decode_plan(wires[comm.rank].get(timeout=60))

    @torch.inference_mode()
    def rank(comm: ThreadRank) -> Results | None:
        loaded = LoadedRank(config, model, folder, comm)
        limits = plan_limits(asked, config, model, loaded.plan_memory())
        runner = loaded.allocate(limits)
        if comm.rank > 0:
            while not isinstance(plan := next_plan(comm), Stop):
                runner.launch(plan)
            return None

        def publish(message: Any) -> None:
            for wire in wires[1:]:
                wire.put(encode(message))

        engine = Engine(Scheduler(limits), runner, publish, overlap=overlap or runner.overlaps)
        engine.add(requests)
        results = Results()
        while engine.has_work:
            results.take(engine.step())
            if between is not None:
                between(results.steps, engine)
            assert results.steps < 5000, "the engine does not come to an end"
        publish(Stop())
        results.preemptions = engine.scheduler.num_preemptions
        assert engine.scheduler.pages.num_available == limits.num_pages, "pages leaked"
        return results

    results = run_ranks(tp, rank)[0]
    assert results is not None
    return results
