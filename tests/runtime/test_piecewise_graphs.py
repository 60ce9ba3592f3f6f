"""Piecewise graphs on a CPU: a stand-in for CUDA graphs repeats the operations of torch.

Before each step the padding and the memory of all graphs are overwritten: neither may reach a token. Tokens must be
those of the eager path.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lockstep.runtime import startup
from lockstep.runtime.model.batch import Batch
from lockstep.runtime.model.norm import Residual
from lockstep.runtime.request import Request
from lockstep.runtime.runner.piecewise_graphs import GraphBreaks, PiecewiseGraphs, piecewise_sizes
from lockstep.runtime.runner.rank_memory import RankMemory

from checkpoints import tiny_checkpoint
from engines import request, run_engine
from replayed_graphs import CAPTURE, ReplayedGraph, use_replayed_graphs

ARCHITECTURES = (  # with all kinds of layers: experts, the delta rule, norms after layers, factors of queries
    "LlamaForCausalLM",
    "Qwen3MoeForCausalLM",
    "GptOssForCausalLM",
    "Qwen3_5MoeForCausalLM",
    "Olmo2ForCausalLM",
    "Ministral3ForCausalLM",
)


def requests() -> list[Request]:
    """Return requests of which some arrive while others decode: their prompts have up to 60 tokens."""
    rng = np.random.default_rng(2)
    prompts = [rng.integers(3, 131, int(rng.integers(1, 60))).tolist() for _ in range(13)]
    return [request(i, prompt, [2], max_tokens=5 + 3 * i, temperature=0.0) for i, prompt in enumerate(prompts)]


class Steps:
    """The steps of a run with piecewise graphs, and what they do to memory that they must not depend on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: list[int] = []  # tokens of each step
        self.num_mixed = 0  # steps with rows that decode
        forward = PiecewiseGraphs.forward

        def poisoned(graphs: PiecewiseGraphs, batch: Batch, memory: RankMemory) -> Residual:
            count = len(batch.token_ids)
            self.counts.append(count)
            self.num_mixed += 0 < batch.host.num_decoding < batch.host.num_rows
            graphs._token_ids[count:], graphs._positions[count:] = 5, 9
            graphs._attention_out[count:], graphs._delta_net_out[count:] = torch.nan, torch.nan
            for captured in graphs._captured.values():
                for graph in captured.graphs:
                    graph.poison()
            return forward(graphs, batch, memory)

        use_replayed_graphs(monkeypatch)
        monkeypatch.setattr(PiecewiseGraphs, "forward", poisoned)


def test_capture_ends_after_an_error(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory in a capture")

    use_replayed_graphs(monkeypatch)
    monkeypatch.setattr(GraphBreaks, "run", fail)
    with pytest.raises(RuntimeError, match="out of memory in a capture"):
        run_engine(llama_folder, requests())
    assert CAPTURE.recorder is None
    assert gc.isenabled()


@pytest.mark.parametrize("sizes", [[16, 48], [7, 64, 256]], ids=str)
def test_steps_of_any_number_of_tokens_give_the_tokens_of_eager_ones(
    llama_folder: Path, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run_engine(llama_folder, requests())
    steps = Steps(monkeypatch)
    monkeypatch.setattr(startup, "piecewise_sizes", lambda max_tokens: sizes)
    actual = run_engine(llama_folder, requests(), overlap=True, max_num_batched_tokens=48)
    assert actual.tokens == expected.tokens
    assert len(set(steps.counts)) >= 2
    assert max(steps.counts) <= sizes[-1]
    assert steps.num_mixed > 0
    assert ReplayedGraph.num_replays > 3 * len(steps.counts)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_families_give_the_tokens_of_eager_steps(
    tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_checkpoint(tmp_path, architecture)
    some = [*requests()[:3], request(3, list(range(3, 40)), logprobs=2, prompt_logprobs=1, max_tokens=3)]
    expected = run_engine(tmp_path, some, max_num_batched_tokens=40)
    steps = Steps(monkeypatch)
    actual = run_engine(tmp_path, some, max_num_batched_tokens=40)
    assert actual.tokens == expected.tokens
    assert actual.prompts.keys() == expected.prompts.keys()
    for position, logprobs in expected.prompts[3].items():
        assert actual.prompts[3][position].token == pytest.approx(logprobs.token, abs=1e-3)
    assert {count % 8 for count in steps.counts} - {0}, "meant to pad"


def test_two_ranks_give_the_tokens_of_one(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run_engine(llama_folder, requests()[:5])
    steps = Steps(monkeypatch)
    assert run_engine(llama_folder, requests()[:5], tp=2, max_num_batched_tokens=40).tokens == expected.tokens
    assert len(steps.counts) >= 2 * 3


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"piecewise_cuda_graph_max_tokens": 0}, 0),
        ({"piecewise_cuda_graph_max_tokens": 100}, 100),
        ({"enforce_eager": True}, 0),
    ],
)
def test_options_limit_the_steps_with_graphs(
    llama_folder: Path, options: dict[str, Any], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = requests()[:9]
    expected = run_engine(llama_folder, few)
    steps = Steps(monkeypatch)
    assert run_engine(llama_folder, few, max_num_batched_tokens=110, **options).tokens == expected.tokens
    assert bool(steps.counts) == (most > 0)
    assert max(steps.counts, default=0) <= most


@pytest.mark.parametrize("max_tokens", [1, 8, 63, 100, 688, 2048, 2049, 5000, 8192, 16384])
def test_captured_sizes_are_few_and_close_to_each_number_of_tokens(max_tokens: int) -> None:
    sizes = piecewise_sizes(max_tokens)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_tokens
    assert len(sizes) <= 23
    for count in range(1, max_tokens + 1):
        padding = min(size for size in sizes if size >= count) - count
        assert padding < min(max_tokens / 16 + 64, max(8, count))
