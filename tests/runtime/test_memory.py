"""The memory plan against figures computed by hand; its remedies work, and smaller ones would not.

On a GPU, the plan against the free memory that the driver reports.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lockstep.comm.base import SingleRank
from lockstep.runtime import startup
from lockstep.runtime.config import Config
from lockstep.runtime.executor import LocalExecutor
from lockstep.runtime.memory import gpu as gpu_module
from lockstep.runtime.memory.gpu import (
    GpuProcess,
    describe_others,
    named_out_of_memory,
    processes_on,
)
from lockstep.runtime.memory.memory_plan import GIB, MemoryPlan, check_kv_cache, check_weights, tightest
from lockstep.runtime.model.model_config import ModelConfig
from lockstep.runtime.startup import LoadedRank, plan_limits
from lockstep.runtime.startup_timer import StartupTimer, count_from_here, log_ready

from checkpoints import tiny_checkpoint
from engines import request

MIB = 2**20
UUID = "8a1f0c5e-3b1d-4c3a-9f55-0d2e6a7b9c10"

# An H200 of 140 GiB: 0.5 GiB in use, 15 of weights, 0.5 of graphs, 2 of workspaces; pages of 16 tokens take 2 MiB.
H200 = MemoryPlan(
    place="GPU 0 (NVIDIA H200, 140.00 GiB)",
    total=140 * GIB,
    utilization=0.9,
    at_start=GIB // 2,
    weights=15 * GIB,
    graphs=GIB // 2,
    num_graphs=41,
    graph_rows=256,
    num_piecewise=35,
    piecewise_tokens=2048,
    workspaces=2 * GIB,
    page_bytes=2 * MIB,
    page_size=16,
)


def planned(plan: MemoryPlan, **options: Any) -> MemoryPlan:
    """The plan with the pages that a Config of these options gives it."""
    return plan.with_pages(Config(**{"max_model_len": 131072, **options}))


def refusal(plan: MemoryPlan, **requested: Any) -> str:
    with pytest.raises(ValueError) as caught:
        check_kv_cache(Config(**requested), planned(plan, **requested))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- arithmetic


def test_kv_cache_gets_the_rest_of_the_share() -> None:
    plan = planned(H200)
    assert plan.room == 108 * GIB  # 0.9 * 140 - 18
    assert plan.num_pages == 55_296  # 108 GiB of 2 MiB
    assert plan.tokens == 884_736
    assert plan.page_bytes // plan.page_size == 128 * 2**10
    assert plan.free == 14 * GIB


def test_memory_table() -> None:
    assert planned(H200).table(131_072).splitlines() == [
        "memory of GPU 0 (NVIDIA H200, 140.00 GiB), gpu_memory_utilization=0.9",
        "  in use at start   0.50 GiB   CUDA context, communication",
        "  weights          15.00 GiB",
        "  CUDA graphs       0.50 GiB   41 captured, up to 256 rows; 35 piecewise, up to 2,048 tokens",
        "  workspaces        2.00 GiB   activations, tables, kernels, libraries",
        "  KV cache        108.00 GiB   884,736 tokens of 128 KiB: 6.8 contexts of 131,072",
        "  free             14.00 GiB",
    ]


def test_context_with_a_window_may_be_longer_than_the_kv_cache() -> None:
    small = replace(H200, num_pages=600, pages_of_window=513)  # 4096 keys, 4096 tokens a step
    config = Config(num_pages=600, max_model_len=131_072)
    check_kv_cache(config, small)
    assert small.longest_context(131_072) == 131_072
    assert "9,600 tokens of 128 KiB: 1.2 contexts of 131,072" in small.table(131_072)
    assert "max_model_len=131072 needs more than the 9600 tokens" in refusal(
        replace(small, pages_of_window=601), num_pages=600, max_model_len=131_072
    )
    assert replace(small, pages_of_window=601).longest_context(131_072) == 9600


def test_shared_gpu_limits_each_rank_to_its_share() -> None:
    plan = planned(replace(H200, at_start=0, gpus_per_rank=0.5))
    assert plan.room == 45.5 * GIB  # 0.9 * 70 - 17.5
    assert plan.num_pages == 23_296
    assert "gpus_per_rank=0.5" in plan.table(131_072)
    assert "left to others   77.00 GiB" in plan.table(131_072)


def test_cpu_memory_is_not_measured() -> None:
    host = MemoryPlan(place="the CPU", weights=5 * MIB, page_bytes=80 * 2**10, page_size=16)
    plan = planned(host, max_model_len=2048)
    assert plan.num_pages == 13_107  # 1 GiB; 256 requests of 128 pages would be more
    assert planned(host, max_model_len=2048, max_num_seqs=2).num_pages == 256
    assert planned(host, max_model_len=2**20).num_pages == 2**16, "one whole context, whatever it takes"
    assert plan.table(2048).splitlines() == [
        "memory of the CPU",
        "  weights              5 MiB",
        "  KV cache          1.00 GiB   209,712 tokens of 5 KiB: 102.4 contexts of 2,048",
    ]


gpu_plans = st.builds(
    lambda total, parts, utilization, share, page, page_size: MemoryPlan(
        place="GPU 0",
        total=total,
        at_start=int(total * parts[0]),
        weights=int(total * parts[1]),
        graphs=int(total * parts[2]),
        num_graphs=8,
        graph_rows=32,
        workspaces=int(total * parts[3]),
        utilization=utilization / 100,
        gpus_per_rank=share,
        page_bytes=page * page_size,
        page_size=page_size,
    ),
    total=st.integers(2**33, 2**38),
    parts=st.tuples(st.floats(0, 0.3), st.floats(0, 0.7), st.floats(0, 0.1), st.floats(0, 0.2)),
    utilization=st.integers(1, 100),
    share=st.sampled_from([1.0, 0.5, 1 / 3]),
    page=st.integers(2**8, 2**20),
    page_size=st.sampled_from([1, 4, 16, 64]),
)


@given(gpu_plans)
def test_kv_cache_never_exceeds_the_share_and_wastes_less_than_a_page(plan: MemoryPlan) -> None:
    assert plan.total is not None
    plan = planned(plan)
    rest = plan.at_start + plan.weights + plan.graphs + plan.workspaces
    left = plan.total * plan.utilization * plan.gpus_per_rank - rest
    assert plan.kv_cache <= max(0, left + 1)
    assert plan.kv_cache > left - plan.page_bytes - 1


@given(gpu_plans, st.integers(1, 100))
def test_num_pages_grows_with_utilization(plan: MemoryPlan, other: int) -> None:
    low, high = sorted([plan.utilization, other / 100])
    assert planned(replace(plan, utilization=low)).num_pages <= planned(replace(plan, utilization=high)).num_pages


@given(gpu_plans.filter(lambda plan: planned(plan).num_pages > 0))
def test_memory_table_sums_to_the_whole_gpu(plan: MemoryPlan) -> None:
    units = {"GiB": GIB, "MiB": MIB, "KiB": 2**10}
    rows = [re.match(r"  [a-zA-Z ]+?  +(-?[\d.]+) (.iB)", line) for line in planned(plan).table(4096).splitlines()[1:]]
    assert len(rows) >= 3
    printed = sum(float(row[1]) * units[row[2]] for row in rows if row)
    assert printed == pytest.approx(plan.total, abs=len(rows) * 0.0051 * GIB)


def test_tightest_rank_limits_the_group(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lockstep")
    plans = [planned(replace(H200, workspaces=n * GIB)) for n in (2, 3, 1)]
    least = tightest(plans)
    assert (least.num_pages, least.workspaces) == (54_784, 3 * GIB)
    assert least.place == "rank 1, GPU 0 (NVIDIA H200, 140.00 GiB)"
    assert "rank 1 limits the group: room for 54784 pages, others have up to 55808" in caplog.text
    requested = [planned(replace(H200, workspaces=n * GIB), num_pages=10) for n in (2, 3, 1)]
    assert tightest(requested).place.startswith("rank 1"), (
        "also where pages were asked for: it is the first to refuse them"
    )
    caplog.clear()
    assert tightest(plans[:1] * 2).num_pages == 55_296
    assert "limits" not in caplog.text


# -- what does not fit


def test_weights_that_do_not_fit_are_refused() -> None:
    check_weights(replace(H200, graphs=0, workspaces=0))
    with pytest.raises(ValueError) as caught:
        check_weights(
            replace(H200, weights=130 * GIB, graphs=0, workspaces=0, other_processes="; also on this GPU: pid 7")
        )
    assert str(caught.value) == (
        "the weights need 130.00 GiB, and GPU 0 (NVIDIA H200, 140.00 GiB) has 125.50 GiB for them with"
        " gpu_memory_utilization=0.9 and 0.50 GiB in use; raise gpu_memory_utilization to 0.94; also on this GPU: pid 7"
    )
    with pytest.raises(ValueError, match=r"need 150\.00 GiB, .*; use a larger tensor_parallel_size$"):
        check_weights(replace(H200, weights=150 * GIB))


def test_kv_cache_without_room_is_refused() -> None:
    assert refusal(replace(H200, weights=110 * GIB, workspaces=16 * GIB)) == (
        "no room for the KV cache: 110.00 GiB of weights, 0.50 GiB of CUDA graphs, 16.00 GiB of workspaces and"
        " 0.50 GiB in use before make 127.00 GiB, and gpu_memory_utilization=0.9 allows 126.00 GiB of"
        " GPU 0 (NVIDIA H200, 140.00 GiB); raise gpu_memory_utilization to 0.91, or lower max_num_batched_tokens or"
        " max_num_seqs"
    )

    with_states = replace(H200, weights=100 * GIB, workspaces=16 * GIB, states=10 * GIB)
    assert refusal(with_states).startswith(
        "no room for the KV cache: 100.00 GiB of weights, 0.50 GiB of CUDA graphs, 10.00 GiB of recurrent states,"
        " 16.00 GiB of workspaces and 0.50 GiB in use before make 127.00 GiB"
    )
    less_than_a_page = replace(H200, weights=(15 + 108) * GIB - MIB)
    assert refusal(less_than_a_page).startswith("no room for the KV cache: 123.00 GiB of weights")
    assert "raise gpu_memory_utilization to 0.91," in refusal(less_than_a_page)


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        (
            {"num_pages": 60_000},
            "num_pages=60000 is 117.19 GiB of KV cache, and GPU 0 (NVIDIA H200, 140.00 GiB) has 108.00 GiB left for it"
            " with gpu_memory_utilization=0.9; use num_pages=55296 or less, or raise gpu_memory_utilization to 0.97",
        ),
        (
            {"kv_cache_memory": 200.0},
            "kv_cache_memory=200.0 is 200.00 GiB of KV cache, and GPU 0 (NVIDIA H200, 140.00 GiB) has 108.00 GiB left"
            " for it with gpu_memory_utilization=0.9; use kv_cache_memory=108.000 or less, or use a larger"
            " tensor_parallel_size",
        ),
        (
            {"max_model_len": 900_000},
            "max_model_len=900000 needs more than the 884736 tokens that the KV cache holds: 109.86 GiB instead of"
            " 108.00 GiB; use max_model_len=884736 or less, or raise gpu_memory_utilization to 0.92",
        ),
        (
            {"max_model_len": 4096, "num_pages": 255},
            "max_model_len=4096 needs more than the 4080 tokens that the KV cache holds: 0.50 GiB instead of"
            " 0.50 GiB; use max_model_len=4080 or less, or raise num_pages to 256",
        ),
        (
            {"kv_cache_memory": 0.001},
            "kv_cache_memory=0.001 holds 0 pages of 16 tokens, 2 MiB each, and a request needs 2 tokens; raise"
            " kv_cache_memory to 0.002",
        ),
    ],
)
def test_requested_size_that_does_not_fit_is_refused(requested: dict[str, Any], message: str) -> None:
    assert refusal(H200, **requested) == message
    assert refusal(replace(H200, other_processes="; others"), **requested).removesuffix("; others") == message


@given(gpu_plans, st.sampled_from(["num_pages", "kv_cache_memory", "max_model_len"]), st.floats(0.5, 1.5))
def test_remedy_of_a_refusal_is_accepted(plan: MemoryPlan, flag: str, factor: float) -> None:
    fitting = planned(plan)
    sizes = {
        "num_pages": int(fitting.num_pages * factor) + 1,
        "kv_cache_memory": fitting.kv_cache * factor / GIB + 0.01,
        "max_model_len": int(fitting.tokens * factor) + 2,
    }
    options: dict[str, Any] = {flag: sizes[flag]}

    def refused(plan: MemoryPlan, options: dict[str, Any]) -> str:
        try:
            check_kv_cache(Config(**options), planned(plan, **options))
        except ValueError as error:
            return str(error)
        return ""

    reason = refused(plan, options)
    for name, value in re.findall(r"use (\w+)=([\d.]+) or less", reason):
        number = float(value) if "." in value else int(value)
        if number > 0.001:  # GiB are told in thousandths
            assert refused(plan, {name: number}) == ""
        if name != "kv_cache_memory":
            assert refused(plan, {name: int(number) + 1}) != "", "it was not the largest that would do"
    for value in re.findall(r"raise gpu_memory_utilization to ([\d.]+)", reason):
        enough = replace(plan, utilization=float(value))
        alone = {} if "no room" in reason else options
        assert refused(enough, alone) == ""
        assert refused(replace(plan, utilization=round(float(value) - 0.02, 2)), alone) != ""
    assert plan.utilization < 1 or "raise gpu_memory_utilization" not in reason


TORCH_ERROR = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 139.81 GiB of which 1.00 GiB is"
    " free. Including non-PyTorch memory, this process has 138.80 GiB memory in use.\nSee documentation"
)


def test_out_of_memory_names_the_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB, 140 * GIB))
    monkeypatch.setattr(gpu_module, "other_processes", lambda device: "; also on this GPU: pid 7 with 3.00 GiB")
    with pytest.raises(ValueError) as caught, named_out_of_memory("rehearsal", H200, torch.device("cuda")):
        raise torch.OutOfMemoryError(TORCH_ERROR)
    assert str(caught.value) == (
        "rehearsal: GPU 0 (NVIDIA H200, 140.00 GiB) ran out of memory, 2.50 GiB needed and 1.00 GiB free; lower"
        " max_num_batched_tokens, max_num_seqs or max_model_len; also on this GPU: pid 7 with 3.00 GiB"
    )
    with (
        pytest.raises(ValueError, match=r"ran out of memory, more memory needed and .*enforce_eager"),
        named_out_of_memory("graphs", H200, torch.device("cuda")),
    ):
        raise torch.OutOfMemoryError("no such text")
    with pytest.raises(KeyError), named_out_of_memory("graphs", H200, torch.device("cuda")):
        raise KeyError("another error is let through")


def test_weights_are_refused_before_allocation(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_to_load(*arguments: Any) -> None:
        raise AssertionError("loaded in spite of it")

    monkeypatch.setattr(startup, "load_weights", refuse_to_load)
    monkeypatch.setattr(gpu_module, "read_gpu", lambda device, share: (0, 100 * 2**10))
    monkeypatch.setattr(gpu_module, "gpu_name", lambda device: "GPU 0 (tiny, 100 KiB)")
    monkeypatch.setattr(gpu_module, "other_processes", lambda device: "")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    model = ModelConfig.from_folder(llama_folder)
    config = Config(model=str(llama_folder)).resolved(model, cuda=True)
    with pytest.raises(ValueError, match=r"the weights need .* GPU 0 \(tiny, 100 KiB\) has 90 KiB for them"):
        LoadedRank(config, model, llama_folder, SingleRank())


# -- the plan of a rank


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3MoeForCausalLM"])
@pytest.mark.parametrize("layout", ["layer-first", "page-first"])
def test_memory_plan_equals_allocation(tmp_path: Path, architecture: str, layout: str) -> None:
    tiny_checkpoint(tmp_path, architecture)
    requested = Config(model=str(tmp_path), device="cpu", num_pages=7, kv_layout=layout)  # type: ignore[arg-type]
    model = ModelConfig.from_folder(tmp_path)
    config = requested.resolved(model, cuda=False)
    loaded = LoadedRank(config, model, tmp_path, SingleRank())
    plan = loaded.plan_memory()
    memory = loaded.allocate(plan_limits(requested, config, model, plan)).memory
    assert plan.weights == sum(w.tensor.nbytes for w in memory.decoder.weights)
    cache = [tensor for layer in range(model.num_layers) for tensor in memory.pool.layer(layer)]
    assert plan.kv_cache == sum(tensor.numel() * tensor.element_size() for tensor in cache)
    assert plan.tokens == cache[0].shape[0] * cache[0].shape[1] == 7 * 16


def test_startup_logs_memory_and_durations(llama_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lockstep")
    model = ModelConfig.from_folder(llama_folder)
    executor = LocalExecutor(Config(model=str(llama_folder), device="cpu", num_pages=64), model, llama_folder)
    record = json.loads(json.dumps(executor.startup))
    assert set(record) == {"ready", "weights", "KV cache", "grammars", "prefix cache", "graphs"}
    assert sum(record.values()) <= 2 * record["ready"]
    assert executor.memory.table(256) in caplog.text
    assert "1,024 tokens" in caplog.text
    assert "GiB/s" in caplog.text


# -- phases


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    yield now
    monkeypatch.undo()


def test_startup_timer_counts_nested_phases_once(clock: list[float]) -> None:
    phases = StartupTimer()
    with phases("weights"):
        clock[0] += 2.0
    with phases("rehearsal"):
        clock[0] += 0.5
        with phases("imports"):
            clock[0] += 3.0
        clock[0] += 0.25
    clock[0] += 1.0
    with phases("weights"):
        clock[0] += 0.5
    assert phases.record() == {"ready": 7.25, "weights": 2.5, "imports": 3.0, "rehearsal": 0.75}


def test_startup_timer_counts_a_failed_phase(clock: list[float]) -> None:
    phases = StartupTimer()

    def failing() -> None:
        with phases("weights"):
            clock[0] += 2.0
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert phases.seconds == {"weights": 2.0}


def test_startup_timer_adds_the_slowest_rank(clock: list[float]) -> None:
    phases = StartupTimer()
    with phases("actors"):
        clock[0] += 1.0
    phases.add_slowest([{"weights": 2.0, "graphs": 0.01}, {"weights": 3.0}])
    clock[0] += 4.0
    assert phases.record() == {"ready": 5.0, "actors": 1.0, "weights": 3.0, "graphs": 0.01}


def test_ready_is_logged_in_one_line_and_its_phases_for_debugging(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "lockstep")
    log_ready("2 ranks", {"ready": 5.04, "actors": 1.0, "weights": 3.0, "graphs": 0.01})
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "2 ranks ready in 5.0 s"),
        ("DEBUG", "of this, in seconds: actors 1.0, weights 3.0"),
    ]


def test_first_start_counts_from_the_call_and_later_ones_from_their_own_beginning(clock: list[float]) -> None:
    with count_from_here():
        clock[0] += 4.0
        first = StartupTimer()
        clock[0] += 1.0
        again = StartupTimer()
        clock[0] += 0.5
    assert first.record() == {"ready": 5.5, "imports": 4.0}
    assert again.record() == {"ready": 0.5}
    with pytest.raises(KeyError), count_from_here():
        raise KeyError  # a start that fails before its timer is made
    assert StartupTimer().record() == {"ready": 0.0}


def test_first_start_of_a_command_counts_from_the_start_of_its_process() -> None:
    program = """
