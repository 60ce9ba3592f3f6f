"""`lockstep bench`: counts of requests and tokens, and times from a trace against brute force."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from typer.testing import CliRunner, Result

from lockstep.launch.bench.trace import TraceEvent, classify, kernel_times, read_events, union
from lockstep.launch.bench.workload import nano, uniform
from lockstep.launch.cli.main import app
from lockstep.runtime.config import DEMO_MODEL, Config
from lockstep.runtime.engine import Engine
from lockstep.runtime.executor import LocalExecutor
from lockstep.runtime.model.model_config import ModelConfig
from lockstep.runtime.stats import Profile

from engines import request, run_engine
from small import SMALL, as_flags

OPTIONS = {**SMALL, "max_num_batched_tokens": 64}
FLAGS = as_flags(OPTIONS)
ITERS, INPUT, OUTPUT = 3, 20, 8
FLOAT32 = 4


@pytest.fixture(autouse=True)
def no_ray_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def described() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(DEMO_MODEL) / "config.json").read_text())
    return found


def kv_token_bytes(ranks: int) -> int:
    model = described()
    head_dim = model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"]
    heads = max(1, model["num_key_value_heads"] // ranks)
    return int(2 * model["num_hidden_layers"] * heads * head_dim * FLOAT32)


def weight_bytes() -> int:
    """Return the bytes of the checkpoint's weights in float32, without an embedding that is no head."""
    with safe_open(Path(DEMO_MODEL) / "model.safetensors", "np") as file:
        sizes = {name: int(np.prod(file.get_slice(name).get_shape())) * FLOAT32 for name in file.keys()}  # noqa: SIM118
    if not described()["tie_word_embeddings"]:
        del sizes["model.embed_tokens.weight"]
    return sum(sizes.values())


