"""Every CUDA source compiles for the architectures that we support; needs a compiler, not a GPU."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lockstep.kernels import native

pytestmark = pytest.mark.emulator
INSTANCES = {
    "peer_collectives.cu": [
        *(
            f"{name}<{t}>"
            for name in ("one_shot_all_reduce", "two_shot_all_reduce")
            for t in ("bf16, 8, 2", "f16, 8, 8", "float, 1, 4")
        ),
        *(f"push_all_reduce<{t}>" for t in ("bf16, 8, 2", "f16, 8, 8", "float, 4, 3")),
        *(f"all_gather<{shape}>" for shape in ("16, 2", "16, 8", "1, 3")),
        *(
            f"all_reduce_add_rms_norm<{shape}, {two_steps}>"
            for shape in (
                "bf16, 8, 2, 1",
                "bf16, 8, 2, 4",
                "bf16, 8, 4, 4",
                "bf16, 8, 8, 4",
                "f16, 1, 2, 4",
                "float, 4, 8, 4",
            )
            for two_steps in ("false", "true")
        ),
        *(
            f"{name}_add_rms_norm<{shape}>"
            for name in ("push_all_reduce", "two_push", "receive")
            for shape in ("bf16, 8, 2, 1", "f16, 8, 8, 2", "float, 4, 4, 4")
        ),
    ],
    "token_sampling.cu": [
        *(f"gumbel_argmax<{shape}>" for shape in ("bf16, 8, false", "float, 4, true", "f16, 1, false")),
        *(f"topk_candidates<{shape}>" for shape in ("bf16, 8", "float, 4", "f16, 1", "long long, 2")),
        *(f"sample_top_p<{shape}>" for shape in ("bf16, 8", "float, 4", "f16, 1")),
        "merge_candidates",
        "sample_topk",
    ],
    "skinny_gemm.cu": [
        f"skinny_gemm<{types}, {warps}, {depth}, {staged_and_normed}, {epilogue}>"
        for types, warps, depth, staged_and_normed in (
            ("bf16, bf16", 8, 4, "true, true"),
            ("bf16, bf16", 16, 4, "true, true"),
            ("bf16, bf16", 16, 5, "true, true"),
            ("bf16, bf16", 16, 5, "true, false"),
            ("f16, f16", 16, 2, "true, false"),
            ("bf16, bf16", 16, 2, "false, false"),
            ("bf16, fp8", 16, 2, "true, false"),
            ("bf16, fp8", 20, 2, "true, false"),
            ("bf16, fp8", 8, 2, "false, false"),
            ("f16, fp8", 20, 2, "true, false"),
        )
        for epilogue in (
            ("STORE", "ADD", "SILU") if "true, true" in staged_and_normed else ("STORE", "ADD", "SILU", "PUSH")
        )
    ],
    "partition_keys.cu": ["partition_keys"],
    "decode_attention.cu": [
        *(
            f"decode_attention<{shape}>"
            for shape in (
                "f16, f16, f16, 64, 4, false",
                "bf16, bf16, bf16, 96, 8, false",
                "bf16, bf16, bf16, 128, 4, false",
                "bf16, bf16, bf16, 128, 8, true",
                "bf16, fp8, bf16, 128, 4, false",
                "f16, fp8, f16, 128, 8, true",
                "bf16, fp8, bf16, 96, 4, true",
                "f16, fp8, f16, 64, 8, false",
                "bf16, bf16, fp8, 128, 4, false",
                "bf16, bf16, fp8, 128, 8, false",
                "f16, fp8, fp8, 128, 4, true",
                "bf16, bf16, bf16, 256, 4, false",
                "bf16, bf16, bf16, 256, 8, true",
                "bf16, fp8, bf16, 256, 4, false",
                "f16, fp8, f16, 256, 8, true",
            )
        ),
    ],
    "gated_delta.cu": [
        *(f"causal_conv<{t}>" for t in ("bf16, 4, 8", "f16, 4, 8", "bf16, 4, 1", "float, 4, 4")),
        *(f"gated_delta<{shape}>" for shape in ("bf16, 128", "f16, 64", "float, 32")),
        *(f"gated_rms_norm<{t}, {v}>" for t in ("bf16", "float") for v in (1, 4)),
    ],
    "delta_chunks.cu": [
        *(f"chunk_matrices<{shape}>" for shape in ("bf16, 128", "f16, 64")),
        *(f"delta_chunks<{shape}>" for shape in ("bf16, 128, 64", "bf16, 128, 16", "f16, 64, 32")),
    ],
    "delta_step.cu": [
        f"delta_step<{shape}>"
        for shape in ("bf16, 128, 4, 2, 16", "bf16, 128, 4, 2, 32", "bf16, 128, 4, 4, 128", "float, 64, 4, 4, 64")
    ],
    "experts.cu": [
        *(f"group_pairs<{rows}>" for rows in (8, 16, 32, 64, 128)),
        *(
            f"grouped_gemm<{t}, {t}, {shape}, {gate}>"
            for t in ("bf16", "f16")
            for shape in ("1, 4, 1, 1, 6", "1, 4, 4, 2, 3", "2, 4, 4, 2, 3")
            for gate in ("PLAIN", "SILU", "CLAMPED")
        ),
        *(
            f"grouped_gemm<bf16, mxfp4, {shape}, {gate}>"
            for shape in ("1, 4, 1, 1, 12", "1, 4, 4, 2, 4", "2, 4, 4, 2, 4")
            for gate in ("PLAIN", "CLAMPED")
        ),
        *(
            f"grouped_gemm<{t}, fp8, {shape}, {gate}>"
            for t in ("bf16", "f16")
            for shape in ("1, 4, 1, 1, 8", "1, 4, 4, 2, 4", "2, 4, 4, 2, 4")
            for gate in ("PLAIN", "SILU")
        ),
        *(f"float32_gemm<{gate}>" for gate in ("PLAIN", "SILU", "CLAMPED")),
        *(
            f"select_experts<{shape}>"
            for shape in (
                "bf16, 1, true, false",
                "bf16, 4, false, false",
                "float, 8, true, true",
                "float, 16, true, false",
            )
        ),
        "weighted_sum<bf16, 8>",
        "weighted_sum<float, 1>",
    ],
    "skinny_experts.cu": [
        *(f"sum_experts<{shape}, 3>" for shape in ("bf16, mxfp4, 4, 4", "bf16, bf16, 9, 2", "f16, f16, 2, 8")),
        *(
            f"skinny_experts<{shape}, {gate}>"
            for shape in (
                "bf16, mxfp4, 1, 3, 4",
                "bf16, mxfp4, 1, 3, 2",
                "bf16, mxfp4, 2, 4, 1",
                "bf16, mxfp4, 4, 3, 1",
                "bf16, bf16, 1, 3, 4",
                "bf16, bf16, 1, 3, 1",
                "bf16, bf16, 2, 4, 1",
                "f16, f16, 2, 4, 4",
                "f16, f16, 1, 3, 2",
            )
            for gate in ("PLAIN", "SILU", "CLAMPED")
        ),
    ],
    "wide_experts.cu": [
        f"wide_experts<{shape}, {gate}>"
        for shape in ("2, 32, 4", "2, 64, 4", "4, 128, 4")
        for gate in ("PLAIN", "SILU", "CLAMPED")
    ],
    "route_tokens.cu": [
        f"route_tokens<{shape}>"
        for shape in (
            "bf16, 6, 1, true, false, true, 2",
            "f16, 4, 1, false, true, false, 2",
            "bf16, 6, 4, true, false, true, 1",
            "bf16, 4, 8, true, false, true, 1",
            "bf16, 4, 16, true, false, true, 1",
            "bf16, 14, 16, true, false, false, 1",
            "f16, 8, 8, true, true, true, 1",
        )
    ],
    "quantize_rows.cu": [
        *(
            f"quantize_rows<{shape}>"
            for shape in ("bf16, PLAIN, true", "bf16, NORMED, false", "f16, NORMED, true", "bf16, GATED, true")
        ),
        *(f"finish_products<bf16, {finish}>" for finish in ("STORE", "ADD", "SILU")),
    ],
    "fp8_gemm.cu": [f"fp8_gemm<{shape}>" for shape in ("bf16, 16, 6", "f16, 32, 5", "bf16, 64, 4", "f16, 64, 4")],
    "stream_fp8.cu": [
        f"stream_fp8<{types}, {tile}>"
        for types, tile in (
            ("bf16, bf16", "64, 48, 1"),
            ("bf16, bf16", "64, 32, 1"),
            ("f16, f16", "64, 64, 2"),
            ("bf16, bf16", "64, 96, 3"),
            ("bf16, fp8", "64, 64, 4"),
            ("bf16, bf16", "128, 112, 1"),
            ("f16, f16", "128, 80, 1"),
        )
    ],
    "stream_gemm.cu": [
        f"stream_gemm<{tile}>"
        for tile in (
            "bf16, 16, 32, 1, 1, 2, 18",
            "f16, 32, 48, 1, 2, 2, 10",
            "bf16, 64, 64, 1, 4, 1, 12",
            "bf16, 32, 80, 1, 1, 2, 8",
            "f16, 64, 96, 1, 2, 1, 9",
            "bf16, 64, 112, 2, 1, 1, 6",
            "bf16, 16, 128, 1, 1, 1, 12",
            "bf16, 64, 128, 3, 1, 1, 4",
        )
    ],
    "wide_gemm.cu": [
        f"wide_gemm<{tile}>"
        for tile in (
            "bf16, 64, 16, 11",
            "f16, 64, 32, 9",
            "bf16, 128, 64, 4",
            "bf16, 64, 128, 4",
            "f16, 128, 128, 3",
            "bf16, 128, 256, 4",
        )
    ],
    "rotate_and_store.cu": [
        f"rotate_and_store<{t}, {t}, {p}, {min(p, 4)}>" for t in ("bf16", "f16", "float") for p in (1, 2, 4, 8)
    ],
    "elementwise.cu": [
        *(f"rms_norm<{t}, {v}, {n}>" for t, v in (("bf16", 8), ("f16", 1), ("float", 4)) for n in (1, 16)),
        "silu_and_mul<bf16, 8>",
        "silu_and_mul<float, 1>",
        "gelu_and_mul<bf16, 8>",
        "multiply_by_sigmoid<bf16, 8>",
        "multiply_by_sigmoid<float, 1>",
        "sum_squares<bf16>",
        "sum_squares<float>",
        "gather_rows<Vec<bf16, 8>, int>",
        "gather_rows<Vec<float, 1>, long long>",
        "begin_decode",
        "append_tokens",
    ],
}


# Others: sm_80, sm_90 and sm_100.
ARCHITECTURES = {
    "fp8_gemm.cu": ["sm_90a"],
    "stream_fp8.cu": ["sm_90a"],
    "stream_gemm.cu": ["sm_90a"],
    "wide_experts.cu": ["sm_90a"],
    "wide_gemm.cu": ["sm_90a"],
    "delta_step.cu": ["sm_90", "sm_100"],
}


def test_every_source_is_listed() -> None:
    assert set(INSTANCES) == {p.name for p in native.SOURCES.glob("*.cu")}


@pytest.mark.parametrize(
    ("source", "architecture"),
    [(s, a) for s in INSTANCES for a in ARCHITECTURES.get(s, ["sm_80", "sm_90", "sm_100"])],
)
def test_source_compiles_without_spilling(source: str, architecture: str, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    uses = "".join(f"auto use{i} = &{name};\n" for i, name in enumerate(INSTANCES[source]))
    report = compile_report(f"{native.source_text(source)}\n{uses}", architecture, tmp_path)  # as NVRTC gets it
    spills = [int(stores) for stores in re.findall(r"(\d+) bytes spill stores", report)]
    assert len(spills) == len(INSTANCES[source])
    assert max(spills) == 0, report


def compile_report(text: str, architecture: str, folder: Path) -> str:
    """Return what nvcc says about a source that compiles; cached by source, flags and compiler, like native code."""
    command = ["nvcc", f"-arch={architecture}", "-std=c++17", "-Xptxas=-v", "-cubin", "-o", "all.cubin", "all.cu"]
    key = hashlib.sha256(repr((text, command, nvcc_version())).encode()).hexdigest()[:16]
    cached = native.cache_dir() / f"nvcc-{key}.txt"
    if cached.exists():
        return cached.read_text()
    (folder / "all.cu").write_text(text)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cached.parent.mkdir(parents=True, exist_ok=True)
    unfinished = cached.with_suffix(f".{os.getpid()}")
    unfinished.write_text(done.stderr)
    os.replace(unfinished, cached)
    return done.stderr


@functools.cache
def nvcc_version() -> str:
    return subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