import time
from lockstep.runtime.startup_timer import StartupTimer, count_from_here, count_from_process_start
time.sleep(0.3)
count_from_process_start()
with count_from_here():
    print(StartupTimer().record()["ready"])
print(StartupTimer().record()["ready"])
"""
    started = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    first, second = map(float, run.stdout.split())
    assert 0.3 <= first <= time.perf_counter() - started + 0.02  # the kernel counts in hundredths
    assert second < first


# -- other processes on the GPU


def test_gpu_processes_are_listed_by_pynvml(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    def handle(uuid: str) -> str:
        if uuid != f"GPU-{UUID}":
            raise NVMLError
        return "handle"

    processes = [
        types.SimpleNamespace(pid=4711, usedGpuMemory=GIB),
        types.SimpleNamespace(pid=4713, usedGpuMemory=None),
    ]
    nvml = types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetComputeRunningProcesses=lambda of: processes if of == "handle" else [],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert processes_on(UUID) == processes_on(f"GPU-{UUID.upper()}") == [GpuProcess(4711, GIB), GpuProcess(4713, None)]
    assert processes_on("another") is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert processes_on(UUID) is None


@pytest.mark.parametrize(
    ("processes", "text"),
    [
        (None, "; the processes on this GPU could not be listed"),
        ([], "; the processes on this GPU could not be listed"),
        ([GpuProcess(1, 50 * GIB)], ""),
        ([GpuProcess(1, 50 * GIB), GpuProcess(4712, 100 * MIB)], ""),
        (
            [GpuProcess(1, 50 * GIB), GpuProcess(4711, GIB), GpuProcess(4712, 99 * MIB), GpuProcess(4713, None)],
            "; also on this GPU: pid 4711 with 1.00 GiB, pid 4713 with an unknown amount",
        ),
        (
            [GpuProcess(4711, GIB)],
            "; on this GPU, by the host, this process among them: pid 4711 with 1.00 GiB",
        ),
    ],
)
def test_other_processes_are_named_above_100_mib(processes: list[GpuProcess] | None, text: str) -> None:
    assert describe_others(processes, own_pid=1) == text


# -- on a GPU

NEAR = 300 * MIB


@pytest.fixture
def bfloat16_folder(tmp_path: Path) -> Path:
    """A tiny model that FlashInfer and CUDA graphs take."""
    tiny_checkpoint(tmp_path, "LlamaForCausalLM", head_dim=64, hidden_size=256, max_position_embeddings=4096)
    return tmp_path


def on_gpu(folder: Path, **options: Any) -> LocalExecutor:
    config = Config(model=str(folder), device="cuda", dtype="bfloat16", **options)
    return LocalExecutor(config, ModelConfig.from_folder(folder), folder)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"kv_cache_memory": 2.0}, {"gpu_memory_utilization": 0.5}, {"num_pages": 2000}])
def test_memory_plan_matches_the_gpu(bfloat16_folder: Path, options: dict[str, Any]) -> None:
    torch.cuda.empty_cache()
    free_before, total = torch.cuda.mem_get_info()
    executor = on_gpu(bfloat16_folder, **options)
    plan = executor.memory
    assert plan.total == total
    assert plan.free is not None
    assert plan.at_start == pytest.approx(total - free_before, abs=NEAR)
    assert plan.num_graphs > 8
    assert 0 < plan.graphs < 4 * GIB
    assert torch.cuda.mem_get_info()[0] == pytest.approx(plan.free, abs=NEAR)
    executor.submit([request(uid, [5] * 1000) for uid in range(16)])
    while executor.poll(0):
        pass
    assert torch.cuda.mem_get_info()[0] == pytest.approx(plan.free, abs=NEAR), "steps take no more than planned"
    assert {"weights", "rehearsal", "KV cache", "graphs"} <= set(executor.startup)
    if "gpu_memory_utilization" in options:
        assert total - torch.cuda.mem_get_info()[0] == pytest.approx(0.5 * total, abs=NEAR)
    executor.close()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu_memory_utilization": 0.0001}, r"the weights need .* raise gpu_memory_utilization to 0\.\d+"),
        ({"num_pages": 10**9}, r"num_pages=1000000000 is .* GiB left for it .* use num_pages=\d+ or less"),
        ({"kv_cache_memory": 10**4}, r"kv_cache_memory=10000 is 10000\.00 GiB .* use kv_cache_memory=\d+\.\d+ or less"),
        (
            {"max_model_len": 4096, "num_pages": 8},
            r"max_model_len=4096 needs more than the 128 .* raise num_pages to 256",
        ),
    ],
)
def test_gpu_refuses_what_does_not_fit(bfloat16_folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_gpu(bfloat16_folder, **options)


@pytest.mark.gpu
def test_gpu_out_of_memory_names_the_phase(bfloat16_folder: Path) -> None:
    """The rehearsal needs 128 MiB for FlashInfer alone; torch may have 64."""
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved() + 64 * MIB
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.mem_get_info()[1])
    try:
        with pytest.raises(ValueError, match=r"^rehearsal: GPU .* ran out of memory, .* needed and .* free; lower"):
            on_gpu(bfloat16_folder)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


HOLD = (
    "import sys, torch; x = torch.ones(2**28, device='cuda'); torch.cuda.synchronize(); print('held'); sys.stdin.read()"
)


@pytest.mark.gpu
def test_gpu_error_names_another_process(bfloat16_folder: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        processes = processes_on(str(torch.cuda.get_device_properties(0).uuid))
        if processes is None or os.getpid() not in {process.pid for process in processes}:
            pytest.skip(f"the driver does not list this container's processes: {processes}")
        with pytest.raises(ValueError, match=rf"also on this GPU: .*pid {other.pid} with [12]\.\d\d GiB"):
            on_gpu(bfloat16_folder, kv_cache_memory=10**4)
    finally:
        other.kill()
        other.wait()