def test_latency_counts_every_step_and_token(tmp_path: Path) -> None:
    results, trace = tmp_path / "results.json", tmp_path / "trace.json.gz"
    lengths = [f"--input-len={INPUT}", f"--output-len={OUTPUT}", f"--num-iters={ITERS}", "--num-iters-warmup=1"]
    files = [f"--output-json={results}", f"--profile={trace}", "--profile-steps=3"]
    ended = bench("latency", *FLAGS, *lengths, "--batch-size=1", "--batch-size=2", *files)
    assert ended.exit_code == 0, ended.output
    found = json.loads(results.read_text())
    assert [block["batch_size"] for block in found] == [1, 2]
    for size, block in enumerate(found, start=1):
        seconds = block["latencies"]
        assert len(seconds) == len(block["first_token_latencies"]) == ITERS
        assert block["avg_latency"] == pytest.approx(sum(seconds) / ITERS)
        assert list(block["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
        assert block["percentiles"]["50"] == sorted(seconds)[1]
        alone = sorted(seconds)[1] - sorted(block["first_token_latencies"])[1]
        assert block["ms_per_output_token"] == pytest.approx(alone / (OUTPUT - 1) * 1e3)
        assert (block["prefill_steps"], block["decode_steps"]) == (ITERS, ITERS * (OUTPUT - 1))
        assert (block["prompt_tokens"], block["output_tokens"]) == (ITERS * size * INPUT, ITERS * size * OUTPUT)
        assert block["output_tokens_per_second"] == pytest.approx(ITERS * size * OUTPUT / sum(seconds))
        # The first token is the prefill's; when the next is decoded, there are INPUT + 1 keys.
        contexts = [INPUT + i for i in range(1, OUTPUT)]
        assert block["kv_bytes_per_decode_step"] == size * np.mean(contexts) * kv_token_bytes(1)
        assert block["weight_bytes_per_decode_step"] == weight_bytes()
        read = block["weight_bytes_per_decode_step"] + block["kv_bytes_per_decode_step"]
        assert block["achieved_gb_per_second"] == pytest.approx(read / block["ms_per_decode_step"] / 1e6)
        assert block["ms_per_decode_step"] * block["decode_steps"] < sum(seconds) * 1e3
        own = json.loads(gzip.decompress((tmp_path / f"batch-{size}-trace.json.gz").read_bytes()))["traceEvents"]
        layers = [e for e in own if e.get("name") == "aten::scaled_dot_product_attention"]
        assert len(layers) == 3 * described()["num_hidden_layers"]
        assert sum(block["kernel_shares"].values()) == pytest.approx(1)
        assert {"attention", "product", "norm", "elementwise"} <= set(block["kernel_shares"])
    assert ended.stdout.count("Avg latency: ") == 2
    assert f"99% percentile latency: {found[1]['percentiles']['99']} seconds\n" in ended.stdout


def test_throughput_counts_every_request_and_token(tmp_path: Path) -> None:
    """More requests than slots, prompts in chunks, and a model that is only a config.json."""
    results, trace, model = tmp_path / "results.json", tmp_path / "trace.json", tmp_path / "model"
    model.mkdir()
    shutil.copy(Path(DEMO_MODEL) / "config.json", model)
    lengths = ["--num-prompts=12", "--input-len=40", "--output-len=6", "--random-range-ratio=0.5", "--seed=3"]
    files = [f"--output-json={results}", f"--profile={trace}"]
    ended = bench("throughput", str(model), "--load-format=dummy", *FLAGS, *lengths, *files)
    assert ended.exit_code == 0, ended.output
    found, asked = json.loads(results.read_text()), uniform(12, 40, 6, 0.5, 3)
    prompts, outputs = sum(asked.input_lens), sum(asked.output_lens)
    assert found["num_requests"] == 12
    assert found["total_num_tokens"] == prompts + outputs
    assert found["tokens_per_second"] == pytest.approx((prompts + outputs) / found["elapsed_time"])
    assert found["requests_per_second"] == pytest.approx(12 / found["elapsed_time"])
    assert found["output_tokens_per_second"] == pytest.approx(outputs / found["elapsed_time"])
    assert (found["prompt_tokens"], found["output_tokens"], found["preemptions"]) == (prompts, outputs, 0)
    assert found["prefill_steps"] >= prompts / OPTIONS["max_num_batched_tokens"]
    assert json.loads(trace.read_text())["traceEvents"]
    line = (
        f"Throughput: {found['requests_per_second']:.2f} requests/s, {found['tokens_per_second']:.2f} total tokens/s, "
    )
    assert line + f"{found['output_tokens_per_second']:.2f} output tokens/s\n" in ended.stdout


def test_latency_of_two_ranks_counts_the_same(ray_cluster: dict[str, str], tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    lengths = ["--input-len=16", f"--output-len={OUTPUT}", "--batch-size=2", "--num-iters=2", "--num-iters-warmup=0"]
    shape = {"batch_size": 2, "input_len": 16, "output_len": OUTPUT, "n": 1}
    one_rank = {"model": DEMO_MODEL, "tensor_parallel_size": 1, "ms_per_output_token": 1e3}
    results.write_text(json.dumps(one_rank | shape))
    files = [f"--baseline={results}", f"--output-json={results}"]
    ended = bench("latency", "--tp=2", *FLAGS, *lengths, "--profile-steps=3", *files)
    assert ended.exit_code == 0, ended.output
    found = json.loads(results.read_text())
    assert found["speedup"] == pytest.approx(1e3 / found["ms_per_output_token"])
    assert f"Scaling: {found['speedup']:.2f} times the speed of tensor_parallel_size=1, " in ended.stdout
    assert (found["prefill_steps"], found["decode_steps"]) == (2, 2 * (OUTPUT - 1))
    assert (found["prompt_tokens"], found["output_tokens"]) == (2 * 2 * 16, 2 * 2 * OUTPUT)
    assert found["profiled_steps"] == 3
    assert found["kernel_shares"]["attention"] > 0
    assert found["kv_bytes_per_decode_step"] == 2 * np.mean([16 + i for i in range(1, OUTPUT)]) * kv_token_bytes(2)
    assert weight_bytes() / 2 <= found["weight_bytes_per_decode_step"] < weight_bytes() * 0.6


def test_nano_is_the_workload_of_nano_vllm() -> None:
    random.seed(0)
    inputs = [random.randint(100, 1024) for _ in range(256)]
    outputs = [random.randint(100, 1024) for _ in range(256)]
    assert (nano().input_lens, nano().output_lens, nano().sampling) == (inputs, outputs, {"temperature": 0.6})


def test_uniform_lengths() -> None:
    found = uniform(4000, 10, 3, 0.25, 0)
    assert set(found.input_lens) == set(range(7, 14))  # 7.5 to 12.5, rounded outwards
    assert set(found.output_lens) == {2, 3, 4}
    counts = np.bincount(found.input_lens)[7:]
    assert abs(counts - 4000 / 7).max() < 5 * np.sqrt(4000 / 7)
    assert set(uniform(10, 10, 3, 0.0, 0).input_lens) == {10}
    assert min(uniform(1000, 10, 3, 1.0, 0).output_lens) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["throughput", "--preset=nano", "--input-len=5"], "--preset nano .* drop --input-len 5"),
        (["throughput", "--preset=nano", "--num-prompts=10"], "drop --num-prompts 10"),
        (["throughput", "--preset=nano", "--random-range-ratio=0.1"], "drop --random-range-ratio 0.1"),
        (["throughput", "--preset=nano", "--max-model-len=1000"], "make 2044, but the context is 1000"),
        (["throughput", "--preset=nano", "--num-pages=64"], "make 2044, but the context is 1024"),
        (["latency", "--input-len=2000", "--output-len=49"], "make 2049, but the context is 2048"),
        (["latency", "--output-len=1", "--profile=x"], "outputs of 1 token have none; raise --output-len"),
        (["latency", "--output-json=/nowhere/x"], "cannot write /nowhere/x: there is no folder /nowhere"),
        (["latency", "--output-json=/tmp"], "cannot write /tmp: it is a folder; give a file"),
        (["throughput", "--profile=/tmp"], "cannot write /tmp: it is a folder; give a file"),
        (["latency", "--log-level=loud"], "'loud' is not one of debug"),
        (["latency", "--max-num-seqs=0"], "max_num_seqs=0 must be an integer >= 1"),
    ],
)
def test_impossible_options_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(app, ["bench", *arguments, "--device=cpu"], catch_exceptions=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["throughput", "--dataset-name=sharegpt"], "'sharegpt' is not one of 'random'"),
        (["throughput", "--preset=mega"], "'mega' is not one of 'nano'"),
        (["latency", "--batch-size=0"], "'--batch-size'"),
        (["throughput", "--random-range-ratio=1.5"], "'--random-range-ratio'"),
    ],
)
def test_unreadable_flag_is_named(arguments: list[str], message: str) -> None:
    ended = bench(*arguments)
    assert ended.exit_code == 2
    assert message in ended.stderr


