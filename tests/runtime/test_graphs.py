"""Decode graphs on a CPU: a stand-in for CUDA graphs runs a captured step again when it is replayed.

BatchInvariantAttention runs on a CPU by the definitions of its ops. Tokens must be those of the eager path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from lockstep.runtime.model.embedding import Logits
from lockstep.runtime.request import Request
from lockstep.runtime.runner.graphs import graph_sizes

from engines import request, run_engine
from replayed_graphs import ReplayedGraph, use_replayed_graphs

GUMBEL_MAX = [{"temperature": 0.0}, {"temperature": 1.0}]
CANDIDATES = [*GUMBEL_MAX, {"temperature": 0.8, "top_k": 7}]
GATHERED = [*CANDIDATES, {"temperature": 1.0, "top_p": 0.8}, {"logprobs": 3}, {"repetition_penalty": 1.3}]


def requests(params: list[dict[str, Any]]) -> list[Request]:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 131, int(rng.integers(1, 30))).tolist() for _ in range(13)]
    return [request(i, prompt, [2], max_tokens=20, **params[i % len(params)]) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("params", "replays_per_step"), [(GUMBEL_MAX, 1), (CANDIDATES, 2), (GATHERED, 1)], ids=["max", "top-k", "gathered"]
)
def test_replayed_steps_give_the_tokens_of_eager_ones(
    llama_folder: Path,
    params: list[dict[str, Any]],
    replays_per_step: int,
    overlap: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = run_engine(llama_folder, requests(params))
    use_replayed_graphs(monkeypatch)
    actual = run_engine(llama_folder, requests(params), overlap=overlap)
    assert actual.tokens == expected.tokens
    assert actual.finished == expected.finished
    assert actual.logprobs.keys() == expected.logprobs.keys()
    assert ReplayedGraph.num_replays >= 15 * replays_per_step


PENALIZED = {"frequency_penalty": 0.5, "temperature": 1.0, "top_k": 5}


@pytest.mark.parametrize(
    ("needs_all", "in_graphs"),
    [
        ({"logprobs": 2}, True),
        (PENALIZED, False),
        *(pytest.param(*case, marks=pytest.mark.nightly) for case in (({"logprobs": 2}, False), (PENALIZED, True))),
    ],
    ids=str,
)
def test_ranks_gather_the_logits_of_rows_that_need_them_all(
    llama_folder: Path, needs_all: dict[str, Any], in_graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = [{"temperature": 0.8, "top_k": 7}, {"temperature": 1.0}, needs_all, *GUMBEL_MAX]
    some = requests(params)[: len(params)]
    alone = [run_engine(llama_folder, [one]) for one in some]
    gathered, gather = list[int](), Logits.gather

    def recorded(logits: Logits) -> Tensor:
        gathered.append(len(logits))
        return gather(logits)

    monkeypatch.setattr(Logits, "gather", recorded)
    if in_graphs:
        use_replayed_graphs(monkeypatch)
    together = run_engine(llama_folder, some, tp=1 if in_graphs else 2)
    assert set(gathered) == {1}
    for one, of_one in zip(some, alone, strict=True):
        assert together.tokens[one.uid] == of_one.tokens[one.uid]
    tokens = [[token.top_ids for token in results.logprobs.get(2, [])] for results in (together, alone[2])]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("max_rows", [1, 3, 8, 100, 128, 129, 256])
def test_graph_sizes_end_with_the_largest(max_rows: int) -> None:
    sizes = graph_sizes(max_rows)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_rows