def run_locally(
    num_steps: int | None, *, late: bool = False
) -> tuple[dict[int, list[int]], list[Profile], LocalExecutor]:
    """Return the tokens of three requests (of none, if `late`), the profiles of num_steps, and the executor."""
    folder = Path(DEMO_MODEL)
    executor = LocalExecutor(Config(**OPTIONS), ModelConfig.from_folder(folder), folder)
    tokens: dict[int, list[int]] = {}
    profiles: list[Profile] = []
    if not late:
        executor.submit([request(uid, [uid + 1] * 50, max_tokens=6 + uid) for uid in range(3)])
    if num_steps is not None:
        executor.start_profile(num_steps)
    while outputs := executor.poll(0):
        for output in outputs:
            for uid, token in zip(output.uids, output.tokens, strict=True):
                tokens.setdefault(uid, []).append(token)
        profile = executor.take_profile()
        profiles += [profile] if profile is not None else []
    return tokens, profiles, executor


@pytest.mark.parametrize(("asked", "traced"), [(2, 2), (100, 7)])
def test_profile_changes_no_token_and_comes_once(asked: int, traced: int) -> None:
    """Three prompts of 50 tokens take three steps of 64 tokens; the last one then decodes its other seven tokens."""
    plain, none, quiet = run_locally(None)
    tokens, profiles, executor = run_locally(asked)
    assert none == []
    assert tokens == plain
    assert {uid: len(own) for uid, own in tokens.items()} == {0: 6, 1: 7, 2: 8}
    assert [profile.num_steps for profile in profiles] == [traced]
    for stats in (quiet.stats, executor.stats):
        assert (stats.steps, stats.decode_steps) == (10, 7)
        assert (stats.prompt_tokens, stats.output_tokens) == (150, 21)


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlap"])
def test_preempted_requests_are_counted_again(overlap: bool) -> None:
    """Four requests grow to 16 pages each, and there are 40 pages."""
    engines: list[Engine] = []
    requests = [request(uid, [uid + 1] * 24, max_tokens=40) for uid in range(4)]
    found = run_engine(
        Path(DEMO_MODEL), requests, overlap=overlap, between=lambda _, e: engines.append(e),
        num_pages=40, max_model_len=64, enable_prefix_caching=False,
    )  # fmt: skip
    stats = engines[-1].stats
    assert stats.preemptions == found.preemptions > 0
    assert stats.prompt_tokens >= 4 * 24 + found.preemptions * 25  # the prompt and at least one token more
    assert stats.output_tokens == sum(map(len, found.tokens.values())) == 4 * 40
    assert 0 < stats.decode_steps < stats.steps <= found.steps
    assert stats.decode_s > 0


def test_profile_of_an_idle_engine_is_empty() -> None:
    tokens, profiles, _ = run_locally(5, late=True)
    assert tokens == {}
    assert [(p.num_steps, p.trace) for p in profiles] == [(0, b"")]
    assert kernel_times(profiles[0].trace) is None


KERNELS = {
    "void rms_norm<__nv_bfloat16, 8>(__nv_bfloat16*, float)": "norm",
    "void silu_and_mul<__nv_bfloat16>(__nv_bfloat16*)": "elementwise",
    "void rotate_and_store<__nv_bfloat16, 128>(...)": "elementwise",
    "void gumbel_argmax<__nv_bfloat16>(...)": "sampling",
    "merge_candidates": "sampling",
    "void sample_top_p<float>(...)": "sampling",
    "void partition_keys(...)": "attention",
    "void gather_rows<uint4, int>(...)": "copy",
    "void skinny_gemm<__nv_bfloat16, 4>(...)": "product",
    "void grouped_gemm<__nv_bfloat16>(...)": "product",
    "void stream_fp8<__nv_bfloat16, __nv_fp8_e4m3, 64, 64, 4>(...)": "product",
    "void float32_gemm<float>(...)": "product",
    "void decode_attention<__nv_bfloat16, 128>(...)": "attention",
    "nvjet_tst_64x8_64x16_1x2_h_bz_splitK_TNT": "product",
    "void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16>(...)": "product",
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>(...)": "product",
    "void gemv2T_kernel_val<int, int, __nv_bfloat16>(...)": "product",
    "void flashinfer::BatchDecodeWithPagedKVCacheKernel<...>(...)": "attention",
    "void flashinfer::BatchPrefillWithPagedKVCacheKernel<cutlass::bfloat16_t>(...)": "attention",
    "void flashinfer::PersistentVariableLengthMergeStatesKernel<8, 16>(...)": "attention",
    "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096>)": "communication",
    "void all_reduce_add_rms_norm<__nv_bfloat16>(...)": "communication",
    "void receive_add_rms_norm<__nv_bfloat16, 8, 4, 1>(...)": "communication",
    "Memcpy HtoD (Pinned -> Device)": "copy",
    "Memset (Device)": "copy",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>(...)": "elementwise",
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(...)>": "copy",
    "aten::mm": "product",
    "aten::mul": "elementwise",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
    "aten::as_strided": "other",
    "void trace_something(...)": "other",
}


@pytest.mark.parametrize(("name", "expected"), KERNELS.items())
def test_classify_kernels(name: str, expected: str) -> None:
    assert classify(name) == expected


def as_trace(events: list[tuple[str, str, int, int, int]]) -> bytes:
    """Return a trace of events (category, name, thread, start, duration) among others that do not count."""
    found: list[dict[str, Any]] = [
        {"ph": "X", "cat": cat, "name": name, "tid": tid, "ts": ts, "dur": dur} for cat, name, tid, ts, dur in events
    ]
    others: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "ts": 0, "args": {}},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "tid": 1, "ts": 0, "dur": 10**6},
    ]
    return json.dumps({"traceEvents": others[:1] + found + others[1:]}).encode()


KERNEL = st.tuples(
    st.sampled_from(["kernel", "gpu_memcpy", "gpu_memset"]),
    st.sampled_from(list(KERNELS)),
    st.integers(0, 2),
    st.integers(5, 60),
    st.integers(1, 20),
)


@given(st.lists(KERNEL, min_size=1, max_size=12))
def test_busy_and_idle_time_of_kernels(events: list[tuple[str, str, int, int, int]]) -> None:
    """Against a line of microseconds on which each kernel paints itself."""
    busy, computing = np.zeros((2, 100), bool)
    times: dict[str, int] = {}
    for _, name, _, start, duration in events:
        busy[start : start + duration] = True
        computing[start : start + duration] |= KERNELS[name] != "communication"
        times[KERNELS[name]] = times.get(KERNELS[name], 0) + duration
    found = kernel_times(as_trace([*events, ("cpu_op", "aten::mm", 1, 0, 100)]))
    assert found is not None
    assert found.busy_us == busy.sum()
    painted = np.flatnonzero(busy)
    span = painted[-1] + 1 - painted[0]
    assert found.idle_share == pytest.approx(1 - busy.sum() / span)
    assert found.exposed_share == pytest.approx((busy & ~computing).sum() / span)
    assert found.shares == pytest.approx({name: time / sum(times.values()) for name, time in times.items()})
    assert list(found.shares.values()) == sorted(found.shares.values(), reverse=True)


@given(st.data())
def test_op_counts_without_the_ops_inside_it(data: st.DataObject) -> None:
    """Against a line of microseconds for each thread on which the innermost op is the last to paint itself."""
    events: list[tuple[str, str, int, int, int]] = []
    owner = np.full((2, 100), -1)

    def nest(tid: int, start: int, stop: int, depth: int) -> None:
        while stop - start >= 2 and depth < 4 and data.draw(st.booleans()):
            begin = data.draw(st.integers(start + 1, stop - 1))  # equal ones could hold each other
            end = data.draw(st.integers(begin + 1, stop))
            owner[tid, begin:end] = len(events)
            events.append(("cpu_op", f"op {len(events)}", tid, begin, end - begin))
            nest(tid, begin, end, depth + 1)
            start = end

    for tid in range(2):
        nest(tid, 0, 100, 0)
    exclusive = {event.name: event.exclusive for event in read_events(as_trace(data.draw(st.permutations(events))))}
    assert exclusive == {f"op {i}": (owner == i).sum() for i in range(len(events))}


def test_union_of_intervals_that_touch_overlap_and_hide() -> None:
    spans = [(0, 2), (2, 3), (10, 20), (12, 15), (19, 21)]
    assert union(TraceEvent("", start, stop, stop - start) for start, stop in spans) == 3 + 11
